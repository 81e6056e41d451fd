"""The table of what large models need: the committed numbers are what the formulas say."""

import csv
from pathlib import Path

from scripts.requirements_table import COLUMNS, Options, main, markdown, row, table

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_table_is_up_to_date(tmp_path, capsys):
    main(Options(csv=tmp_path / "requirements.csv"))
    committed = ROOT / "scripts" / "results" / "requirements.csv"
    assert (tmp_path / "requirements.csv").read_bytes() == committed.read_bytes()
    header, *lines = csv.reader(committed.read_text().splitlines())
    assert tuple(header) == COLUMNS
    assert len(lines) == 15
    printed = capsys.readouterr().out.splitlines()
    shown = [line for line in printed if line.startswith("| llama") and "awq | device" not in line]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(shown) == 12
    assert all(line in readme for line in shown)


def test_offloading_is_for_methods_that_calibrate():
    rows = table(Options(models=("llama-3-8b",), methods=("int8", "gptq")))
    assert [(r["method"], r["offload"]) for r in rows] == [
        ("int8", False),
        ("gptq", False),
        ("gptq", True),
    ]
    assert markdown(rows).count("\n") == 5


def test_depth_takes_time_and_disk_only():
    small, large = (row(f"llama-3.1-{n}", "gptq", (8, 512), offload=True) for n in ("8b", "70b"))
    assert all(large[key] > small[key] for key in COLUMNS[3:])
