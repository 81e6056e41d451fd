"""The quantized tensor: a pytree leaf-replacement for a `[..., K, N]` weight."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jq import grid, packing
from jq.errors import SpecError
from jq.spec import QuantSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized weight `[..., K, N]` (inputs x outputs) in the portable packed layout.

    Arrays (pytree children; leading axes, if any, are stacked layers or experts):
      codes: uint8 [..., packed_size(K, bits), N] (see `jq.packing`); int8 [..., K, N] for symmetric
        8-bit integers and float8_e4m3fn [..., K, N] for fp8, ready to be the operand of an 8-bit
        dot.
      scale: spec.scale_dtype [..., *spec.scale_shape(K, N)].
      zero_point: uint8, the scale's shape packed along its last axis; None when symmetric.
      order: int32 [..., K] or None.  Row r of the stored weight multiplies input order[r] (act
        order).
      input_scale: float32 [...] or None; the static scale of the activations.
    Static: spec, and (k, n), the logical size of the last two axes.

    The constructor does not validate, since JAX rebuilds pytrees with arbitrary leaves;
    `from_codes` does.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    order: jax.Array | None
    input_scale: jax.Array | None
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})
    n: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., K, N]."""
        return (*self.codes.shape[:-2], self.k, self.n)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def unsigned_codes(self) -> jax.Array:
        """Grid indices uint8 [..., K, N] (float8 codes as they are), rows in stored order."""
        if self.spec.is_float:
            return self.codes
        if self.codes.dtype == jnp.int8:
            return _flip_sign_bit(self.codes, jnp.uint8)
        return packing.unpack(self.codes, self.spec.bits, self.k)

    def zeros(self) -> jax.Array | None:
        """Zero points uint8 of the scale's shape, or None when symmetric."""
        if self.zero_point is None:
            return None
        return packing.unpack(self.zero_point, self.spec.bits, self.scale.shape[-1], axis=-1)

    def dequantize(self, dtype=jnp.float32) -> jax.Array:
        """The weight [..., K, N] with rows in the original order of the inputs."""
        w = self.dequantize_stored(jnp.float32)
        if self.order is not None:
            w = jnp.take_along_axis(w, jnp.argsort(self.order, axis=-1)[..., None], axis=-2)
        return w.astype(dtype)

    def dequantize_stored(self, dtype=jnp.float32) -> jax.Array:
        """The weight [..., K, N] with rows in stored order (they multiply `x[..., order]`)."""
        codes = self.unsigned_codes()
        grouped = codes.reshape(*codes.shape[:-2], self.scale.shape[-2], -1, self.n)
        scale, zero = (self._per_output(a) for a in (self.scale, self._zeros_or_offset()))
        w = grid.decode(grouped, scale, zero, self.spec)
        return w.reshape(self.shape).astype(dtype)

    def _zeros_or_offset(self) -> jax.Array:
        zeros = self.zeros()
        if zeros is not None:
            return zeros
        return jnp.full_like(self.scale, 0 if self.spec.is_float else self.spec.zero_offset)

    def _per_output(self, a: jax.Array) -> jax.Array:
        """[..., G, 1 | N/g | N] -> float32 [..., G, 1, 1 | N]."""
        if a.shape[-1] not in (1, self.n):
            a = jnp.repeat(a, self.n // a.shape[-1], axis=-1)
        return a.astype(jnp.float32)[..., None, :]


def _flip_sign_bit(x: jax.Array, dtype) -> jax.Array:
    """uint8 q <-> int8 q - 128: the same bits but for the highest."""
    flipped = jax.lax.bitcast_convert_type(x, jnp.uint8) ^ jnp.uint8(128)
    return jax.lax.bitcast_convert_type(flipped, dtype)


def from_codes(
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    spec: QuantSpec,
    *,
    order: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    path: str = "weight",
) -> QTensor:
    """Pack grid indices into a QTensor.

    Args:
      codes: uint8 [..., K, N] in [0, 2**bits), or float8_e4m3fn [..., K, N]; rows in stored order.
      scale: [..., *spec.scale_shape(K, N)].
      zero_point: integral values of the scale's shape; None when symmetric.
      spec: the format.
      order: int32 [..., K]: the input each stored row multiplies.
      input_scale: static activation scale.
      path: the name in error messages.
    Raises: SpecError when shapes, dtypes and spec disagree.
    """
    k, n = codes.shape[-2:]
    lead = codes.shape[:-2]
    expected = (*lead, *spec.scale_shape(k, n))
    if scale.shape != expected:
        raise SpecError(
            f"{path}: scale is {scale.shape}, but {spec} needs {expected} for {codes.shape}"
        )
    if (zero_point is None) != spec.symmetric:
        raise SpecError(
            f"{path}: symmetric={spec.symmetric}, zero points {'un' * (zero_point is None)}given"
        )
    if zero_point is not None and zero_point.shape != expected:
        raise SpecError(
            f"{path}: zero points are {zero_point.shape}, but the scale is {expected}: "
            "give one for each scale"
        )
    if order is not None and order.shape != codes.shape[:-1]:
        raise SpecError(
            f"{path}: order is {order.shape}, but there are {codes.shape[:-1]} stored rows: "
            "give the input of each"
        )
    needed = jnp.float8_e4m3fn if spec.is_float else jnp.uint8
    if codes.dtype != needed:
        raise SpecError(
            f"{path}: codes are {codes.dtype}, but {spec.dtype} needs {jnp.dtype(needed)}"
        )
    static = spec.activation is not None and spec.activation.static
    if static != (input_scale is not None):
        raise SpecError(
            f"{path}: static activations and input_scale go together; got static={static}"
        )
    if spec.is_float:
        packed = codes
    elif spec.bits == 8 and spec.symmetric:
        packed = _flip_sign_bit(codes, jnp.int8)
    else:
        packed = packing.pack(codes, spec.bits)
    if zero_point is not None:
        zero_point = packing.pack(zero_point.astype(jnp.uint8), spec.bits, axis=-1)
    return QTensor(
        packed, scale.astype(spec.scale_dtype), zero_point, order, input_scale, spec, k, n
    )
