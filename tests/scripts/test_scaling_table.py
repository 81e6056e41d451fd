"""The README's scaling table is what the formulas give."""

from pathlib import Path

from scripts.scaling_table import HEADER, Scaling, rows

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_these_numbers():
    table = [HEADER, *rows(Scaling())]
    assert len(table) == 7
    assert "\n".join(table) in README
