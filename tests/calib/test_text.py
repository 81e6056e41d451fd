"""Texts of files, of `datasets`' formats and, with a stand-in, of the hub."""

import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest

from jq.calib.text import ALIASES, HubDataset, parse_hub_name, read_text
from jq.errors import CalibrationError

ROOT = Path(__file__).parents[2]
ALL = 10**9


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_txt(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfsome t\xc3\xa9xt\r\nmore\n")
    assert read_text(path, max_chars=1) == "some téxt\nmore\n"  # read whole, without the mark


def test_jsonl(tmp_path):
    separator = chr(0x2028)  # a line separator of Unicode, which ends no record
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one\ntwo"}, {"text": f"a{separator}b"}])
    path.write_text(path.read_text().replace("\\u2028", separator) + "\n\n")
    assert read_text(path, max_chars=ALL) == f"one\ntwo\n\na{separator}b"
    named = write_jsonl(tmp_path / "b.jsonl", [{"body": "x", "text": 3}, {"body": "y"}])
    assert read_text(named, field="body", max_chars=ALL) == "x\n\ny"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("[" * 10**5, "line 1 is not JSON"),
        ('{"text": "a"}\n\n{"body": "b", "id": 1}', "line 3: field 'text' is missing.* body, id"),
        ('{"text": 5}', "line 1: field 'text' is a int"),
        ('["text"]', "line 1 is a list"),
        ('{"text": "  "}', "holds no text"),
        ("", "holds no text"),
    ],
    ids=["cut off", "deep", "missing", "number", "list", "blank", "empty"],
)
def test_malformed_jsonl(tmp_path, lines, message):
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    with pytest.raises(CalibrationError, match=message):
        read_text(path, max_chars=ALL)


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_empty_txt(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"a\.txt holds no text"):
        read_text(path, max_chars=ALL)


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"not UTF-8 text \(byte 2\)"):
        read_text(path, max_chars=ALL)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_missing_files(tmp_path, name):
    with pytest.raises(CalibrationError, match=f"{name} does not exist"):
        read_text(tmp_path / name, max_chars=ALL)


def test_folders_and_unknown_kinds(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(CalibrationError, match="is a folder"):
        read_text(tmp_path / "folder.txt", max_chars=ALL)
    (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CalibrationError, match=r"none of the kinds.*\.jsonl, \.npy"):
        read_text(tmp_path / "a.pkl", max_chars=ALL)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets`, which notes how it is called; 100 rows of 10 characters."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))

        def rows():
            for i in range(100):
                fake.read = i + 1
                yield {"text": f"row {i:6d}", "id": i}

        return rows()

    fake: Any = types.ModuleType("datasets")
    fake.load_dataset, fake.calls, fake.read = load_dataset, calls, 0
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_hub_names(hub):
    text = read_text("org/set:conf:validation", max_chars=ALL)
    assert text == "\n\n".join(f"row {i:6d}" for i in range(100))
    assert hub.calls == [
        (("org/set", "conf"), {"data_files": None, "split": "validation", "streaming": True})
    ]


def test_only_as_much_as_needed_is_read(hub):
    assert read_text("org/set", max_chars=41) == "\n\n".join(f"row {i:6d}" for i in range(5))
    assert hub.read == 5


@pytest.mark.parametrize("alias", sorted(ALIASES))
@pytest.mark.parametrize("evaluation", [False, True])
def test_aliases(hub, alias, evaluation):
    read_text(alias, evaluation=evaluation, max_chars=1)
    want = ALIASES[alias][evaluation]
    ((args, kwargs),) = hub.calls
    assert (*args, kwargs["split"]) == (want.name, want.config, want.split)
    assert kwargs["data_files"] == (want.files and {want.split: want.files})
    assert kwargs["streaming"] is True


def test_wikitext2_is_calibrated_on_train_and_evaluated_on_test():
    assert [d.split for d in ALIASES["wikitext2"]] == ["train", "test"]


def test_a_missing_field_of_a_dataset_is_named(hub):
    with pytest.raises(CalibrationError, match=r"org/set .default, train., row 0: .* text, id"):
        read_text("org/set", field="content", max_chars=ALL)


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("a/b", HubDataset("a/b", None, "train")),
        ("a/b:c", HubDataset("a/b", "c", "train")),
        ("a/b::test", HubDataset("a/b", None, "test")),
        ("a/b:c:test", HubDataset("a/b", "c", "test")),
    ],
)
def test_parse_hub_name(source, want):
    assert parse_hub_name(source) == want


@pytest.mark.parametrize("source", ["", ":c", "a:b:c:d"])
def test_no_hub_name(source):
    with pytest.raises(CalibrationError, match="name:config:split"):
        parse_hub_name(source)


def test_every_failure_of_datasets_is_one_error(hub):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nand a long story")

    hub.load_dataset = fail
    with pytest.raises(CalibrationError) as caught:
        read_text("wikitext2", max_chars=ALL)
    assert str(caught.value).startswith("Salesforce/wikitext (wikitext-2-raw-v1, train): ")
    assert "ConnectionError: no route)" in str(caught.value)
    assert "use a local .txt, .jsonl or .npy file" in str(caught.value)


# The real library leaves much to the interpreter's end and warns at its import, so it runs in
# processes of its own.
def run_python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_file_formats_of_datasets(tmp_path):
    rows = [{"text": "one, two", "n": 1}, {"text": "three\nfour", "n": 2}]
    write_jsonl(tmp_path / "a.json", rows)
    (tmp_path / "a.csv").write_text('text,n\n"one, two",1\n"three\nfour",2\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    program = f"""
        import pyarrow, pyarrow.parquet
        from pathlib import Path
        from jq.calib.text import read_text
        from jq.errors import CalibrationError

        folder = Path({str(tmp_path)!r})
        table = pyarrow.Table.from_pylist({rows!r})
        pyarrow.parquet.write_table(table, folder / "a.parquet")
        for name in ("a.json", "a.csv", "a.parquet"):
            text = read_text(folder / name, max_chars=10**9)
            assert text == "one, two\\n\\nthree\\nfour", (name, text)
        try:
            read_text(folder / "broken.parquet", max_chars=10**9)
        except CalibrationError as error:
            print(error)
        """
    done = run_python(program, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "broken.parquet: the file cannot be read" in done.stdout


@pytest.mark.slow
def test_offline_hub_is_one_clear_error(tmp_path):
    program = """
        from jq.calib.text import read_text
        from jq.errors import CalibrationError

        try:
            read_text("wikitext2", max_chars=10)
        except CalibrationError as error:
            print(error)
        """
    done = run_python(program, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Salesforce/wikitext (wikitext-2-raw-v1, train): ")
    assert done.stdout.rstrip().endswith("use a local .txt, .jsonl or .npy file")
    assert done.stdout.count("\n") == 1
