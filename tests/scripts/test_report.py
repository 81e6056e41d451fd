"""Tables, files and plots that the scripts write."""

import csv
import json
import struct

import numpy as np
import pytest

from scripts import _report
from scripts._report import Column, GrowingTable, Point

COLUMNS = (Column("method", 8, "l"), Column("bits", 5))


def test_plain_rows_come_one_by_one(capsys):
    with GrowingTable(COLUMNS) as table:
        assert capsys.readouterr().out == "method     bits\n"
        table.status("not to be seen")
        table.add(["rtn", "3.1"])
        assert capsys.readouterr().out == "rtn         3.1\n"
    assert capsys.readouterr().out == ""


def test_a_terminal_keeps_every_row_and_no_status(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with GrowingTable(COLUMNS) as table:
        table.add(["rtn", "3.1"])
        table.status("working [on] it")
        table.add(["gptq [x]", "4.2"])
    last = capsys.readouterr().out[-400:]
    assert "rtn" in last
    assert "gptq [x]" in last  # no markup is read into cells
    assert "working" not in last.rpartition("method")[2]


def test_markdown_table_is_aligned():
    text = _report.markdown_table(COLUMNS, [["rtn", "3.1"], ["smoothquant", "8"]])
    assert text.splitlines() == [
        "| method      | bits |",
        "| ----------- | ---: |",
        "| rtn         |  3.1 |",
        "| smoothquant |    8 |",
    ]


def test_files_hold_the_rows(tmp_path):
    rows = [{"name": "a, b", "x": 0.1 + 0.2, "y": None}, {"name": "c", "x": 1.0, "y": 2}]
    _report.write_csv(tmp_path / "t.csv", rows)
    read = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["name"] for row in read] == ["a, b", "c"]
    assert float(read[0]["x"]) == 0.1 + 0.2
    assert read[0]["y"] == ""
    _report.write_json(tmp_path / "t.json", rows)
    assert json.loads((tmp_path / "t.json").read_text()) == rows
    with pytest.raises(ValueError, match="JSON"):
        _report.write_json(tmp_path / "t.json", {"x": float("nan")})


@pytest.mark.parametrize(
    ("heights", "gap", "expected"),
    [
        ([1.0, 2.0, 4.0], 0.5, [1.0, 2.0, 4.0]),  # far enough apart: nothing moves
        ([1.0, 1.0], 1.0, [0.5, 1.5]),
        ([0.0, 0.0, 0.3], 1.0, [-0.9, 0.1, 1.1]),  # together, about their mean
        ([0.0, 5.0, 5.2], 1.0, [0.0, 4.6, 5.6]),
        ([3.0], 1.0, [3.0]),
    ],
)
def test_spread_moves_labels_apart_and_no_further(heights, gap, expected):
    np.testing.assert_allclose(_report.spread(heights, gap), expected, atol=1e-12)


def test_equal_places_are_drawn_side_by_side():
    cluster = [Point("a", 4.0, 1), Point("b", 4.5, 2), Point("c", 4.0, 3)]
    places = _report._side_by_side(cluster)
    assert places[1] == 4.5
    assert places[0] < 4.0 < places[2]
    np.testing.assert_allclose(places[0] * places[2], 16.0)
    assert places[2] / places[0] < 1.02


def test_clusters_are_of_neighbouring_widths():
    points = [Point(str(x), x, y) for x, y in [(4.2, 2), (3.1, 9), (3.3, 8), (8.1, 1), (4.3, 1)]]
    clusters = [[p.x for p in cluster] for cluster in _report._clusters(points)]
    assert clusters == [[3.3, 3.1], [4.3, 4.2], [8.1]]


def test_plot_is_a_picture_of_the_size_that_was_asked_for(tmp_path):
    pytest.importorskip("matplotlib")
    points = [Point("a", 3.1, 9.0, 0.1), Point("b", 4.1, 8.5), Point("a", 4.1, 8.5)]
    files = [tmp_path / "1.png", tmp_path / "2.png"]
    for file in files:
        _report.plot_bits(file, points, line=(8.0, "plain"), title="t", ylabel="y", note="n")
    data = files[0].read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (924, 528)
    assert len(data) < 100_000
    assert data == files[1].read_bytes()
    # Equal heights and a single one leave no span to scale by.
    _report.plot_bits(files[0], points[1:2], line=(8.5, "plain"), title="t", ylabel="y")
