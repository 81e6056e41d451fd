"""Quantizing takes no more memory for more layers."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jq.models import HFCheckpoint
from scripts.bench_memory import (
    COLUMNS,
    Bench,
    BlockWatch,
    Result,
    add_lines,
    forget_peak,
    growth,
    measure,
    model_config,
    write_model,
)

RESULTS = Path(__file__).resolve().parents[2] / "scripts" / "results" / "memory.csv"


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


def test_known_shapes():
    assert Bench().config(3).hidden_size == 1024
    large = Bench(shape="llama-3-8b").config(2)
    assert (large.num_hidden_layers, large.intermediate_size, large.vocab_size) == (
        2,
        14336,
        128256,
    )


def test_the_peak_of_each_block_is_its_own():
    forget_peak()  # what other tests of this process held
    watch = BlockWatch()
    taken = [np.ones(2**24)]
    watch(SimpleNamespace(block="layers_0"))
    del taken[0]
    watch(SimpleNamespace(block="layers_1"))
    watch(SimpleNamespace(block="layers_1"))
    first, second = watch.finish()
    assert 0 < second < first
    assert 0 < watch.rest < first


def test_a_line_per_block(tmp_path):
    bench = Bench(csv=tmp_path / "memory.csv", hidden=64)
    result = Result(2, 100, 900_000_000, ((800_000_000, 1.26), (900_000_000, 0.5)))
    add_lines(bench, result, bench.csv)
    add_lines(Bench(shape="llama-3-8b"), result, bench.csv)
    header, *lines = csv.reader(bench.csv.read_text().splitlines())
    assert tuple(header) == COLUMNS
    assert lines[0] == ["hidden 64", "2", "gptq", "512", "0", "800", "1.3"]
    assert [line[0] for line in lines] == ["hidden 64"] * 2 + ["llama-3-8b"] * 2


@pytest.mark.parametrize(("method", "layers"), [("rtn", 8), ("rtn", 24), ("gptq", 8)])
def test_what_was_measured_is_flat_in_depth(method, layers):
    """The recorded runs of the large shape: after the first block no block needs more."""
    rows = csv.DictReader(RESULTS.read_text().splitlines())
    run = ("llama-3-8b", method, str(layers))
    deep = [int(r["peak_mb"]) for r in rows if (r["shape"], r["method"], r["layers"]) == run]
    assert len(deep) == layers
    assert max(deep[1:]) < 1.004 * min(deep[1:])


@pytest.mark.slow
def test_the_peak_does_not_grow_with_depth():
    bench = Bench(method="rtn")
    shallow, deep = measure(bench, 4), measure(bench, 16)
    assert deep.weight_bytes == 4 * shallow.weight_bytes > 300e6
    assert growth(shallow, deep) < 0.1, (shallow, deep)
