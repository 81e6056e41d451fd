"""Several processes, usually one per host, that do one run together.

    jq.distributed.initialize("host0:9911", processes=4, process_id=i)    # before anything else
    jq.quantize_checkpoint(...)                                           # the same on every one

`jax.distributed` joins them, and programs run over the devices of all. What happens between the
programs, in files and in Python, is kept in step by a `Team`: before the processes go on from a
step they tell each other how it went, and an error of one is raised by all.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jq import errors
from jq.errors import JaxqError, OutputError, ProcessError

# Seconds that processes wait for the others at a step.
STEP_TIMEOUT = 600.0
# Seconds that a process has for stopping by itself when another one failed.
GRACE = 5.0

_PAUSES = (0.001, 0.2)  # between two looks at the others, growing from the first to the second
_teams = itertools.count()
# Marks an error with which a process has left a team, and now leaves the one around it.
_SEEN_OFF = "jaxq_seen_off"


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    heartbeat: int = 100,
) -> None:
    """Join this process with the others, by `jax.distributed.initialize`, before JAX is used.

    Does nothing where that has been called. Signals stay with the program: SIGTERM stops it, where
    JAX alone would take it for the notice of a preemption.

    Args:
      coordinator: "host:port" of process 0. Without the three, and without some of them where JAX
        can tell, the cluster's own settings are read (Slurm, Open MPI, Kubernetes, TPU pods).
      processes: how many there are.
      process_id: this one's, from 0.
      timeout: seconds until all must be there; JAX ends those that have come when some have not.
      heartbeat: seconds after which one that is no longer heard of counts as dead; JAX then ends
        the others.
    Raises: ProcessError when nothing answers at the coordinator's address, when the cluster does
      not tell what was not given, and when JAX was used before.
    """
    if jax.distributed.is_initialized():
        return
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise ProcessError(f"process_id {process_id} of {processes} processes: 0 is the first")
    if coordinator is not None and process_id != 0:
        _reach(coordinator, timeout)
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=120,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ProcessError(
            f"the processes cannot be joined ({reason}): give the coordinator's host:port, the "
            "number of processes and each one's id, and start this before anything uses JAX"
        ) from error


def _reach(coordinator: str, timeout: float) -> None:
    """Wait until something listens there: JAX would end the process if nothing ever does."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ProcessError(f"coordinator {coordinator!r} is no host:port, such as host0:9911")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"coordinator {coordinator} did not answer within {timeout:g} seconds "
                    f"({error.strerror or error}): is process 0 running, and the address right?"
                ) from error
        time.sleep(_PAUSES[1])


