"""Tasks of files, found and run as lm-evaluation-harness does."""

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest

from jq.errors import SpecError
from jq.tasks import HarnessLM, TaskOptions, harness, load_tasks, run_tasks
from tests.jq.tasks.test_scoring import _logits
from tests.jq.tasks.tiny import CONTEXT, DOCS


@pytest.fixture(scope="module")
def lm(model, tasks):
    return HarnessLM(*model, batch_size=4)


@pytest.fixture(scope="module")
def results(lm, tasks):
    names = ("flies", "letters", "texts", "next_word")
    return {r.name: r for r in run_tasks(lm, names, TaskOptions(include_path=tasks))}


def log_probs(model, tokens):
    """log p of tokens 1, 2, ... given those before, float64."""
    model, params, _ = model
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(_logits(model, params, padded), np.float64)[0]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return log_p[np.arange(len(tokens) - 1), np.asarray(tokens[1:])]


def test_choices_are_scored_as_defined(model, results):
    right, right_by_length = [], []
    for i, doc in enumerate(DOCS):
        scores = []
        for choice in doc["choices"]:
            # The harness puts a space between a question and its answers.
            before = model[2].encode(doc["question"])
            whole = model[2].encode(f"{doc['question']} {choice}")
            scores.append(log_probs(model, whole)[len(before) - 1 :].sum())
        sizes = [len(choice) for choice in doc["choices"]]
        right.append(float(np.argmax(scores) == i % 3))
        right_by_length.append(float(np.argmax(np.divide(scores, sizes)) == i % 3))
    task = results["flies"]
    assert task.items == {"acc,none": right, "acc_norm,none": right_by_length}
    assert (task.num_items, task.num_fewshot, task.version) == (4, 0, 2.0)
    acc = task.metrics[0]
    assert (acc.key, acc.higher_is_better) == ("acc,none", True)
    assert acc.value == pytest.approx(np.mean(right))
    assert acc.stderr == pytest.approx(np.std(right, ddof=1) / 2)


def test_texts_are_scored_as_defined(model, results):
    nll = words = size = 0
    for doc in DOCS:
        # The end-of-sequence token stands before a text.
        tokens = [0, *model[2].encode(doc["question"])]
        nll -= log_probs(model, tokens).sum()
        words += len(doc["question"].split())
        size += len(doc["question"].encode())
    values = {m.name: m.value for m in results["texts"].metrics}
    assert values["word_perplexity"] == pytest.approx(np.exp(nll / words), rel=1e-5)
    assert values["byte_perplexity"] == pytest.approx(np.exp(nll / size), rel=1e-5)
    assert results["texts"].items == {}


def test_written_answers_are_scored(results):
    assert results["next_word"].metrics[0].name == "exact_match"
    assert len(results["next_word"].items["exact_match,none"]) == 4


def test_long_texts_are_scored_in_windows_that_predict_each_token_once(model, lm):
    text = " ".join(doc["question"] for doc in DOCS * 4)
    tokens = [0, *model[2].encode(text)]
    assert len(tokens) > 2 * CONTEXT
    total, start = 0.0, 0
    while start + 1 < len(tokens):
        # The last window reaches back, so that it reads as much as the others.
        end = min(start + CONTEXT, len(tokens) - 1)
        window = tokens[max(0, end - CONTEXT) : end + 1]
        total += _last(model, window, end - start)
        start = end
    (found,) = lm.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert found == pytest.approx(total, rel=1e-5)


def _last(model, window, count):
    """Sum of log p of the last `count` tokens of a window of at most CONTEXT + 1."""
    decoder, params, _ = model
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(window) - 1] = window[:-1]
    logits = np.asarray(_logits(decoder, params, padded), np.float64)[0]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    places = np.arange(len(window) - 1)[-count:]
    return log_p[places, np.asarray(window[1:])[places]].sum()


def test_too_long_requests_are_cut_and_counted(model, tasks):
    lm = HarnessLM(*model, batch_size=2, max_length=16)
    question = " ".join(doc["question"] for doc in DOCS)
    pair = SimpleNamespace(args=(question, " again"))
    tokens = model[2].encode(question + " again")
    (answer,) = lm.loglikelihood([pair])
    count = len(tokens) - len(model[2].encode(question))
    assert answer[0] == pytest.approx(log_probs(model, tokens[-17:])[-count:].sum(), rel=1e-5)
    assert lm.truncated == 1
    texts = lm.generate_until([SimpleNamespace(args=(question, {"max_gen_toks": 4}))] * 3)
    assert len(set(texts)) == 1
    assert lm.truncated == 4


