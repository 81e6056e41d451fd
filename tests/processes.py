"""Programs of several processes on this machine, joined by `jq.distributed`."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "jax"

# What comes before a program: its arguments are the address and the index.
JOIN = """
import sys
import jax
from jq import distributed
distributed.initialize(sys.argv[1], {count}, int(sys.argv[2]), timeout=120, heartbeat={heartbeat})
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process with so many CPU devices, that keeps what it compiles."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def start(commands: list[list[str]], devices: int = 1) -> list[subprocess.Popen]:
    """Run commands side by side."""
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]


def start_processes(
    program: str, count: int, *arguments: str, devices: int = 1, heartbeat: int = 100
) -> list[subprocess.Popen]:
    """Run a program in so many processes; `sys.argv[3:]` are the arguments."""
    address = f"127.0.0.1:{free_port()}"
    text = JOIN.format(count=count, heartbeat=heartbeat) + program
    commands = [["-c", text, address, str(index), *arguments] for index in range(count)]
    return start(commands, devices)


class Outcome(NamedTuple):
    """How a process ended; what Gloo prints of its connections is left out."""

    code: int
    out: str
    error: str


def outcomes(processes: list[subprocess.Popen], timeout: float = 600) -> list[Outcome]:
    """How the processes ended; all are killed if one takes longer."""
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        Outcome(p.returncode, _without_gloo(out), error)
        for p, (out, error) in zip(processes, texts, strict=True)
    ]


def _without_gloo(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo]"))


def run_processes(program: str, count: int, *arguments: str, devices: int = 1) -> list[Outcome]:
    """Run a program in so many processes, all of which have to succeed."""
    ended = outcomes(start_processes(program, count, *arguments, devices=devices))
    assert [o.code for o in ended] == [0] * count, "\n".join(o.error[-3000:] for o in ended)
    return ended
