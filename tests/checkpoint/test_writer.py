"""A checkpoint appears complete or not at all, and only where it may."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.checkpoint import CheckpointWriter, files, is_checkpoint, load_params, orbax_io
from jq.errors import CheckpointError, JaxqError, ModelError, OutputError
from tests.checkpoint.trees import SPECS, assert_same, digests, quantized, write

ROOT = Path(__file__).parents[2]
ONES = {"w": np.ones((4, 4), np.float32)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted(path: Path, error: type[BaseException]) -> None:
    """A writer that an exception ends after its first part."""
    with CheckpointWriter(path, overwrite=True) as writer:
        writer.write_part("a", {"w": np.zeros((4, 4), np.float32)})
        raise error


def test_nothing_is_visible_before_the_end(tmp_path):
    path = tmp_path / "q"
    with CheckpointWriter(path) as writer:
        writer.write_part("a", ONES)
        assert not path.exists()
        assert all(name.startswith(".q.") for name in names(tmp_path))
        writer.finish()
        assert is_checkpoint(path)
    assert names(tmp_path) == ["q"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        interrupted(tmp_path / "q", error)
    assert names(tmp_path) == []


def test_finish_must_be_called(tmp_path):
    with (
        pytest.raises(CheckpointError, match="without finish"),
        CheckpointWriter(tmp_path / "q") as writer,
    ):
        writer.write_part("a", ONES)
    assert names(tmp_path) == []


def test_parents_are_made_and_relative_paths_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("deep/er/q"), {"a": ONES})
    assert is_checkpoint(tmp_path / "deep" / "er" / "q")
    monkeypatch.chdir(tmp_path / "deep")
    write(Path("../q"), {"a": ONES})
    for path in ("er/q", "../q", "er/../../deep/er/q"):
        assert_same(load_params(path), {"a": ONES})


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "q").mkdir()
    write(tmp_path / "q", {"a": ONES})
    assert is_checkpoint(tmp_path / "q")


def test_a_link_to_a_folder_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", {"a": ONES})
    assert (tmp_path / "link").is_symlink()
    assert is_checkpoint(tmp_path / "real")


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    path = tmp_path / "q"
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not empty"):
        write(path, {"a": ONES})
    with pytest.raises(OutputError, match="something else than a jaxq checkpoint"):
        write(path, {"a": ONES}, overwrite=True)
    assert (path / "thesis.tex").read_text() == "years of work"
    assert names(tmp_path) == ["q"]


def test_overwriting_is_asked_for(tmp_path):
    path = write(tmp_path / "q", {"a": ONES, "b": ONES})
    before = digests(path)
    with pytest.raises(OutputError, match="not empty"):
        write(path, {"a": ONES})
    with pytest.raises(RuntimeError):
        interrupted(path, RuntimeError)
    assert digests(path) == before
    write(path, {"c": ONES}, overwrite=True)
    assert list(load_params(path)) == ["c"]
    assert names(tmp_path) == ["q"]


def test_something_that_appeared_in_the_meantime_stays(tmp_path):
    path = tmp_path / "q"
    with CheckpointWriter(path) as writer:
        path.mkdir()
        (path / "other").write_text("mine")
        with pytest.raises(OutputError, match="not empty"):
            writer.finish()
        (path / "other").rename(tmp_path / "other")
        writer.finish()
    assert (tmp_path / "other").read_text() == "mine"
    assert is_checkpoint(path)


@pytest.mark.parametrize("kind", ["file", "below a file", "proc"])
def test_places_that_cannot_be_written(tmp_path, kind):
    file = tmp_path / "file"
    file.write_text("x")
    path = {"file": file, "below a file": file / "q", "proc": Path("/proc/jaxq/q")}[kind]
    with pytest.raises(OutputError, match=str(path.parent if kind == "proc" else file)):
        write(path, {"a": ONES})
    assert file.read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        write(tmp_path / "q", {"a": ONES})


def test_a_second_writer_is_refused_at_once(tmp_path):
    path = tmp_path / "q"
    with CheckpointWriter(path) as writer:
        with pytest.raises(OutputError, match=f"process {os.getpid()} is writing there"):
            write(path, {"a": ONES})
        writer.write_part("a", ONES)
        writer.finish()
    assert_same(load_params(path)["a"]["w"], ONES["w"])


def test_what_dead_processes_left_is_removed(tmp_path):
    (tmp_path / ".q.partial-999999").mkdir()
    (tmp_path / ".q.partial-999999" / "params").write_text("half")
    (tmp_path / ".q.lock").write_text("999999")
    for kept in (".q2.partial-999999", ".q.partial-notes", "q.partial-999999"):
        (tmp_path / kept).mkdir()
    write(tmp_path / "q", {"a": ONES})
    assert names(tmp_path) == [".q.partial-notes", ".q2.partial-999999", "q", "q.partial-999999"]


def test_death_between_the_two_renames_of_an_overwrite(tmp_path):
    path = write(tmp_path / "q", {"a": ONES})
    before = digests(path)
    path.rename(tmp_path / ".q.replaced-999999")
    with pytest.raises(RuntimeError):
        interrupted(path, RuntimeError)
    assert digests(path) == before
    shutil.copytree(path, tmp_path / ".q.replaced-999999")  # death after both
    write(path, {"b": ONES}, overwrite=True)
    assert names(tmp_path) == ["q"]


KILLED = """
    import os, signal, sys
    import numpy as np
    from jq.checkpoint import CheckpointWriter, orbax_io
    from jq.checkpoint import files

    where = sys.argv[2]
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if where == "commit":
        files._sync = die
    if where == "publish":
        files.publish = die
    if where == "swap":
        rename = files.Path.rename
        files.Path.rename = lambda self, to: (rename(self, to), die())
    with CheckpointWriter(sys.argv[1], overwrite=True) as writer:
        writer.write_part("a", {"w": np.zeros((4, 4), np.float32)})
        if where == "part":
            die()
        if where == "wait":
            print("ready", flush=True)
            sys.stdin.read()
        writer.finish()
