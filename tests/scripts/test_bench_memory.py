"""Quantizing takes no more memory for more layers."""

import numpy as np
import pytest

from jq.models import HFCheckpoint
from scripts.bench_memory import Bench, Result, growth, measure, model_config, write_model


def test_the_model_is_one(tmp_path):
    config = model_config(64, 2)
    size = write_model(tmp_path, config)
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.config.with_changes(layer_windows=()) == config.with_changes(layer_windows=())
    block = checkpoint.block("layers_1")
    assert float(np.std(np.asarray(block["mlp"]["down_proj"]["kernel"], np.float32))) > 0.05
    assert size == 2 * 2 * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64)


def test_growth_is_relative_to_the_weights():
    assert growth(Result(4, 100, 500), Result(16, 400, 650)) == 0.5


@pytest.mark.slow
def test_the_peak_does_not_grow_with_depth():
    bench = Bench(method="rtn")
    shallow, deep = measure(bench, 4), measure(bench, 16)
    assert deep.weight_bytes == 4 * shallow.weight_bytes > 300e6
    assert growth(shallow, deep) < 0.1, (shallow, deep)
