"""Tasks of the harness as a comparison sees them: one score per item, and facts for its spec."""

import dataclasses

import pytest

from jq.compare import compare, tasks
from jq.compare.spec import differences
from jq.errors import OutputError, SpecError
from jq.tasks import TaskOptions
from tests.cli import folders
from tests.jq.compare.test_run import plan_of
from tests.jq.tasks import tiny
from tests.jq.tasks.conftest import HARNESS

pytestmark = pytest.mark.skipif(
    not HARNESS, reason="needs lm-evaluation-harness: pip install -e '.[tasks]'"
)


class Coin:
    name = "coin"

    def score(self, model, params, tokenizer):
        return [1.0, 0.0]


coin = Coin()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield TaskOptions(include_path=tiny.write_tasks(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return folders.write_model(folder, max_position_embeddings=tiny.CONTEXT)


def test_items_of_tasks_and_groups_join_the_comparison(model, options, tmp_path):
    names = (f"{__name__}:coin", "next_word", "insects")
    plan = plan_of(model, tmp_path / "out", ("int8",), tasks=names, task_options=options)
    comparison = compare(plan)
    assert comparison.original.tasks.keys() == {
        "coin", "next_word (exact_match)", "insects (acc)",
    }  # fmt: skip
    # A group's items are those of its tasks.
    assert len(comparison.original.tasks["insects (acc)"]) == 2 * len(tiny.DOCS)
    assert set(comparison.find("int8").tasks["insects (acc)"]) <= {0.0, 1.0}
    facts = comparison.spec["tasks"]
    assert facts[f"{__name__}:coin"] == {}
    assert facts["insects (acc)"]["harness"] == tasks.harness_version()
    assert facts["insects (acc)"]["flies"]["items"] == len(tiny.DOCS)
    again = compare(plan)
    assert all(result.reused for result in again.results)
    fewer = dataclasses.replace(options, limit=2)
    with pytest.raises(
        OutputError, match=r"tasks\.next_word \(exact_match\)\.limit was null, is 2"
    ):
        compare(dataclasses.replace(plan, task_options=fewer))


def test_the_metric_that_stands_for_a_task(options):
    (flies,) = tasks.find_tasks(["flies"], options)
    assert flies.name == "flies (acc_norm)"
    with pytest.raises(SpecError, match="'texts' has no score per item"):
        tasks.find_tasks(["texts"], options)


def test_another_harness_asks_another_question(options, monkeypatch):
    before = tasks.describe(["flies"], tasks.find_tasks(["flies"], options))
    monkeypatch.setattr(tasks, "harness_version", lambda: "9.9")
    after = tasks.describe(["flies"], tasks.find_tasks(["flies"], options))
    assert len(differences(before, after)) == 1
