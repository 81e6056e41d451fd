"""What a rounding method returns, and how it becomes a QTensor."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jq import grid, qtensor
from jq.spec import QuantSpec


class Solution(NamedTuple):
    """Codes and grids of a weight [K, N].

    codes: uint8 (or float8_e4m3fn) [K, N], rows in stored order.
    scale: float32 [G, N], already rounded to spec.scale_dtype; one column per output even where
      outputs share.
    zero: float32 [G, N], integral.
    order: int32 [K] or None: the input each stored row multiplies.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array
    order: jax.Array | None = None

    def dequantize(self, spec: QuantSpec) -> jax.Array:
        """float32 [K, N], rows in the inputs' order."""
        k, n = self.codes.shape
        groups = self.codes.reshape(self.scale.shape[0], -1, n)
        w = grid.decode(groups, self.scale[:, None], self.zero[:, None], spec).reshape(k, n)
        return w if self.order is None else w[jnp.argsort(self.order)]

    def columns(self, start: int, stop: int) -> Solution:
        """The solution of some of the outputs: linears that share an input are solved as one."""
        codes, scale, zero = (a[:, start:stop] for a in (self.codes, self.scale, self.zero))
        return Solution(codes, scale, zero, self.order)

    def to_qtensor(
        self, spec: QuantSpec, *, input_scale: jax.Array | None = None, path: str = "weight"
    ) -> qtensor.QTensor:
        """Pack, keeping one scale where several outputs share it."""
        every = self.scale.shape[1] // spec.scale_shape(*self.codes.shape)[1]
        return qtensor.from_codes(
            self.codes,
            self.scale[:, ::every],
            self.zero[:, ::every] if spec.has_zero_point else None,
            spec,
            order=self.order,
            input_scale=input_scale,
            path=path,
        )
