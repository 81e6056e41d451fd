"""Fixtures of the command line's tests."""

import dataclasses

import pytest

from jq.cli import main
from tests.cli import folders


@dataclasses.dataclass(frozen=True)
class Done:
    """What a call left: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line of a refusal."""
        assert self.code == 2, self
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("jaxq: error: ")
        return line.removeprefix("jaxq: error: ")


@pytest.fixture
def call(capsys):
    """Run the command line in this process."""

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model of two layers."""
    return folders.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file."""
    return folders.write_text(tmp_path_factory.mktemp("texts") / "words.txt")


@pytest.fixture(scope="session")
def int8(tiny, tmp_path_factory):
    """A checkpoint of `tiny`, made by the command line."""
    out = tmp_path_factory.mktemp("checkpoints") / "int8"
    assert main(["quantize", str(tiny), "--out", str(out), "--method", "int8"]) == 0
    return out
