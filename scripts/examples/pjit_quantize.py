"""Quantize inside a program of your own: `jax.jit` with shardings (once called pjit).

    python scripts/examples/pjit_quantize.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python scripts/examples/pjit_quantize.py

Weights lie in shards along their outputs; so do the QTensors that come out, and the product with
them runs where they lie.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jq
from jq import statistics
from jq.sharding import partition_specs, sharded_qmatmul

INPUTS, OUTPUTS, ROWS = 64, 64, 512


def main() -> float:
    """Returns the error of the linear's outputs."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("model",), axis_types=(AxisType.Auto,))
    columns, whole = NamedSharding(mesh, P(None, "model")), NamedSharding(mesh, P())
    key = jax.random.key(0)
    x = jax.device_put(jax.random.normal(key, (ROWS, INPUTS)), whole)
    params = {
        "linear": {"kernel": jax.random.normal(jax.random.fold_in(key, 1), (INPUTS, OUTPUTS))}
    }
    params = jax.device_put(params, columns)
    recipe = jq.uniform(jq.w4a16(group_size=32), jq.GPTQ())

    def quantize(params, x):
        stats = statistics.finish(statistics.update(statistics.init(INPUTS), x))
        return jq.quantize(params, recipe, {"linear": stats})

    shapes = jax.eval_shape(quantize, params, x)
    specs = {"linear": {"kernel": partition_specs(shapes["linear"]["kernel"], n="model")}}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    small = jax.jit(quantize, out_shardings=shardings)(params, x)

    w = small["linear"]["kernel"]
    y = jax.jit(lambda x, w: sharded_qmatmul(x, w, mesh, n="model"))(x, w)
    wanted = x @ params["linear"]["kernel"]
    error = float(jnp.linalg.norm(y - wanted) / jnp.linalg.norm(wanted))
    shard = w.codes.addressable_shards[0].data.shape
    print(f"{devices} devices, each holds codes {shard} of {w.codes.shape}: error {error:.4f}")
    return error


if __name__ == "__main__":
    main()
