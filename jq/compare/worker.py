"""A stage in a process of its own: its memory is its own, and nothing it does harms the next.

The parent sends a pickled `Job`, or None to ask for the device, on stdin; the child answers with
lines of JSON: progress, and at the end a result or an error. What else it writes goes into a log.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jq.compare.stages import Job, StageProgress

_CODE = "import sys; from jq.compare.worker import main; sys.exit(main())"
_PATIENCE = 20.0  # seconds a child may take to clean up after SIGTERM


class ArmError(Exception):
    """A stage did not end well; the text is for the table's reader."""


def run_apart(job: Job, log: Path, progress: StageProgress) -> dict[str, Any]:
    """Run a stage in a fresh process, and give what it gives.

    log: file that the child's stderr is appended to; removed while there is none.
    Raises: ArmError with the child's error, or with the signal that ended it.
    """
    return _ask(job, log, progress)


def device_apart(log: Path) -> dict[str, Any]:
    """`device_facts` of a fresh process, so that this one does not take the device's memory."""
    return _ask(None, log, lambda done, total, text: None)


def describe(error: BaseException) -> str:
    """An error in one line, as a FAILED arm shows it."""
    text = " ".join(str(error).split()) or "no message"
    if "RESOURCE_EXHAUSTED" in text:
        text = "the device is out of memory: " + text
    return f"{type(error).__name__}: {text}"[:600]


def _ask(job: Job | None, log: Path, progress: StageProgress) -> dict[str, Any]:
    answer: dict[str, Any] | None = None
    with log.open("ab") as errors, _child(errors) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; its end tells how
            child.stdin.write(pickle.dumps(job))
            child.stdin.close()
        for line in child.stdout:
            message = json.loads(line)
            if "done" in message:
                progress(message["done"], message["total"], message["text"])
            else:
                answer = message
        code = child.wait()
    if not log.stat().st_size:
        log.unlink()
    if answer is None:
        raise ArmError(_ending(code, log))
    if "error" in answer:
        raise ArmError(answer["error"])
    return answer["result"]


@contextlib.contextmanager
def _child(errors: Any) -> Iterator[subprocess.Popen]:
    """The process; it is gone when the block is left, whatever happens."""
    paths = [path for path in sys.path if path]
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", _CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # a terminal's interrupt is for the parent, which ends the child
    )
    with child:  # closes the pipes, and waits
        try:
            yield child
        finally:
            _end(child)


def _end(child: subprocess.Popen) -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _ending(code: int, log: Path) -> str:
    if code == -signal.SIGKILL:
        return f"the process was killed, most likely for want of memory; {_see(log)}"
    if code < 0:
        return f"the process died of {signal.Signals(-code).name}; {_see(log)}"
    return f"the process ended with code {code} and no result; {_see(log)}"


def _see(log: Path) -> str:
    return f"see {log.name}" if log.exists() else "it said nothing"


def main() -> int:
    """The child."""
    # Its log is for errors: no bars of the libraries that tasks bring.
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half a folder is removed
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # whatever prints, prints into the log

        def say(**message: Any) -> None:
            answers.write(json.dumps(message, allow_nan=False) + "\n")
            answers.flush()

        try:
            job = pickle.load(sys.stdin.buffer)
            say(result=_answer(job, lambda d, t, x: say(done=d, total=t, text=x)))
        except Exception as error:
            import traceback

            traceback.print_exc()
            say(error=describe(error))
            return 1
    return 0


def _answer(job: Job | None, progress: StageProgress) -> dict[str, Any]:
    if job is None:
        from jq.compare.spec import device_facts

        return device_facts()
    from jq.compare.stages import run_stage

    return run_stage(job, progress)
