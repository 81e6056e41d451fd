"""What the README says: its programs run, its commands and options exist, its files are there."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from jq.cli import COMMANDS, main
from jq.presets import PRESETS
from jq.spec import QuantSpec, w4a16

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.S | re.M)
COMMAND_LINES = re.findall(r"^    (jaxq .*)$", TEXT, re.M)


def section(title: str) -> str:
    """The text below a heading, up to the next heading of any level."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", TEXT, re.S | re.M)
    assert found, title
    return found.group(1)


@pytest.fixture
def help_of(capsys):
    """The text of `jaxq ARGUMENTS --help`, in one line."""

    def help_of(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments, "--help"]) == 0
        return " ".join(capsys.readouterr().out.split())

    return help_of


def test_programs_are_python():
    assert len(PROGRAMS) == 5
    for program in PROGRAMS:
        ast.parse(program)


@pytest.mark.slow
def test_programs_run(tmp_path, monkeypatch, capsys):
    """One after another, as a reader does."""
    monkeypatch.chdir(tmp_path)
    names = {}
    written = []
    for program in PROGRAMS:
        exec(compile(program, "README.md", "exec"), names)
        written.append(capsys.readouterr().out)
    assert len(written[0]) > 10  # text the model wrote
    assert written[1].count("Estimate(") == 3
    assert (tmp_path / "demo-gptq" / "jaxq.json").is_file()
    assert 0 < float(written[1].split()[-1]) < 1
    assert written[2] == "(64, 16)\n"
    assert (tmp_path / "demo-hf" / "quantize_config.json").is_file()
    assert len(written[4]) > 10


def test_commands_and_their_options_exist(help_of):
    assert {shlex.split(line)[1] for line in COMMAND_LINES} == set(COMMANDS) - {"methods"}
    for line in COMMAND_LINES:
        _, command, *arguments = shlex.split(line)
        method = []
        if "--method" in arguments:
            place = arguments.index("--method")
            method = arguments[place : place + 2]
        known = help_of(command, *method)
        for flag in (a for a in arguments if a.startswith("--")):
            assert re.search(rf"{flag}(?![\w-])", known), line


def test_every_method_is_in_the_table_with_its_options(help_of):
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section("Methods").splitlines()
        if line.startswith("| `") and "what it does" not in line
    ]
    named = [re.findall(r"`([\w-]+)`", row[0]) for row in rows]
    assert [name for names in named for name in names if name in PRESETS] == sorted(
        PRESETS, key=lambda name: [n for names in named for n in names].index(name)
    )
    options = []
    for names, row in zip(named, rows, strict=True):
        if "the same" not in row[-1]:
            options = re.findall(r"`(--[\w-]+)`", row[-1])
        assert options
        for name in names:
            known = help_of("quantize", "--method", name)
            assert not [flag for flag in options if flag not in known], name


def test_formats_are_as_the_table_says():
    fields = re.findall(r"^\| `(\w+)` \|", section("Number formats"), re.M)
    assert set(fields) == set(QuantSpec.__dataclass_fields__)
    assert w4a16().bits_per_weight(4096, 4096) == 4.125
    assert w4a16(symmetric=False).bits_per_weight(4096, 4096) == 4.15625
    assert "4.125" in section("Number formats")


def test_the_tree_names_what_is_there():
    listing = section("Where things are")
    folder, named = ROOT, set()
    for line in re.findall(r"^    ( *)(\S.*?)(?:   +|$)", listing, re.M):
        indent, names = line
        folder = ROOT / "jq" if indent else ROOT
        for name in re.split(r"[ ,]+", names):
            assert (folder / name).exists(), name
            named.add(name.rstrip("/"))
    for module in re.findall(r"\b([\w/]+\.py)\b", listing):
        assert (ROOT / "jq" / module).exists(), module
    top = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._"}
    ignored = {"build", "dist", "out", "demo-output"}
    assert {t for t in top - ignored if not re.search(r"egg-info|^out-", t)} <= named


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).is_file(), target
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXT, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings
    assert (ROOT / "scripts/results/demo-perplexity.png").stat().st_size < 100_000
