"""What every implementation of a quantized product has to give: one test class for all of them.

A backend's test file names its `Backend` and inherits the class:

    class TestReference(MatmulContract):
        backend = Backend("reference", qmatmul)

Everything is compared with the float64 oracle, from the stored bytes, never with another backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jq.qtensor import QTensor
from jq.spec import QuantSpec
from tests.jq import cases, problems
from tests.oracles import qmatmul as oracle

# Relative error (norm over norm) of a product: float32 sums, and one rounding of the result.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.5e-3, "float16": 4e-4}
EIGHT_BIT_TOLERANCE = {"float32": 2e-6, "bfloat16": 2.5e-3, "float16": 4e-4}
# Few bits of x often lie in the middle between two codes of float8, but for the last bit of a
# float32 scale: one in a thousand then has another code than in float64.
FLOAT8_TOLERANCE = EIGHT_BIT_TOLERANCE | {"bfloat16": 4e-3}


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation under test.

    run: (x [..., K], weight [K, N]) -> [..., N]; prepares the weight itself if it has to.
    takes: whether it is meant for this spec and dtype of x; what it does not take is skipped.
    rounds: whether it rounds a weight of this spec to x's dtype before it multiplies.
    slack: factor on the tolerances, for arithmetic narrower than float32 sums.
    sizes: (tokens, K, N) to run.
    """

    name: str
    run: Callable[[jax.Array, QTensor], jax.Array]
    takes: Callable[[QuantSpec, str], bool] = lambda spec, dtype: True
    rounds: Callable[[QuantSpec], bool] = lambda spec: True
    slack: float = 1.0
    sizes: tuple[tuple[int, int, int], ...] = ((5, 64, 48),)


class MatmulContract:
    """Inherit, and set `backend`."""

    backend: Backend

    def product(self, name: str, dtype: str, tokens: int, k: int, n: int, *, act_order=False):
        """(x float64 as the backend saw it, weight, y), or a skip."""
        if not self.backend.takes(cases.ALL[name], dtype):
            pytest.skip(f"{self.backend.name} is not meant for {name} with {dtype}")
        w = cases.weight(name, k, n, act_order=act_order)
        x = jnp.asarray(cases.activations(tokens, k), dtype)
        y = self.backend.run(x, w)
        assert y.dtype == x.dtype
        assert y.shape == (tokens, n)
        return np.asarray(x, np.float64), w, np.asarray(y, np.float64)

    @pytest.mark.parametrize("name", cases.WEIGHT_ONLY)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_weight_only(self, name, dtype):
        for size in self.backend.sizes:
            x, w, y = self.product(name, dtype, *size)
            kept = dtype if self.backend.rounds(w.spec) else "float64"
            expected = oracle.weight_only(x, w, kept)
            assert problems.relative_error(y, expected) < TOLERANCE[dtype] * self.backend.slack

    @pytest.mark.parametrize("name", cases.EIGHT_BIT)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_eight_bit(self, name, dtype):
        for size in self.backend.sizes:
            x, w, y = self.product(name, dtype, *size)
            error = problems.relative_error(y, oracle.qmatmul(x, w))
            tolerance = FLOAT8_TOLERANCE if w.spec.is_float else EIGHT_BIT_TOLERANCE
            assert error < tolerance[dtype] * self.backend.slack

    @pytest.mark.parametrize("name", [*cases.FEW, "int4 g64 fp16"])
    def test_float16(self, name):
        x, w, y = self.product(name, "float16", *self.backend.sizes[-1])
        expected = oracle.qmatmul(x, w, "float16")
        assert problems.relative_error(y, expected) < TOLERANCE["float16"] * self.backend.slack

    @pytest.mark.parametrize("name", cases.FEW)
    def test_a_single_token(self, name):
        x, w, y = self.product(name, "bfloat16", 1, *self.backend.sizes[-1][1:])
        expected = oracle.qmatmul(x, w, "bfloat16")
        assert problems.relative_error(y, expected) < TOLERANCE["bfloat16"] * self.backend.slack

    @pytest.mark.parametrize("name", ["int4 g32", "int3 g32 zero", "int8 token / channel"])
    def test_act_order(self, name):
        x, w, y = self.product(name, "bfloat16", *self.backend.sizes[-1], act_order=True)
        expected = oracle.qmatmul(x, w, "bfloat16")
        assert problems.relative_error(y, expected) < TOLERANCE["bfloat16"] * self.backend.slack

    @pytest.mark.parametrize("name", ["int4 g32", "int8 token / channel", "fp8 token / channel"])
    def test_rows_do_not_see_each_other(self, name):
        """Rows of zeros give zeros, and an outlier in one row changes no other row."""
        x, w, y = self.product(name, "float32", *self.backend.sizes[-1])
        np.testing.assert_array_equal(y[1], 0)
        tamed = x.copy()
        tamed[2, 3] = 0.5
        other = np.asarray(self.backend.run(jnp.asarray(tamed, jnp.float32), w), np.float64)
        rows = [0, 1, 3, 4]
        assert problems.relative_error(other[rows], y[rows]) < 1e-6
