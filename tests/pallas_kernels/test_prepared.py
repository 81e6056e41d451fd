"""Prepared weights keep the contract on the XLA path, and give the kernel's own answers."""

import jax
import jax.numpy as jnp
import pytest

from jq.kernels.choice import REFERENCE, explain
from jq.kernels.convert import to_kernel
from jq.matmul import qmatmul
from tests.jq import cases
from tests.pallas_kernels.contract import Backend, MatmulContract


def served(spec, dtype: str, k: int = 128, n: int = 128) -> bool:
    """Whether the kernel is for this format and dtype of x."""
    probe = type("Probe", (), {"spec": spec, "k": k, "n": n})()
    return explain(probe, dtype=dtype, device="sm_90").kernel != REFERENCE


@jax.jit
def prepared_product(x, w):
    """Prepare, and multiply; on a CPU that is XLA with the prepared bytes."""
    return qmatmul(x, to_kernel(w, x.dtype.name))


class TestPrepared(MatmulContract):
    backend = Backend(
        "prepared",
        prepared_product,
        served,
        rounds=lambda spec: spec.granularity == "group",  # a scale per column waits for the sum
        sizes=((70, 128, 192), (5, 64, 64)),
    )


@pytest.mark.parametrize("name", [name for name in cases.EIGHT_BIT if "block" not in name])
def test_products_in_8_bits_have_kernels(name):
    spec = cases.EIGHT_BIT[name]
    assert served(spec, "bfloat16")
    assert served(spec, "float16")
    assert not served(spec, "float32")
    assert not served(spec, "bfloat16", n=96)


@pytest.mark.parametrize("name", ["int4 g32", "int4 g32 zero", "int4 g64 fp16", "int4 channel"])
def test_what_the_kernel_is_for(name):
    spec = cases.ALL[name]
    assert served(spec, "float16")
    assert served(spec, "bfloat16") == ("fp16" not in name)
    assert not served(spec, "float32")


def test_a_prepared_weight_holds_no_more_than_its_bytes():
    w = cases.weight("int4 g32 zero", 128, 128)
    prepared = to_kernel(w, "bfloat16")
    groups = 4 * 128
    assert prepared.nbytes == 128 * 128 // 2 + 2 * 2 * groups + 4 * 128
    assert (prepared.k, prepared.n, prepared.shape) == (128, 128, (128, 128))
    assert prepared.spec == w.spec
    assert jnp.issubdtype(prepared.weight.fragments.dtype, jnp.int32)
