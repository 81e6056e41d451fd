"""The library's dataclasses as options."""

import dataclasses
from typing import Annotated, Literal

import pytest
import tyro

from jq.calib.config import CalibrationConfig
from jq.cli.options import (
    field_help,
    options_class,
    parse,
    peek,
    rebuild,
    split_counts,
    split_names,
)
from jq.errors import SpecError
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.presets import PRESETS


def test_lists_of_counts_and_names_are_split_in_one_place():
    assert split_counts(" 1,8, 1,32,", "--sizes") == (1, 8, 32)
    assert split_names(["a, b", "b,c", ""]) == ("a", "b", "c")
    for wrong in ("1;8", "0", "", "-1", "1.5"):
        with pytest.raises(SpecError, match=rf"--sizes '{wrong}': give numbers of 1 or more"):
            split_counts(wrong, "--sizes")


@pytest.mark.parametrize("kind", [RTN, GPTQ, AWQ, SmoothQuant, CalibrationConfig])
def test_every_option_has_help(kind):
    texts = field_help(kind)
    assert set(texts) == {field.name for field in dataclasses.fields(kind)}
    assert all(len(text) > 10 for text in texts.values()), texts


@dataclasses.dataclass(frozen=True)
class Example:
    """About: it.

    one, two: a number,
      of sorts.
    three: another.

    Nothing about three: or one.
    """

    one: int = 1
    two: int = 2
    three: int = 3


def test_help_is_read_from_the_docstring():
    same = "a number, of sorts."
    assert field_help(Example) == {"one": same, "two": same, "three": "another."}


@pytest.mark.parametrize("name", PRESETS)
def test_no_options_give_the_presets_method(name):
    method = PRESETS[name].method
    options = options_class(method)
    assert rebuild(method, parse(options, "x", "", [])) == method


def test_options_reach_nested_dataclasses():
    method = AWQ(rounding=GPTQ(desc_act=True))
    arguments = ["--n-grid", "7", "--no-duo-scaling", "--damp-percent", "0.2", "--clip", "mse"]
    got = rebuild(method, parse(options_class(method), "x", "", arguments))
    rounding = GPTQ(desc_act=True, damp_percent=0.2, clip="mse")
    assert got == AWQ(n_grid=7, duo_scaling=False, rounding=rounding)


def test_unions_are_read():
    options = options_class(SmoothQuant())
    assert rebuild(SmoothQuant(), parse(options, "x", "", ["--alpha", "auto"])).alpha == "auto"
    assert rebuild(SmoothQuant(), parse(options, "x", "", ["--alpha", "0.3"])).alpha == 0.3


@dataclasses.dataclass(frozen=True)
class Sparse:
    """Options that need not be given.

    size: one number.
    kind: one of two.
    """

    size: int | None = None
    kind: Literal["a", "b"] | None = None
    named: Annotated[str | None, tyro.conf.arg(metavar="FILE|NAME", help="a text")] = None


@dataclasses.dataclass(frozen=True)
class Nested:
    """More of them."""

    sparse: Sparse = Sparse()


def test_help_does_not_speak_of_none(capsys):
    for _ in range(2):
        with pytest.raises(SystemExit):
            parse(Nested, "x", "", ["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "None" not in text
        for said in ("--size INT", "--kind {a,b}", "--named FILE|NAME", "a text"):
            assert said in text
    assert parse(Nested, "x", "", ["--size", "3"]) == Nested(Sparse(size=3))
    assert parse(Nested, "x", "", ["--kind", "b"]) == Nested(Sparse(kind="b"))


def test_the_classes_own_checks_run():
    options = parse(options_class(RTN()), "x", "", [])
    assert rebuild(RTN(), options) == RTN()
    wrong = parse(options_class(GPTQ()), "x", "", ["--damp-percent", "3"])
    with pytest.raises(SpecError, match=r"damp_percent 3\.0"):
        rebuild(GPTQ(), wrong)


def test_peek_finds_both_spellings():
    assert peek(["a", "--method", "x"], "--method") == "x"
    assert peek(["--method=x=y"], "--method") == "x=y"
    assert peek(["--methods", "x"], "--method") is None
    assert peek(["--method"], "--method") is None
