"""The journal of a run: finished blocks on disk, so that a run that was stopped can go on.

It stands beside the output folder, in the hidden folder `.<name>.journal`:

    run.json             what the run was made of; another run does not go on from here
    blocks/<block>/      a finished block, as a part of a checkpoint
    streams/<block>/     the hidden states that it leaves to the next one; only the last is kept
    done/<block>.json    digests of both and the block's report, written when both are on the disk

A block is finished when its file in `done` is there, which is renamed into place as a whole.

Several processes keep one journal: blocks and hidden states are written by all, each what it holds,
and each reads only its own hidden states again. Everything else, and the lock, is process 0's.

Hidden states are a part of a checkpoint, streams/<block>/0/; but what several processes have in
host memory are files streams/<block>/0, 1, ..., of one process each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jq.calib.driver import QuantizedBlock
from jq.calib.report import BlockReport, LinearReport
from jq.checkpoint import files as fs
from jq.checkpoint.format import PartEntry
from jq.checkpoint.manifest import encode_json, parse_part, part_json
from jq.checkpoint.part_writer import save_part
from jq.checkpoint.raw_file import read_array, write_array
from jq.checkpoint.reader import part_tree, read_part
from jq.cuts import CutRule
from jq.distributed import Team
from jq.errors import CheckpointError, JaxqError, OutputError, ProcessError
from jq.interrupts import held_back

_RUN = "run.json"
_BLOCKS, _STREAMS, _DONE = "blocks", "streams", "done"
_HIDDEN = "hidden/x"  # what hidden states are called in their part


def journal_folder(target: str | os.PathLike[str]) -> Path:
    """Where the journal of a run to `target` stands, if there is one."""
    path = Path(os.path.realpath(target))
    return path.with_name(f".{path.name}.journal")


@dataclasses.dataclass(frozen=True)
class _Done:
    """A finished block: its part, those of the hidden states it left, its report.

    streams: one part, or one of each process, or none.
    """

    part: PartEntry
    streams: tuple[PartEntry, ...]
    report: BlockReport


class Journal:
    """Where a run keeps its finished blocks.

        with Journal(out, facts, model.block_names) as journal:
            for block in quantize_blocks(..., done=len(journal.done), hidden=journal.hidden()):
                journal.commit(block)
            ...                                   # make the output of journal.part(name)
            journal.remove()

    Left by an exception it stays, if any block is finished and the same run could come further
    another time: what a signal, a full disk or a lack of memory stopped. Errors in what the user
    gave would come again, and leave nothing.

    Args:
      target: the output folder of the run.
      facts: everything that decides about the output, as JSON values.
      block_names: of the model, in order.
      restart: forget an unfinished run.
      team: the processes that do the run together; this one alone by default.
      cuts: the output's (see `CheckpointWriter`), which takes the blocks over as they are.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        facts: Mapping[str, Any],
        block_names: Sequence[str],
        *,
        restart: bool = False,
        team: Team | None = None,
        cuts: CutRule | None = None,
    ) -> None:
        self._team, self._cuts = team or Team(index=0, count=1), cuts
        self.target = Path(os.path.realpath(target))
        self.folder = journal_folder(target)
        self._facts, self._names, self._restart = facts, tuple(block_names), restart
        self._done: dict[str, _Done] = {}
        self._scope = contextlib.ExitStack()

    def __enter__(self) -> Journal:
        """Take the journal's lock, and take over what an equal run has finished.

        Raises: OutputError when another program is at it, when the disk refuses, when an unfinished
        run of other facts is there, and when processes do not see one file system; CheckpointError
        when the journal is damaged; ProcessError when the processes have different facts.
        """
        self._check_alike()
        with self._scope as scope:
            names = self._team.lead("the journal is open", lambda: self._begin(scope))
            self._team.attempt("the journal is read", lambda: self._read_done(names))
            self._scope = scope.pop_all()
        return self

    def _begin(self, scope: contextlib.ExitStack) -> list[str]:
        """In process 0: the lock, and a journal of these facts; the names of finished blocks."""
        with fs.output_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        scope.enter_context(fs.locked(self.folder, self.target))
        if self._restart:
            self.remove()
        self._open()
        done = itertools.takewhile(lambda name: self._done_file(name).is_file(), self._names)
        return list(done)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        hopeless = isinstance(error, JaxqError)
        hopeless = hopeless and not isinstance(error, (OutputError, ProcessError))
        if hopeless or not self._done:
            self.remove()
        self._scope.close()

    @property
    def done(self) -> tuple[str, ...]:
        """Names of the finished blocks, in order."""
        return tuple(self._done)

    @property
    def reports(self) -> tuple[BlockReport, ...]:
        """Reports of the finished blocks."""
        return tuple(entry.report for entry in self._done.values())

    def commit(self, block: QuantizedBlock) -> None:
        """Write a block and what it leaves to the next; signals wait until it is finished."""
        before = self.done[-1:]
        with held_back():
            folder = self.folder / _BLOCKS / block.name
            part = save_part(folder, block.name, block.params, self._team, self._cuts)
            streams = () if block.hidden is None else self._save_hidden(block.name, block.hidden)
            node = {
                "part": part_json(part),
                "streams": [part_json(stream) for stream in streams],
                "report": block.report.to_dict(),
            }
            file = self._done_file(block.name)
            self._team.lead(
                f"{block.name} is finished",
                lambda: fs.write_synced(file, encode_json(node, file.name)),
            )
            self._done[block.name] = _Done(part, streams, block.report)
            for name in before if self._team.leads else ():
                shutil.rmtree(self.folder / _STREAMS / name, ignore_errors=True)

    def _save_hidden(self, name: str, hidden: jax.Array | np.ndarray) -> tuple[PartEntry, ...]:
        """Write what a block leaves: in one part, or what is in host memory in one per process."""
        folder = self.folder / _STREAMS / name

        def make() -> None:
            with fs.output_errors(folder):
                folder.mkdir(exist_ok=True)

        def write() -> dict[str, Any]:
            entry = write_array(folder / str(self._team.index), np.asarray(hidden))
            return part_json(PartEntry({_HIDDEN: entry}, {}))

        self._team.lead("the hidden states have a folder", make)
        if self._team.count == 1 or not isinstance(hidden, np.ndarray):
            return (save_part(folder / "0", "hidden", {"x": hidden}, self._team),)
        told = self._team.attempt(f"the hidden states of {name} are written", write)
        self._team.lead("they have names", lambda: fs.sync_tree(folder))
        return tuple(parse_part("hidden", node, str(folder)) for node in told)

    def hidden(self, sharding: Sharding | None = None) -> jax.Array | np.ndarray | None:
        """The hidden states that the last finished block left, as `quantize_blocks` takes them;
        None without any.

        What was in host memory when it was written: this process's rows [n, T, D].  Else all of
        them, on the host, or in `sharding` where they were written by several processes: each then
        reads and verifies the rows of its own devices only.

        Raises CheckpointError when they are damaged.
        """
        name, entry = next(reversed(self._done.items()), ("", None))
        if entry is None or not entry.streams:
            return None
        shared = len(entry.streams) == 1
        number = 0 if shared else self._team.index
        stored, part = self.folder / _STREAMS / name / str(number), entry.streams[number]
        with self._damage():
            if not shared:
                return read_array(stored, dict(part.arrays())[_HIDDEN])
            read = read_part(stored, "hidden", part, verify=True, shardings=lambda *_: sharding)
            return read[_HIDDEN]

    def part(self, name: str) -> tuple[Path, PartEntry]:
        """Folder and contents of a finished block, for `CheckpointWriter.link_part`."""
        return self.folder / _BLOCKS / name, self._done[name].part

    def load(self, name: str) -> Any:
        """The parameters of a finished block, verified."""
        folder, part = self.part(name)
        return part_tree(name, part, read_part(folder, name, part, verify=True))

    def remove(self) -> None:
        """Forget everything."""
        if self._team.leads:
            # First: what is left of a removal that is cut short counts as nothing.
            (self.folder / _RUN).unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        self._done = {}

    def _open(self) -> None:
        file = self.folder / _RUN
        facts = _flat("", json.loads(encode_json(self._facts, _RUN)))
        if file.is_file():
            with self._damage():
                self._compare(_flat("", json.loads(file.read_bytes())), facts)
            return
        # What has no run.json was never begun, or was being removed.
        with fs.output_errors(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            for name in (_BLOCKS, _STREAMS, _DONE):
                (self.folder / name).mkdir(parents=True)
            fs.write_synced(file, encode_json(self._facts, _RUN))

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key, old, new in _differences(before, now):
            raise OutputError(
                f"{self.target}: an unfinished run is there, and {key} was {old!r} and now is "
                f"{new!r}: repeat that run to finish it, or start over (restart)"
            )

    def _check_alike(self) -> None:
        """Refuse processes whose run is not process 0's; copies of a file may differ in age."""
        facts = _flat("", json.loads(encode_json(self._facts, _RUN)))
        facts = {key: fact for key, fact in facts.items() if not key.endswith(".modified_ns")}
        first = self._team.lead("the facts are told", lambda: facts)

        def compare() -> None:
            for key, theirs, ours in _differences(first, facts):
                raise ProcessError(
                    f"{self.target}: {key} is {theirs!r} in process 0 and {ours!r} in process "
                    f"{self._team.index}: give all processes the same"
                )

        self._team.attempt("the facts are the same", compare)

    def _done_file(self, name: str) -> Path:
        return self.folder / _DONE / f"{name}.json"

    def _read_done(self, names: Sequence[str]) -> None:
        self._team.check_seen(self.folder, self.target)
        with self._damage():
            for number, name in enumerate(names):
                file = self._done_file(name)
                node = json.loads(file.read_bytes())
                streams = [parse_part("hidden", stream, str(file)) for stream in node["streams"]]
                part = parse_part(name, node["part"], str(file))
                if number % self._team.count == self._team.index:
                    # Now, rather than when the output is read one day.
                    read_part(self.folder / _BLOCKS / name, name, part, verify=True)
                self._done[name] = _Done(part, tuple(streams), _report(node["report"]))

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        """Say of damaged files whose they are, and what to do about it."""
        try:
            yield
        except (CheckpointError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, OutputError):
                raise
            raise CheckpointError(
                f"{self.folder}: the journal of an unfinished run is damaged ({error}); "
                "start over (restart)"
            ) from error


def _report(node: Mapping[str, Any]) -> BlockReport:
    linears = [
        LinearReport(**{**linear, "warnings": tuple(linear["warnings"])})
        for linear in node["linears"]
    ]
    return BlockReport(node["name"], tuple(linears), node["seconds"])


def _flat(prefix: str, node: Any) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists count as mappings from their indices."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= _flat(f"{prefix}.{key}" if prefix else str(key), value)
    return found


def _differences(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Keys at which two mappings differ, with the value of each."""
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key, "absent"), second.get(key, "absent")
        if a != b:
            yield key, a, b


def device_facts() -> dict[str, Any]:
    """What the codes may depend on beside model, data and recipe: where they are computed."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "processes": jax.process_count(),
        "matmul_precision": jax.config.jax_default_matmul_precision,
    }