"""


def start(path: Path, where: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), where]
    pipe = subprocess.PIPE
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)


@pytest.mark.parametrize("where", ["part", "commit", "publish", "swap"])
def test_killed(tmp_path, where):
    """The earlier checkpoint is there, or put back by the next writer; leftovers go."""
    path = write(tmp_path / "q", {"a": ONES})
    before = digests(path)
    process = start(path, where)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 3
    if where != "swap":
        assert digests(path) == before
    with pytest.raises(RuntimeError):
        interrupted(path, RuntimeError)
    assert digests(path) == before
    assert names(tmp_path) == ["q"]


def test_a_writer_in_another_process(tmp_path):
    path = tmp_path / "q"
    process = start(path, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    begin = time.monotonic()
    with pytest.raises(OutputError, match=f"process {process.pid} is writing there"):
        write(path, {"a": ONES})
    assert time.monotonic() - begin < 1
    process.kill()
    process.communicate()
    write(path, {"a": ONES})  # the lock died with its owner
    assert names(tmp_path) == ["q"]


def test_no_room(tmp_path, monkeypatch):
    path = write(tmp_path / "q", {"a": ONES})
    before = digests(path)
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    big = {"w": np.zeros(20_000, np.float32)}
    with pytest.raises(OutputError, match=r"120960 bytes are needed and 50000 are free"):
        write(path, {"a": big}, overwrite=True)
    assert digests(path) == before
    assert names(tmp_path) == ["q"]


def test_the_disk_refuses(tmp_path, monkeypatch):
    path = write(tmp_path / "q", {"a": ONES})
    before = digests(path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in [(orbax_io, "save_tree"), (files, "_sync")]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OutputError, match="No space left on device"):
                write(path, {"a": ONES}, overwrite=True)
        assert digests(path) == before
        assert names(tmp_path) == ["q"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, where mounting is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "jaxq-test", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_disk_of_two_megabytes(small_disk, monkeypatch, capfd, foreseen):
    """Full at each write in turn; foreseen or found out by Orbax, with nothing else printed."""
    if not foreseen:
        monkeypatch.setattr(files, "check_room", lambda *_: None)
    path = write(small_disk / "q", {"a": ONES})
    before = digests(path)
    params = {"a": {"w": np.ones(100_000, np.float32)}, "b": {"w": np.ones(100_000, np.float32)}}
    for filler in (0, 1_000_000, 1_400_000, 1_600_000, 2_000_000):
        (small_disk / "filler").write_bytes(b"\1" * filler)
        if filler < 1_200_000:
            write(path, params, overwrite=True)
            assert load_params(path)["b"]["w"].shape == (100_000,)
            before = digests(write(path, {"a": ONES}, overwrite=True))
            continue
        with pytest.raises(OutputError, match=r"no room|No space left"):
            write(path, params, overwrite=True)
        assert digests(path) == before
        assert names(small_disk) == ["filler", "q"]
        if filler == 1_400_000:
            (small_disk / "filler").unlink()
            write(path, params, overwrite=True)  # with room it goes
            before = digests(write(path, {"a": ONES}, overwrite=True))
    assert capfd.readouterr().err == ""


REFUSED = {
    "float": ({"w": 1.0}, "a/w: is a float"),
    "list": ({"w": [np.ones(3)]}, "a/w: is a list"),
    "none": ({"w": None}, "a/w: is a NoneType"),
    "wide": ({"w": np.ones(3)}, "a/w: is float64"),
    "long": ({"w": np.arange(3)}, "a/w: is int64"),
    "int4": ({"w": jnp.ones(4, jnp.int4)}, "a/w: is int4"),
    "complex": ({"w": jnp.ones(2, jnp.complex64)}, "a/w: is complex64"),
    "objects": ({"w": np.array([{}], object)}, "a/w: is object"),
    "text": ({"w": np.array("x")}, "a/w: is str"),
    "structured": ({"w": np.zeros(2, "i4,i4")}, "a/w: is void"),
    "slash": ({"b/c": np.ones(3, np.float32)}, "key 'b/c' under 'a'"),
    "up": ({"b": {"..": np.ones(3, np.float32)}}, r"key '\.\.' under 'a/b'"),
    "space": ({"b c": np.ones(3, np.float32)}, "key 'b c' under 'a'"),
    "number": ({0: np.ones(3, np.float32)}, "key 0 under 'a'"),
    "empty": ({"w": ONES, "b": {}}, "a/b: an empty dict"),
    "twins": ({"b.c": ONES["w"], "b": {"c": ONES["w"]}}, "would share a folder"),
    "long name": ({"b" * 100: {"c" * 100: {"d" * 100: ONES["w"]}}}, "255 bytes"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_leaves_that_cannot_be_stored(tmp_path, kind):
    subtree, words = REFUSED[kind]
    with CheckpointWriter(tmp_path / "q") as writer:
        with pytest.raises(CheckpointError, match=words):
            writer.write_part("a", subtree)
        writer.write_part("a", ONES)  # the writer goes on
        writer.finish()
    assert_same(load_params(tmp_path / "q")["a"]["w"], ONES["w"])


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a", ".hidden", "a b", "a\n"])
def test_part_names_that_are_no_file_names(tmp_path, name):
    with CheckpointWriter(tmp_path / "q") as writer:
        with pytest.raises(CheckpointError, match="under 'the root': keys of a checkpoint"):
            writer.write_part(name, ONES)
        writer.finish()
    assert load_params(tmp_path / "q") == {}


def test_a_qtensor_that_contradicts_its_spec(tmp_path):
    w = quantized(SPECS["int4"])
    lies = {
        "scale is bfloat16": jax.tree.map(lambda x: x, w),
        "codes is uint8": jax.tree.map(lambda x: x, w),
        "needs the arrays": jax.tree.map(lambda x: x, w),
    }
    object.__setattr__(lies["scale is bfloat16"], "scale", w.scale[:2])
    object.__setattr__(lies["codes is uint8"], "codes", w.codes[:, :8])
    object.__setattr__(lies["needs the arrays"], "zero_point", w.codes)
    for words, lie in lies.items():
        with (
            pytest.raises(CheckpointError, match=rf"a/kernel: .*{words}"),
            CheckpointWriter(tmp_path / "q") as writer,
        ):
            writer.write_part("a", {"kernel": lie})


def test_traced_arrays(tmp_path):
    with CheckpointWriter(tmp_path / "q") as writer:
        with pytest.raises(CheckpointError, match="a/w: is traced"):
            jax.jit(lambda w: writer.write_part("a", {"w": w}))(jnp.ones(3))
        writer.finish()


def test_wrong_order_of_calls(tmp_path):
    writer = CheckpointWriter(tmp_path / "q")
    with pytest.raises(CheckpointError, match="not entered"):
        writer.write_part("a", ONES)
    with writer:
        writer.write_part("a", ONES)
        with pytest.raises(CheckpointError, match="'a' was written already"):
            writer.write_part("a", ONES)
        with pytest.raises(CheckpointError, match="meta/seeds/1: a set has no JSON form"):
            writer.finish({"seeds": [1, {2}]})
        with pytest.raises(CheckpointError, match="keys are strings"):
            writer.finish({}, report={"layers": {0: 1}})
        writer.finish()
        with pytest.raises(CheckpointError, match="is finished"):
            writer.write_part("b", ONES)
    with pytest.raises(CheckpointError, match="for one use"), writer:
        pass


def test_files_beside_the_manifest(tmp_path):
    for name in ("jaxq.json", "report.json", "params", "../config.json", "/etc/x", ""):
        with pytest.raises(CheckpointError, match="no name for a file"):
            CheckpointWriter(tmp_path / "q", files={name: b""})
    with pytest.raises(ModelError, match=r"no config\.json"):
        CheckpointWriter(tmp_path / "q", config_files_from=tmp_path)
    assert issubclass(ModelError, JaxqError)
