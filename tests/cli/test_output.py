"""Tables, JSON and numbers for people."""

import json
import math
import re

import pytest

from jq.cli.output import print_facts, print_json, print_table, size_text, time_text
from jq.cli.progress import Meter


def test_plain_tables_are_columns_and_spaces(capsys):
    print_table(("name", "bytes"), [("a", "10"), ("layer", "9")], "lr")
    assert capsys.readouterr().out.splitlines() == ["name   bytes", "a         10", "layer      9"]


def test_a_terminal_gets_the_same_cells(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table(("name", "bytes"), [("[red]a", "10")], "lr")
    plain = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert plain.split() == ["name", "bytes", "[red]a", "10"]


def test_facts_are_aligned(capsys):
    print_facts([("a", "1"), ("long", "2")])
    assert capsys.readouterr().out == "a     1\nlong  2\n"


def test_json_has_no_nan(capsys):
    print_json({"a": math.nan, "b": [math.inf, 1.5], "c": (None, "é")})
    out = capsys.readouterr().out
    assert "é" in out
    assert json.loads(out) == {"a": None, "b": [None, 1.5], "c": [None, "é"]}


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (3.24e6, "3.2 MB"), (2e13, "20.0 TB")]
)
def test_sizes(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (62, "1:02"), (3723, "1:02:03")])
def test_times(seconds, text):
    assert time_text(seconds) == text


def test_lines_keep_their_distance(capsys):
    with Meter("eval", every=1000.0) as meter:
        for done in range(1, 6):
            meter.show(done, 5)
    assert capsys.readouterr().err == "eval 5/5  elapsed 0:00, left 0:00\n"


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Meter("quantize") as meter:
        meter.show(1, 4, "layers_0 [qkv]")
        assert meter._bar.tasks[0].completed == 1
        assert meter._bar.tasks[0].total == 4
        assert meter._bar.tasks[0].fields["text"].startswith("layers_0 [qkv]")
    capsys.readouterr()
