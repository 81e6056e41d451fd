"""`jaxq eval --tasks`, as a user calls it."""

import json
import os

import pytest

from jq.cli.tasks import quiet_bars
from tests.cli import folders
from tests.jq.tasks import tiny
from tests.jq.tasks.conftest import HARNESS

pytestmark = pytest.mark.skipif(
    not HARNESS, reason="needs lm-evaluation-harness: pip install -e '.[tasks]'"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return folders.write_model(folder, max_position_embeddings=tiny.CONTEXT)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """--include-path, and no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield "--include-path", tiny.write_tasks(tmp_path_factory.mktemp("tasks"))


def test_a_table_with_standard_errors_is_printed(call, model, local):
    done = call("eval", model, "--tasks", "flies,texts", "--batch-size", 4, "--limit", 3, *local)
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["task", "shots", "items", "metric", "value", "better"]
    assert lines[1][:4] == ["flies", "0", "3", "acc"]
    assert lines[1][5] == "+-"
    assert lines[1][-1] == "higher"
    assert lines[2][1] == "acc_norm"
    assert (lines[3][3], lines[3][-1]) == ("word_perplexity", "lower")
    assert lines[-1][0] == "lm-evaluation-harness"
    assert "the first 3 items" in done.err


def test_bars_of_the_libraries_are_turned_off_unless_asked_for(monkeypatch):
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "x")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    quiet_bars()
    assert os.environ["TQDM_DISABLE"] == "0"
    assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"  # stderr is no terminal here


def test_json_has_every_item(call, model, local):
    value = json.loads(call("eval", model, "--tasks", "insects", "--json", *local).out)
    tasks = {task["task"]: task for task in value["tasks"]}
    assert tasks["flies"]["items"]["acc,none"] == pytest.approx([0, 1] * 2, abs=1)
    assert tasks["flies"]["metrics"][0]["value"] == pytest.approx(
        sum(tasks["flies"]["items"]["acc,none"]) / len(tiny.DOCS)
    )
    assert value["truncated"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tasks", "./fleas.yaml"), "no task is called './fleas.yaml'"),
        (("--tasks", "flies", "--text", "x.txt"), "--text is for perplexity"),
        (("--limit", "3"), "--limit is for tasks; name some with --tasks"),
        (("--tasks", "flies", "--limit", "0"), "limit 0 must be 1 or more"),
        (("--tasks", "flies", "--batch-size", "0"), "batch_size 0"),
        (("--tasks", ","), "no task is named"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
def test_wrong_requests_are_refused_in_one_line(call, model, local, options, said, monkeypatch):
    # Without the harness's own tasks, whose reading takes seconds.
    from jq.tasks import harness

    monkeypatch.setattr(harness, "_manager", lambda *_: harness._manager_of(local[1], False))
    path = () if options[0] == "--limit" else local
    done = call("eval", model, *options, *path)
    assert (done.code, done.out) == (2, "")
    assert said in done.err.splitlines()[-1]
