"""Calibrate a model of your own under `jax.pmap`, then quantize it.

    python scripts/examples/pmap_calibrate.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python scripts/examples/pmap_calibrate.py

Every device sees its own batches and adds up what a linear reads; one sum over the devices makes
statistics of all of them, with which GPTQ rounds the weight.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import jq
from jq import statistics

INPUTS, OUTPUTS, ROWS = 64, 32, 128


def main() -> float:
    """Returns the error of the linear's outputs; rounding to nearest makes one about twice."""
    devices = jax.local_device_count()
    key = jax.random.key(0)
    mix = jax.random.normal(key, (INPUTS, INPUTS))
    x = jax.random.normal(jax.random.fold_in(key, 1), (devices, ROWS, INPUTS)) @ mix
    kernel = jax.random.normal(jax.random.fold_in(key, 2), (INPUTS, OUTPUTS))

    @functools.partial(jax.pmap, axis_name="devices")
    def calibrate(x):
        mine = statistics.update(statistics.init(INPUTS), x)
        return statistics.finish(statistics.all_reduce(mine, "devices"))

    stats = jax.tree.map(lambda a: jnp.asarray(jax.device_get(a)[0]), calibrate(x))  # all are equal
    assert int(stats.count) == devices * ROWS

    recipe = jq.uniform(jq.w4a16(group_size=32), jq.GPTQ())
    params = jq.quantize({"linear": {"kernel": kernel}}, recipe, {"linear": stats})
    y, wanted = jq.qmatmul(x, params["linear"]["kernel"]), x @ kernel
    error = float(jnp.linalg.norm(y - wanted) / jnp.linalg.norm(wanted))
    print(f"{devices} devices, {int(stats.count)} rows: output error {error:.4f}")
    return error


if __name__ == "__main__":
    main()
