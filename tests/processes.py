"""Programs of several processes on this machine, joined by `jq.distributed`."""

import os
import socket
import subprocess
import sys
from pathlib import Path

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
    }


def start_processes(
    program: str, count: int, *arguments: str, devices: int = 1, heartbeat: int = 100
) -> list[subprocess.Popen]:
    """Run a program in so many processes; `sys.argv[3:]` are the arguments."""
    address = f"127.0.0.1:{free_port()}"
    text = JOIN.format(count=count, heartbeat=heartbeat) + program
    return [
        subprocess.Popen(
            [sys.executable, "-c", text, address, str(index), *arguments],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def outcomes(processes: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str]]:
    """(exit code, stderr) of each."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, text) for p, text in zip(processes, errors, strict=True)]


def run_processes(program: str, count: int, *arguments: str, devices: int = 1) -> None:
    """Run a program in so many processes, all of which have to succeed."""
    ended = outcomes(start_processes(program, count, *arguments, devices=devices))
    assert [code for code, _ in ended] == [0] * count, "\n".join(text[-3000:] for _, text in ended)
