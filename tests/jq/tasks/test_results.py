"""What is read from the harness's results."""

import numpy as np

from jq.tasks.results import choose_metric, read_items, read_results

SAMPLES = [
    {"doc_id": 1, "filter": "none", "metrics": ["acc", "f1"], "acc": 0.0, "f1": (1, 0)},
    {"doc_id": 0, "filter": "none", "metrics": ["acc", "f1"], "acc": np.float64(1), "f1": (1, 1)},
    {"doc_id": 0, "filter": "strict", "metrics": ["acc"], "acc": True},
]


def test_items_are_in_order_and_one_number_each():
    assert read_items(SAMPLES) == {"acc,none": [1.0, 0.0], "acc,strict": [1.0]}


def test_tasks_and_groups_are_told_apart():
    raw = {
        "results": {
            "insects": {"alias": "insects", "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "flies": {"alias": " - flies", "acc,none": 0.5, "acc_stderr,none": 0.25},
        },
        "groups": {"insects": {}},
        "samples": {"flies": SAMPLES[:2]},
        "versions": {"flies": 2.0},
        "n-shot": {"flies": 3},
        "higher_is_better": {"flies": {"acc": True}},
        "n-samples": {"flies": {"original": 9, "effective": 2}},
    }
    insects, flies = read_results(raw)
    assert (insects.group, insects.metrics[0].stderr, insects.items) == (True, None, {})
    assert (flies.group, flies.num_items, flies.num_fewshot, flies.version) == (False, 2, 3, 2.0)
    assert flies.metrics[0].stderr == 0.25
    assert flies.metrics[0].higher_is_better is True


def test_one_metric_stands_for_a_task():
    ones = [0.0, 1.0]
    assert choose_metric({"acc,none": ones, "acc_norm,none": ones}) == "acc_norm,none"
    assert choose_metric({"odd,none": ones, "exact_match,strict": ones}) == "exact_match,strict"
    assert choose_metric({"acc,none": [2.0], "odd,none": ones}) == "odd,none"
    assert choose_metric({"odd,none": [-1.0]}) is None
