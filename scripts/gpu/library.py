"""The kernel as the library calls it: prepared weights under every transformation, on the device.

Each use compares `jq.qmatmul` of a prepared weight with that of the QTensor it was made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jq.kernels.choice import explain
from jq.matmul import qmatmul
from jq.prepare import prepare
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor, from_codes
from jq.sharding import sharded_qmatmul
from jq.spec import QuantSpec
from scripts.gpu.problems import Problem, random_parts

TOLERANCE = 5e-3
DEVICE: Any = None  # to prepare for: JAX's own
PROBLEM = Problem(24, 1024, 1024, 128, symmetric=False)


def weight(number: int = 0, order: bool = False) -> tuple[QTensor, jax.Array]:
    """(a random QTensor, x [24, K])."""
    p = PROBLEM
    key = jax.random.key(number)
    codes, scale, zero, x = jax.jit(lambda key: random_parts(key, p))(key)
    spec = QuantSpec("int4", p.group, p.symmetric)
    places = jax.random.permutation(key, p.k).astype(jnp.int32) if order else None
    return from_codes(codes, scale, zero, spec, order=places), x


def product() -> tuple[Any, Any]:
    """Plain."""
    w, x = weight()
    return jax.jit(qmatmul)(x, ready(w)), jax.jit(qmatmul)(x, w)


def act_order() -> tuple[Any, Any]:
    """With inputs gathered."""
    w, x = weight(order=True)
    return jax.jit(qmatmul)(x, ready(w)), jax.jit(qmatmul)(x, w)


def gradient() -> tuple[Any, Any]:
    """In x, behind and before something nonlinear."""
    w, x = weight()

    def loss(x, w):
        y = qmatmul(jnp.tanh(x), w).astype(jnp.float32)
        return jnp.sum(jnp.sin(y))

    grad = jax.jit(jax.grad(loss))
    return grad(x, ready(w)), grad(x, w)


def vmap_experts() -> tuple[Any, Any]:
    """One weight per batch element."""
    (first, x), (second, _) = weight(0), weight(1)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    run = jax.jit(jax.vmap(qmatmul, (None, 0)))
    return run(x, ready(stacked)), run(x, stacked)


def vmap_rows() -> tuple[Any, Any]:
    """One weight, a batch of x."""
    w, x = weight()
    run = jax.jit(jax.vmap(qmatmul, (0, None)))
    batch = jnp.stack([x, 2 * x, x - 1])
    return run(batch, ready(w)), run(batch, w)


def scan() -> tuple[Any, Any]:
    """Stacked layers."""
    layers = [weight(i)[0] for i in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)

    @jax.jit
    def run(x, stacked):
        return jax.lax.scan(lambda h, w: (qmatmul(h, w), None), x, stacked)[0]

    x = weight()[1]
    return run(x, ready(stacked)), run(x, stacked)


def shard_map() -> tuple[Any, Any]:
    """On a mesh of one device, columns and inputs cut into one part each."""
    w, x = weight()
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    run = jax.jit(lambda x, w: sharded_qmatmul(x, w, mesh, k="data", n="model"))
    return run(x, ready(w)), jax.jit(qmatmul)(x, w)


def exported() -> tuple[Any, Any]:
    """A program exported for CPU and CUDA, run here."""
    w, x = weight()
    ours = ready(w)
    exporter = jax.export.export(jax.jit(lambda x: qmatmul(x, ours)), platforms=["cpu", "cuda"])
    return jax.jit(exporter(x).call)(x), jax.jit(qmatmul)(x, w)


def in_a_loop() -> tuple[Any, Any]:
    """Many launches in a row that depend on each other, in one program: ordering between them."""
    w, x = weight()

    @jax.jit
    def run(x, w):
        def step(_, h):
            y = qmatmul(h, w).astype(jnp.float32)
            return (y / jnp.sqrt(jnp.mean(y**2))).astype(h.dtype)

        return jax.lax.fori_loop(0, 4, step, x)

    return run(x, ready(w)), run(x, w)


def ready(w: QTensor) -> PreparedTensor:
    """Prepared for this device.  Raises AssertionError, with the reason, where it is not served."""
    prepared = prepare(w, DEVICE)
    assert isinstance(prepared, PreparedTensor), explain(w, device=DEVICE).reason
    return prepared


USES: dict[str, Callable[[], tuple[Any, Any]]] = {
    f.__name__: f
    for f in (
        product,
        act_order,
        gradient,
        vmap_rows,
        vmap_experts,
        scan,
        shard_map,
        exported,
        in_a_loop,
    )
}


def run(name: str) -> dict[str, Any]:
    """Relative difference of both, and what was chosen."""
    ours, theirs = (np.asarray(value).astype(np.float64) for value in USES[name]())
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    factor = 20 if name == "in_a_loop" else 4 if name == "scan" else 1
    choice = dataclasses.asdict(explain(weight()[0], device=DEVICE))
    return {"ok": error < factor * TOLERANCE, "error": error, "choice": choice}
