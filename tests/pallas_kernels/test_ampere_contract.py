"""The kernels for Ada, emulated block by block, keep the contract of every quantized product."""

import jax.numpy as jnp

from jq.kernels.activations import plan_of, quantize_input
from jq.kernels.choice import REFERENCE, explain
from jq.kernels.convert import to_kernel
from jq.matmul import reorder
from jq.pallas_kernels.w4a16 import w4a16
from jq.pallas_kernels.w8a8 import w8a8
from tests.pallas_kernels import emulated
from tests.pallas_kernels.contract import Backend, MatmulContract

ADA = (8, 9)
K, N = 128, 128


def served(spec, dtype: str) -> bool:
    """Whether a kernel is for this format and dtype of x."""
    probe = type("Probe", (), {"spec": spec, "k": K, "n": N})()
    return explain(probe, dtype=dtype, device="sm_89").kernel != REFERENCE


def product(x, w):
    """Prepare, quantize x where that is wanted, and multiply."""
    weight = to_kernel(w, x.dtype.name, ADA).weight
    if w.order is not None:
        x = reorder(x, w.order)
    with emulated.emulation():
        if w.spec.activation is None:
            return w4a16(x, weight, compute_capability=ADA)
        q = quantize_input(x, plan_of(w), w.input_scale)
        scale = q.scale if q.plan.group else jnp.broadcast_to(q.scale, (*x.shape[:-1], 1))
        return w8a8(q.codes, scale, weight, out_dtype=x.dtype, compute_capability=ADA)


class TestAmpere(MatmulContract):
    backend = Backend(
        "Ada, emulated",
        product,
        served,
        rounds=lambda spec: spec.granularity == "group",  # a scale per column waits for the sum
        sizes=((5, K, N),),
    )
