"""A team of processes: what all tell each other, and what becomes of errors; threads stand in."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import pytest

from jq import distributed
from jq.distributed import Team
from jq.errors import CheckpointError, NonFiniteError, OutputError, ProcessError


class Dictionary:
    """The coordination service in memory."""

    def __init__(self):
        self.entries, self.lock = {}, threading.Lock()

    def key_value_set(self, key, value):
        with self.lock:
            assert key not in self.entries, key
            self.entries[key] = value

    def key_value_dir_get(self, key):
        with self.lock:
            return [(k, v) for k, v in self.entries.items() if k.startswith(key)]

    def key_value_delete(self, key):
        with self.lock:
            for name in [name for name in self.entries if name.startswith(key)]:
                del self.entries[name]


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(distributed, "GRACE", 0.3)
    monkeypatch.setattr(distributed, "leave", lambda code: pytest.fail("a process was ended"))


def together(count, program, timeout=20.0):
    """Results, or the exceptions, of `program(team)` in so many threads."""
    store = Dictionary()

    def run(index):
        try:
            with Team(timeout, store=store, index=index, count=count) as team:
                return program(team)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count))), store


def test_values_come_in_order_and_old_ones_are_forgotten():
    def program(team):
        first = team.exchange("first", {"index": team.index})
        return first, [team.exchange("more", i) for i in range(20)][-1]

    results, store = together(3, program)
    wanted = [{"index": 0}, {"index": 1}, {"index": 2}]
    assert results == [(wanted, [19] * 3)] * 3
    assert {key.split("/")[1] for key in store.entries} == {"step20"}


def test_the_first_process_leads():
    did = []

    def program(team):
        return team.lead("make", lambda: did.append(team.index) or "made")

    assert together(3, program)[0] == ["made"] * 3
    assert did == [0]


def test_one_process_needs_no_service():
    with Team(index=0, count=1) as team:
        assert team.exchange("a", object) == [object]
        assert team.lead("b", lambda: 2) == 2
        with pytest.raises(OutputError, match="full"):
            team.attempt("c", fail(OutputError("full")))


def fail(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize("who", [0, 2])
def test_an_error_of_one_is_raised_by_all(who):
    def program(team):
        full = fail(OutputError("no room\nat all"))
        team.attempt("write", full if team.index == who else lambda: None)

    results, _ = together(3, program)
    assert [type(r) for r in results] == [OutputError] * 3
    for index, error in enumerate(results):
        own = index == who
        assert ("stopped: no room" in str(error)) != own
        assert own or f"process {who} of 3" in str(error)


def test_errors_that_are_not_ours_are_named():
    def program(team):
        team.attempt("read", fail(MemoryError()) if team.index == 1 else lambda: None)

    results, _ = together(2, program)
    assert type(results[0]) is ProcessError
    assert "process 1 of 2" in str(results[0])
    assert str(results[0]).endswith("stopped: MemoryError")
    assert type(results[1]) is MemoryError


def test_an_error_between_the_steps_is_heard_at_the_next():
    def program(team):
        if team.index == 0:
            raise NonFiniteError("layers_3: NaN")
        team.exchange("on")

    results, _ = together(2, program)
    assert [type(r) for r in results] == [NonFiniteError] * 2
    assert "layers_3: NaN" in str(results[1])


def test_an_error_after_that_of_another_is_taken_for_its_consequence():
    """Process 0 fails and takes its folder along; where that is missed, 0's error is told."""
    failed = threading.Event()

    def program(team):
        def fail():
            raise CheckpointError("a: is no array")

        def miss():
            failed.wait(10)
            raise OutputError("the folder is gone")

        try:
            team.attempt("written", miss if team.index else fail)
        finally:
            failed.set()

    results, _ = together(3, program)
    assert str(results[0]) == "a: is no array"
    for result in results[1:]:
        assert isinstance(result, CheckpointError)
        assert "process 0 of 3" in str(result)
        assert "a: is no array" in str(result)
        assert isinstance(result.__cause__, OutputError)


def test_what_follows_from_an_error_is_not_told_as_its_cause():
    """Process 1 waits in vain for a program of process 0, whose own error is the cause."""

    def program(team):
        if team.index == 0:
            raise CheckpointError("bad")
        raise jax.errors.JaxRuntimeError("connection closed by peer")

    results, _ = together(2, program)
    assert [type(r) for r in results] == [CheckpointError] * 2
    assert "process 0 of 2" in str(results[1])


def test_a_program_that_breaks_off_says_so():
    results, _ = together(2, lambda team: fail(jax.errors.JaxRuntimeError("peer is gone"))())
    # Each has heard of the other's, which says no more.
    assert [type(r) for r in results] == [ProcessError] * 2
    assert all("peer is gone" in str(r) for r in results)


def test_a_process_that_does_not_come_is_named():
    def program(team):
        if team.index == 1:
            time.sleep(0.5)
        else:
            team.exchange("the block is written")

    results, _ = together(3, program, timeout=0.2)
    assert type(results[0]) is ProcessError
    assert "the block is written: process 1 of 3 did not come within 0.2 seconds" in str(results[0])


def test_processes_at_different_steps_are_refused():
    results, _ = together(2, lambda team: team.exchange(f"block {team.index}"))
    assert [type(r) for r in results] == [ProcessError] * 2
    assert "process 1 is at 'block 1' and process 0 at 'block 0'" in str(results[1])


def test_values_that_have_to_agree():
    results, _ = together(2, lambda team: team.agree("seed", 7))
    assert results == [7, 7]
    results, _ = together(2, lambda team: team.agree("seed", team.index))
    assert "seed: 0 in process 0 and 1 in process 1" in str(results[0])


def test_a_folder_that_only_process_0_sees(tmp_path):
    team = Team(index=1, count=1)
    team.check_seen(tmp_path, tmp_path / "out")
    with pytest.raises(OutputError, match=r"out: what process 0 makes .* not seen in process 1"):
        team.check_seen(tmp_path / "elsewhere", tmp_path / "out")


def test_a_process_that_hangs_is_ended(monkeypatch, capfd):
    waiting, codes = threading.Event(), []

    def program(team):
        if team.index == 0:
            raise OutputError("no room")
        waiting.wait(10.0)

    def leave(code):
        codes.append(code)
        waiting.set()

    monkeypatch.setattr(distributed, "leave", leave)
    together(2, program)
    assert codes == [2]
    said = capfd.readouterr().err
    assert "process 0 of 2" in said
    assert "no room; this process was waiting for it" in said


def test_the_devices_of_all(monkeypatch):
    assert distributed.all_devices("a").shape == {"a": jax.device_count()}
    some = [SimpleNamespace(process_index=p, id=i) for i, p in enumerate([1, 0, 1])]
    monkeypatch.setattr(jax, "devices", lambda: some)
    with pytest.raises(ProcessError, match="have 1, 2 devices"):
        distributed.all_devices()


@pytest.mark.parametrize(
    ("coordinator", "words"),
    [
        ("127.0.0.1:1", "127.0.0.1:1 did not answer within 0 seconds"),
        ("host0", "'host0' is no host:port"),
        ("host0:http", "'host0:http' is no host:port"),
    ],
)
def test_a_coordinator_that_is_not_there(coordinator, words):
    with pytest.raises(ProcessError, match=words):
        distributed.initialize(coordinator, 2, 1, timeout=0)


@pytest.mark.parametrize("process_id", [-1, 2])
def test_an_id_beyond_the_processes_is_refused(process_id):
    with pytest.raises(ProcessError, match=f"process_id {process_id} of 2"):
        distributed.initialize("127.0.0.1:1", 2, process_id)