def test_groups_options_and_solved_examples(lm, tasks):
    options = TaskOptions(num_fewshot=2, limit=2, include_path=tasks)
    results = {r.name: r for r in run_tasks(lm, ("flies",), options)}
    assert (results["flies"].num_items, results["flies"].num_fewshot) == (2, 2)
    assert [t.task_name for t in load_tasks(("flies",), options)["flies"]] == ["flies"]
    assert json.dumps(results["flies"].to_dict())


@pytest.mark.parametrize("shots", [None, 2])
def test_results_are_those_of_the_harness_own_entry(lm, tasks, shots):
    from lm_eval.evaluator import simple_evaluate

    options = TaskOptions(num_fewshot=shots, limit=3, include_path=tasks)
    names = ("flies", "texts", "next_word")
    ours = run_tasks(lm, names, options)
    manager = harness._manager(names, options)
    raw = simple_evaluate(
        lm, tasks=list(names), num_fewshot=shots, limit=3, task_manager=manager, bootstrap_iters=0
    )
    assert raw is not None
    for task in ours:
        theirs = raw["results"][task.name]
        assert {m.key: m.value for m in task.metrics} == {
            m.key: theirs[m.key] for m in task.metrics
        }
        assert task.num_fewshot == raw["n-shot"][task.name] == (shots or 0)


def test_unknown_names_are_refused_with_close_ones(tasks, monkeypatch):
    monkeypatch.setattr(harness, "_manager", lambda *_: harness._manager_of(tasks, False))
    options = TaskOptions(include_path=tasks)
    with pytest.raises(SpecError, match="no task is called 'flys'; close: flies"):
        load_tasks(("letters", "flys"), options)
    with pytest.raises(SpecError, match="nothing known is close"):
        load_tasks(("qqqq",), options)
    with pytest.raises(SpecError, match="no task is named"):
        load_tasks((), options)
    assert harness.expand_names(("le*", "flies"), options) == ("letters", "flies")
    assert [t.task_name for t in load_tasks(("insects",), options)["insects"]] == [
        "flies", "letters",
    ]  # fmt: skip


def test_the_harness_own_tasks_are_read_only_where_they_are_needed(tasks, monkeypatch):
    local = harness._manager_of(tasks, False)
    read = []
    monkeypatch.setattr(harness, "_manager_of", lambda path, all_: read.append(all_) or local)
    options = TaskOptions(include_path=tasks)
    harness._manager(("insects", "texts"), options)
    assert read == [False]
    harness._manager(("insects", "arc_easy"), options)
    assert read == [False, False, True]
    read.clear()
    harness._manager((f"{tasks}/flies.yaml",), TaskOptions())
    assert read == [False]
    harness._manager(("flies",), TaskOptions())
    assert read == [False, True]


def test_data_out_of_reach_are_told(tasks, tmp_path):
    text = "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\n"
    (tmp_path / "lost.yaml").write_text(text + "test_split: test\noutput_type: multiple_choice\n")
    with pytest.raises(SpecError, match=r"task 'lost' cannot be loaded: FileNotFoundError"):
        load_tasks(("lost",), TaskOptions(include_path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["UNSAFE_CODE", "MULTIMODAL"])
def test_what_models_cannot_or_shall_not_do_is_refused(tasks, monkeypatch, kind):
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, kind, True, raising=False)
    with pytest.raises(SpecError, match=r"task 'flies' (runs programs|shows images)"):
        load_tasks(("flies",), TaskOptions(include_path=tasks))


def test_descriptions_depend_on_the_items_and_on_nothing_else(tasks):
    options = TaskOptions(include_path=tasks)
    (task,) = load_tasks(("flies",), options)["flies"]
    (again,) = load_tasks(("flies",), options)["flies"]
    facts = harness.describe_tasks([task], options)
    assert facts == harness.describe_tasks([again], options)
    assert facts["flies"]["items"] == 4
    fewer = harness.describe_tasks([task], TaskOptions(limit=2))
    assert fewer["flies"]["sha256"] != facts["flies"]["sha256"]


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"num_fewshot": -1}, {"include_path": "no/such/folder"}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        TaskOptions(**options)


def test_a_missing_harness_is_told_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(SpecError, match="pip install"):
        harness.harness_version()


def test_global_generators_are_left_as_they_were(lm, tasks):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    load_tasks(("letters",), TaskOptions(include_path=tasks))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
def test_sizes_that_are_none_are_refused(model):
    for wrong in ({"batch_size": 0}, {"max_length": 1}, {"max_length": CONTEXT + 1}):
        with pytest.raises(SpecError, match="give 1 or more"):
            HarnessLM(*model, **wrong)