def all_devices(axis: str = "data") -> Mesh:
    """The devices of all processes in a row, those of each side by side.

    Raises ProcessError when the processes do not have equally many.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        raise ProcessError(
            f"the processes have {', '.join(map(str, counts.values()))} devices: give all of them "
            "equally many"
        )
    return Mesh(np.array(devices), (axis,), axis_types=(AxisType.Auto,))


@runtime_checkable
class Store(Protocol):
    """What a `Team` needs of the coordination service: strings by name."""

    def key_value_set(self, key: str, value: str) -> None: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...
    def key_value_delete(self, key: str) -> None: ...


class Team:
    """The processes of a program at one piece of work.

        with Team() as team:
            team.attempt("the weights are read", read)      # everywhere; all raise if one fails
            team.lead("the folder is made", make)           # in process 0 alone
            sizes = team.exchange("sizes", local_size)      # everybody's, in order

    All processes take the same steps in the same order. When one leaves by an exception the others
    raise too: `attempt`, `lead` and `exchange` at once, with the same type where it is one of
    `jq.errors`, and `ProcessError` else. A process that hangs in a program or a barrier, waiting
    for the one that failed, cannot be woken: after `GRACE` seconds it says so on stderr and exits
    with code 2 (with the journal and the writers as they are after a kill, which is what they are
    made for).

    In a program of one process nothing is exchanged, and errors are raised as they are.

    Args:
      timeout: seconds to wait for the others at a step.
      store, index, count: of the coordination service, this process and all; JAX's by default.
    """

    def __init__(
        self,
        timeout: float = STEP_TIMEOUT,
        *,
        store: Store | None = None,
        index: int | None = None,
        count: int | None = None,
    ) -> None:
        self.index = jax.process_index() if index is None else index
        self.count = jax.process_count() if count is None else count
        self.timeout = timeout
        self._store = _service() if store is None and self.count > 1 else store
        # Processes make their teams in the same order.
        self._name = f"jaxq/{next(_teams)}" if store is None and self.count > 1 else "jaxq"
        self._steps = 0
        self._left = threading.Event()

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which does what is done once."""
        return self.index == 0

    def __enter__(self) -> Team:
        if self.count > 1:
            threading.Thread(target=self._watch, name="jaxq-team", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._left.set()
        if self.count > 1 and error is not None and _SEEN_OFF not in vars(error):
            self._tell(error)
            # A program breaks off in all processes when one of them is gone: who was first?
            broken = isinstance(error, jax.errors.JaxRuntimeError)
            cause = self.failure(wait=1.0) or _broken(self.count, error) if broken else None
            self._see_off()
            vars(cause or error)[_SEEN_OFF] = True
            if cause is not None:
                raise cause from error

    def attempt(self, step: str, function: Callable[[], Any]) -> list[Any]:
        """Do something in every process, and go on together or not at all.

        Args:
          step: what it is, for the messages.
          function: returns a JSON value.
        Returns: the values of all processes, in order.
        Raises: what `function` raises, unless another process had failed before: then what it
          raised there; ProcessError when another process does not come in time, or is at another
          step.
        """
        if self.count == 1:
            return [function()]
        try:
            value = function()
        except BaseException as error:
            # Where another one has failed before, this may be what it took along: a folder, say.
            cause = self.failure() if isinstance(error, JaxqError | OSError) else None
            self._tell(cause or error)
            if cause is not None:
                raise cause from error
            raise
        return self._meet(step, value)

    def exchange(self, step: str, value: Any = None) -> list[Any]:
        """The JSON values of all processes, in order; see `attempt`."""
        return self.attempt(step, lambda: value)

    def lead(self, step: str, function: Callable[[], Any]) -> Any:
        """Do something in process 0: its JSON value, in every process; see `attempt`."""
        return self.attempt(step, function if self.leads else lambda: None)[0]

    def agree(self, step: str, value: Any) -> Any:
        """A JSON value that has to be the same everywhere; ProcessError, with both, if not."""
        values = self.exchange(step, value)
        for index, other in enumerate(values):
            if other != values[0]:
                raise ProcessError(
                    f"{step}: {values[0]!r} in process 0 and {other!r} in process {index}: all "
                    "processes must be started alike"
                )
        return value

    def check_seen(self, folder: Path, target: Path) -> None:
        """Raise OutputError where a folder that process 0 has made for `target` is not seen."""
        if not folder.is_dir():
            raise OutputError(
                f"{target}: what process 0 makes there is not seen in process {self.index}: "
                "all processes must write to one file system"
            )

    def _meet(self, step: str, value: Any) -> list[Any]:
        assert self._store is not None
        number, self._steps = self._steps, self._steps + 1
        folder = f"{self._name}/step{number}/"
        self._store.key_value_set(f"{folder}{self.index}", json.dumps([step, value]))
        deadline, pause = time.monotonic() + self.timeout, _PAUSES[0]
        while len(found := self._read(folder)) < self.count:
            if (failure := self.failure()) is not None:
                raise failure
            if time.monotonic() > deadline:
                missing = ", ".join(str(i) for i in range(self.count) if i not in found)
                raise ProcessError(
                    f"{step}: process {missing} of {self.count} did not come within "
                    f"{self.timeout:g} seconds: see its output"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, _PAUSES[1])
        for index in range(self.count):
            other, _ = found[index]
            if other != step:
                raise ProcessError(
                    f"process {self.index} is at {step!r} and process {index} at {other!r}: all "
                    "processes must be started alike"
                )
        if self.leads and number:  # everybody has read what came before
            self._store.key_value_delete(f"{self._name}/step{number - 1}/")
        return [found[index][1] for index in range(self.count)]

    def _read(self, folder: str) -> dict[int, Any]:
        assert self._store is not None
        entries = self._store.key_value_dir_get(folder)
        return {int(key.rpartition("/")[2]): json.loads(text) for key, text in entries}

    def _tell(self, error: BaseException) -> None:
        """Let the others know of an error; the first one counts."""
        assert self._store is not None
        text = str(error) or type(error).__name__
        node = [type(error).__name__, text.partition("\n")[0], socket.gethostname()]
        with contextlib.suppress(Exception):  # was told before, or nobody is there to be told
            self._store.key_value_set(f"{self._name}/failed/{self.index}", json.dumps(node))

    def failure(self, wait: float = 0.0) -> JaxqError | None:
        """What another process has failed with, as the error to raise for it; None if none has.

        wait: seconds to give it for saying so.
        """
        deadline = time.monotonic() + wait
        while True:
            try:
                failed = self._read(f"{self._name}/failed/")
            except Exception:  # the coordinator is gone
                return None
            failed.pop(self.index, None)
            if failed:
                return _error_of(failed, self.count)
            if time.monotonic() >= deadline:
                return None
            time.sleep(_PAUSES[1])

    def _see_off(self) -> None:
        """Wait a little until the others have stopped too, or say why they will."""
        deadline = time.monotonic() + 3 * GRACE
        with contextlib.suppress(Exception):
            while len(self._read(f"{self._name}/failed/")) < self.count:
                if time.monotonic() > deadline:
                    return
                time.sleep(_PAUSES[1])

    def _watch(self) -> None:
        """In a thread: end a process that hangs where another has failed."""
        while not self._left.wait(1.0):
            failure = self.failure()
            if failure is None:
                continue
            if not self._left.wait(GRACE):
                text = f"jaxq: error: {failure}; this process was waiting for it"
                print(text, file=sys.__stderr__, flush=True)
                self._tell(failure)
                self._see_off()
                leave(2)


def _service() -> Store:
    # The one name of JAX's that is not public; Orbax uses the same one.
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise ProcessError(
            "this program has several processes, and jax.distributed was not initialized: call "
            "jq.distributed.initialize first"
        )
    return client  # pyright: ignore[reportReturnType]


def _error_of(failed: dict[int, Any], count: int) -> JaxqError:
    """The error to raise for those of other processes: the first that is not a consequence."""
    names = {index: node[0] for index, node in failed.items()}
    first = min(failed, key=lambda index: (names[index] == "ProcessError", index))
    name, text, host = failed[first]
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, JaxqError)):
        kind, text = ProcessError, f"{name}: {text}" if text != name else name
    return kind(f"process {first} of {count} ({host}) stopped: {text}")


def _broken(count: int, error: BaseException) -> JaxqError | None:
    """What became of a program over several processes, where nobody has said why."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return None
    reason = str(error).partition("\n")[0]
    return ProcessError(
        f"a program of {count} processes broke off ({reason}): one of them is gone; see their "
        "output, and start all again to go on"
    )


def leave(code: int) -> NoReturn:
    """End this process after an error that the others know of.

    An ordinary end would wait for the others, whom JAX then ends with messages of its own.
    """
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()
    if jax.process_index() == 0:
        time.sleep(1.0)  # it takes the coordination service along
    os._exit(code)
