"""The demonstration, on little data."""

import csv
import json
import math

import numpy as np
import pytest

from jq import tree
from jq.api import load
from jq.checkpoint import read_manifest
from jq.qtensor import QTensor
from scripts import demo

FEW = ["--calib-samples", "2", "--windows", "3", "--new-tokens", "4"]


def test_plan_has_every_method_at_every_width():
    runs = demo.plan(demo.Options())
    assert len({(run.name, run.spec) for run in runs}) == len(runs) == 11
    assert {run.name for run in runs} == set(demo.METHODS)
    for run in runs:
        if run.name in demo.EIGHT_BIT:
            assert run.spec.bits == 8
            assert run.spec.activation is not None
        else:
            assert (run.spec.group_size, run.spec.symmetric) == (128, False)
    assert [run.spec.bits for run in runs if run.name == "RTN"] == [4, 3]
    assert any((run.name, run.spec.bits) == demo.SAVED for run in runs)


def test_lines_have_a_cell_per_column():
    plain = demo.Result("unquantized", "bfloat16", 16.0, 5.8, 9.5, 0.3)
    assert len(plain.cells()) == len(demo.COLUMNS)
    assert "None" not in " ".join(plain.cells())
    line = demo.Result("RTN", "int3 g128", 3.148, 2.0, 9.8, 0.3, 0.3, 0.02, 0.03, 0.001, 0.9, 4.2)
    cells = dict(zip((c.header for c in demo.COLUMNS), line.cells(), strict=True))
    assert cells["method"] == "RTN int3"
    assert cells["increase"] == "+0.300 ±0.020"
    assert cells["KL (mnat)"] == "30.00 ±1.00"
    assert sum(column.width + 2 for column in demo.COLUMNS) - 2 <= 80
    for column, cell in zip(demo.COLUMNS, line.cells(), strict=True):
        assert len(cell) <= column.width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "bits 9 is not in 2..8"),
        (["--calib-samples", "0"], "calib_samples is 0"),
        (["--windows", "0"], "max_windows 0"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, message, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("demo: error: ")
    assert message in line


def test_a_folder_that_cannot_take_the_results_is_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "Demo", None)  # nothing is loaded
    file = tmp_path / "file"
    file.write_text("mine")
    assert demo.main(["--out", str(file)]) == 2
    mine = tmp_path / "out" / "checkpoint"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("mine")
    assert demo.main(["--out", str(tmp_path / "out")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert str(file) in first
    assert "something else than a jaxq checkpoint" in second
    assert [f.name for f in mine.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of a short run of two methods, twice into the same place, and what it printed."""
    pytest.importorskip("matplotlib")
    import contextlib
    import io

    out, printed = tmp_path_factory.mktemp("demo") / "new" / "folder", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(demo, "METHODS", {name: demo.METHODS[name] for name in ("RTN", "fp8")})
        for _ in range(2):
            printed.truncate(0)
            assert demo.main(["--out", str(out), "--bits", "3", *FEW]) == 0
    return out, printed.getvalue().lstrip("\0")


@pytest.mark.slow
def test_results_are_in_every_file(short):
    out, printed = short
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    facts = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in rows] == ["unquantized", "RTN", "fp8"]
    for row, line in zip(rows, facts["results"], strict=True):
        assert set(row) == set(line)
        numbers = {key: value for key, value in line.items() if isinstance(value, float)}
        assert numbers == {key: float(row[key]) for key in numbers}
        text = f"{line['perplexity']:.2f} ±{line['perplexity_stderr']:.2f}"
        assert text in printed
        assert text in (out / "results.md").read_text()
    assert facts["windows"] == 3
    assert facts["calibration"]["source"] == "calibration.txt"
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_results_fit_together(short):
    plain, rtn, fp8 = json.loads((short[0] / "results.json").read_text())["results"]
    assert plain["bits_per_weight"] == 16
    assert plain["kl"] is plain["seconds"] is None
    # Scale and zero point of a group of 128, and the padding of small matrices' zero points.
    assert 3 + (16 + 3) / 128 <= rtn["bits_per_weight"] < 3.16
    assert 8 < fp8["bits_per_weight"] < 8.25
    assert rtn["megabytes"] < fp8["megabytes"] < plain["megabytes"]
    for line in (rtn, fp8):
        difference = line["perplexity"] - plain["perplexity"]
        assert math.isclose(line["increase"], difference, rel_tol=1e-6, abs_tol=1e-6)
        assert 0 < line["top1_agreement"] <= 1
        assert line["seconds"] > 0
    assert rtn["kl"] > 2 * fp8["kl"] > 0


@pytest.mark.slow
def test_the_checkpoint_is_the_model_that_was_measured(short):
    out, printed = short
    manifest = read_manifest(out / "checkpoint")
    assert manifest.parts
    _, params = load(out / "checkpoint")
    leaves = [leaf for _, leaf in tree.leaves(params)]
    quantized = [leaf for leaf in leaves if isinstance(leaf, QTensor)]
    line = json.loads((out / "results.json").read_text())["results"][1]
    np.testing.assert_allclose(sum(leaf.nbytes for leaf in leaves) / 1e6, line["megabytes"])
    assert {w.spec.dtype for w in quantized} == {"int3"}
    assert "RTN, int3 g128, saved as" in printed
    assert demo.Options().prompt in printed
