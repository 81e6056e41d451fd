"""`jaxq quantize --dry-run`: what the run would need, what there is, and how long it may take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax

from jq.cli.output import print_facts, size_text, time_text
from jq.requirements import Rates, Run, estimate, machine, requirements
from jq.requirements.machine import PROCESS_BYTES


def measure_rates(compute_bytes: int) -> Rates:
    """Measure JAX's default device, in a second or two.

    Args:
      compute_bytes: of a number of the hidden states: 2 for bfloat16, 4 for float32.
    """
    from jq.bench.ceilings import measure_ceilings

    dtype = "bfloat16" if compute_bytes == 2 else "float32"
    with jax.default_matmul_precision("highest"):  # float32 in full, as the solves have it
        found = measure_ceilings(
            tuple(dict.fromkeys(("float32", dtype))), buffer_bytes=1 << 27, largest=4096
        )
    return Rates(found.rate(dtype), found.rate("float32"), found.bytes_per_second)


def show(run: Run, out: Path, rates: Rates) -> None:
    """Print what a run needs, each beside what is free."""
    needed, there = requirements(run), machine(out)
    blocks = sum(count for _, count in run.blocks)
    facts = [("blocks", f"{blocks}, one after the other")]
    if run.calibrates:
        where = "host memory" if run.offload else "the device"
        facts.append(("calibration", f"{run.samples} x {run.seq_len} tokens, kept in {where}"))
    host = needed.host_parts if there.own_memory else needed.shared_parts
    if there.own_memory:
        facts.append(("device memory", _of(needed.device, there.device)))
        facts += _parts(needed.device_parts)
    facts.append(("host memory", _of(sum(host.values()) + PROCESS_BYTES, there.host)))
    facts += _parts({**host, "Python and JAX": PROCESS_BYTES})
    facts.append(("disk", _of(needed.disk, there.disk)))
    facts.append(("output", f"{size_text(needed.output)} in {out}"))
    seconds = estimate(needed.arithmetic, rates, needed.disk)
    speed = f"{rates.wide_products / 1e9:.0f} GFLOP/s float32, {rates.moved / 1e9:.0f} GB/s"
    facts.append(("time", f"about {time_text(seconds)} (estimate: {there.kind}, {speed})"))
    print_facts(facts)


def _of(needed: int, free: int | None) -> str:
    told = "free: unknown" if free is None else f"free: {size_text(free)}"
    return f"{size_text(needed)} ({told})"


def _parts(parts: Mapping[str, int]) -> list[tuple[str, str]]:
    """The larger parts, below their sum."""
    order = sorted(parts.items(), key=lambda item: -item[1])
    return [(f"  {name}", size_text(count)) for name, count in order if count]
