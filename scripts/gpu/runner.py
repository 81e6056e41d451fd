"""Runs sections in processes of their own, within a budget, and keeps what they found.

A kernel may hang, take the process down, or leave the device unusable; each of those costs one
item. A process that is silent for too long is killed and one that died is started again behind the
item that did it, while there is time.  After every few seconds, and after every section, the whole
result is written, so that an end from outside loses little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
_POLL_S = 0.2
_FLUSH_S = 3.0
_GRACE_S = 5.0  # for a process to end by itself after its deadline
_FRUITLESS = 2  # starts in a row that reached no item, after which a section is given up
_LOG_TAIL = 8000


@dataclasses.dataclass(frozen=True)
class Section:
    """name: in the results.  module: what runs (see `scripts.gpu.worker`).
    share: of the time that is left, relative to those of the sections behind it.
    stall_s: the longest an item may take, the first one with the start of the process.
    workers: processes at a time; more than one only where nothing is timed.
    needs_gpu: skipped where there is none.
    """

    name: str
    module: str
    share: float
    stall_s: float = 60.0
    workers: int = 1
    needs_gpu: bool = True


@dataclasses.dataclass
class _Process:
    """A running worker."""

    popen: subprocess.Popen[bytes]
    journal: Path
    stderr: Path
    part: tuple[int, int]
    read: int = 0
    current: str | None = None
    heard: float = 0.0
    started_items: int = 0


class Results:
    """The JSON object that everything goes into: {"meta", "facts", "sections": {name: {...}}}.

    A section: "status" ("done", "out of time", "failed", "skipped", "running"), "seconds",
    "results" (by key: what the section's `run` returned, with its seconds), "errors" (by key),
    "not_run" (keys), and "problems" (what befell its processes).
    """

    def __init__(self, path: Path, meta: Mapping[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"meta": dict(meta), "facts": {}, "sections": {}}
        self._flushed = 0.0

    def section(self, name: str) -> dict[str, Any]:
        """The entry of a section, made when it is first asked for."""
        empty = {"status": "running", "seconds": 0.0, "results": {}, "errors": {}}
        return self.data["sections"].setdefault(name, {**empty, "not_run": [], "problems": []})

    def flush(self, *, now: bool = True) -> None:
        """Write the file whole; without `now`, at most every few seconds."""
        if not now and time.time() - self._flushed < _FLUSH_S:
            return
        self._flushed = time.time()
        scratch = self.path.with_suffix(".partial")
        scratch.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.path)

    def take_over(self, earlier: Mapping[str, Any]) -> None:
        """Start from the results of an earlier run: what is done there is not run again."""
        self.data["facts"] = dict(earlier.get("facts", {}))
        for name, found in earlier.get("sections", {}).items():
            taken = {"results": dict(found.get("results", {})), "status": "of an earlier run"}
            self.section(name).update(taken)


def run(
    sections: Sequence[Section],
    results: Results,
    budget_s: float,
    learn: Callable[[str, Mapping[str, Any], dict[str, Any]], None],
    unwanted: Callable[[Section, Mapping[str, Any]], str | None],
    say: Callable[[str], None] = print,
) -> None:
    """Run the sections in order.

    Args:
      sections: most valuable first.
      results: filled and written.
      budget_s: seconds for everything.
      learn: called after each section with (its name, its results by key, the facts to add to).
      unwanted: why a section is skipped, from the facts; None where it is not.
      say: progress, a line at a time.
    """
    end = time.time() + budget_s
    for index, section in enumerate(sections):
        entry = results.section(section.name)
        facts = results.data["facts"]
        left = end - time.time()
        later = [s for s in sections[index + 1 :] if unwanted(s, facts) is None]
        seconds = left * section.share / (section.share + sum(s.share for s in later))
        if reason := unwanted(section, facts):
            entry["status"] = f"skipped: {reason}"
        elif left < _GRACE_S:
            entry["status"] = "out of time"
        else:
            _run_section(section, results, time.time() + seconds)
            try:
                learn(section.name, entry["results"], facts)
            except Exception as error:
                entry["problems"].append(f"learning from it: {type(error).__name__}: {error}")
        say(_line(section.name, entry))
        results.flush()


def _line(name: str, entry: Mapping[str, Any]) -> str:
    counts = f"{len(entry['results'])} done, {len(entry['errors'])} errors"
    rest = f", {len(entry['not_run'])} not run" if entry["not_run"] else ""
    return f"[{name}] {entry['status']} in {entry['seconds']:.0f} s: {counts}{rest}"


def _run_section(section: Section, results: Results, deadline: float) -> None:
    """Run a section's processes until its items, or its time, are spent."""
    entry = results.section(section.name)
    entry["status"] = "running"
    start = time.time()
    planned: list[str] = []
    told = False  # whether any process said what there is to do
    with tempfile.TemporaryDirectory() as scratch:
        folder, number, fruitless = Path(scratch), 0, 0
        parts = [(i, section.workers) for i in range(section.workers)]
        while parts and time.time() < deadline:
            done = {**entry["results"], **entry["errors"]}
            facts = {**results.data["facts"], "done": sorted(done)}
            round_folder = folder / str(number)
            round_folder.mkdir()
            number += 1
            running = [_start(section, round_folder, facts, deadline, part) for part in parts]
            before = len(done)
            again = _watch(section, running, entry, planned, deadline, results)
            told = told or bool(planned) or not again
            after = len(entry["results"]) + len(entry["errors"])
            fruitless = 0 if after > before else fruitless + 1
            if again and fruitless >= _FRUITLESS:
                entry["problems"].append("given up: processes end before they reach an item")
                break
            # Those that remain are dealt anew among as many processes as before.
            size = min(section.workers, len(_left(entry, planned)) or section.workers)
            parts = [(i, size) for i in range(size)] if again else []
    entry["not_run"] = _left(entry, planned)
    entry["seconds"] = round(time.time() - start, 1)
    if told and not entry["not_run"] and not entry["problems"]:
        entry["status"] = "done"
    elif entry["problems"] and time.time() < deadline:
        entry["status"] = "failed"
    else:
        entry["status"] = "out of time"


def _left(entry: Mapping[str, Any], planned: Sequence[str]) -> list[str]:
    return [key for key in planned if key not in entry["results"] and key not in entry["errors"]]


def _start(
    section: Section, folder: Path, facts: Mapping[str, Any], deadline: float, part: tuple[int, int]
) -> _Process:
    name = f"{part[0]}"
    told, journal = folder / f"{name}.facts.json", folder / f"{name}.jsonl"
    stderr = folder / f"{name}.stderr"
    told.write_text(json.dumps(facts), encoding="utf-8")
    journal.touch()
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    if section.workers > 1:  # they share the device's memory
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    command = [sys.executable, str(WORKER), section.module, "--facts", str(told)]
    command += ["--journal", str(journal), "--deadline", str(deadline)]
    command += ["--part", str(part[0]), str(part[1])]
    with stderr.open("wb") as sink:
        popen = subprocess.Popen(
            command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env=env
        )
    return _Process(popen, journal, stderr, part, heard=time.time())


def _watch(
    section: Section,
    running: list[_Process],
    entry: dict[str, Any],
    planned: list[str],
    deadline: float,
    results: Results,
) -> bool:
    """Follow processes to their ends; True when items may be left for a fresh one."""
    again = False
    while running:
        time.sleep(_POLL_S)
        for process in list(running):
            code = process.popen.poll()  # before reading, so that nothing written is missed
            _read(process, entry, planned)
            reason = None
            if code is not None:
                if code:
                    reason = f"a process ended with code {code}"
            elif time.time() > deadline + _GRACE_S:
                _kill(process)
                process.current = None  # cut short, not to blame: it counts as not run
            elif time.time() - process.heard > section.stall_s:
                _kill(process)
                reason = f"silent for {section.stall_s:.0f} s"
            else:
                continue
            running.remove(process)
            if reason is not None:
                _note_end(process, reason, entry)
                again = True
        results.flush(now=False)
    return again


def _read(process: _Process, entry: dict[str, Any], planned: list[str]) -> None:
    """Take in the journal's new whole lines."""
    with process.journal.open("rb") as file:
        file.seek(process.read)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    process.read += len(whole)
    for line in whole.splitlines():
        process.heard = time.time()
        event = json.loads(line)
        key = event.get("item")
        match event["event"]:
            case "plan":
                planned[:] = event["items"]
            case "start":
                process.current = key
                process.started_items += 1
            case "done":
                entry["results"][key] = {**event["result"], "seconds": event["seconds"]}
                process.current = None
            case "error":
                entry["errors"][key] = {"error": event["error"], "traceback": event["traceback"]}
                process.current = None
            case "broken":
                entry["problems"].append(event["traceback"])


def _note_end(process: _Process, reason: str, entry: dict[str, Any]) -> None:
    """Blame an end that was not orderly on the item that was running, or write it down."""
    tail = process.stderr.read_bytes()[-_LOG_TAIL:].decode(errors="replace")
    if process.current is not None:
        entry["errors"][process.current] = {"error": reason, "traceback": tail}
    else:
        entry["problems"].append(f"{reason}\n{tail}".strip())


def _kill(process: _Process) -> None:
    process.popen.kill()
    # One that is stuck in the driver stays: nothing more can be done about it from here.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.popen.wait(timeout=_GRACE_S)
