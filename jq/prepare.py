"""`prepare`: parameters as the kernels of a device want them.

Checkpoints hold one portable layout; a kernel reads its own, and the shuffle between the two
happens here, once, on the device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jq.cuts import misfit
from jq.kernels.choice import HOPPER, REFERENCE, Choice, capability_of, explain
from jq.kernels.convert import to_kernel
from jq.prepared import PreparedTensor
from jq.qtensor import QTensor
from jq.sharding import axes_of, partition_specs
from jq.support import Capability
from jq.tensor_parallel import unsharded


def prepare(params: Any, device: Any = None, *, dtype: Any = jnp.bfloat16) -> Any:
    """`params` with a PreparedTensor in the place of every QTensor that the device's kernels serve.

    Args:
      params: any pytree; what is no QTensor, or not served, stays the same object (`choices` says
        why).  A sharded QTensor becomes an equally sharded PreparedTensor.
      device: a jax.Device, "sm_90" (to export from a machine without one), or None for JAX's
        default device.
      dtype: of the activations, the model's `dtype`: kernels are for bfloat16 and float16.
    Nothing is changed in place: drop `params` to free the portable layout.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, QTensor) and _choice(value, device, dtype).kernel != REFERENCE:
            return _convert(value, jnp.dtype(dtype).name, capability_of(device)[0] or HOPPER)
        return value

    return jax.tree.map(leaf, params, is_leaf=_is_quantized)


def choices(params: Any, device: Any = None, *, dtype: Any = jnp.bfloat16) -> dict[str, Choice]:
    """The kernel of every QTensor and PreparedTensor, by path ("layers_0/mlp/up_proj/kernel"), and
    why: what `prepare` would do with the same arguments."""
    found = jax.tree.leaves_with_path(unsharded(params), is_leaf=_is_quantized)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _choice(leaf, device, dtype)
        for path, leaf in found
        if _is_quantized(leaf)
    }


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QTensor | PreparedTensor)


def _choice(w: QTensor | PreparedTensor, device: Any, dtype: Any) -> Choice:
    choice = explain(w, dtype=dtype, device=device)
    if choice.kernel == REFERENCE or isinstance(w, PreparedTensor) or not (cut := _cut(w)):
        return choice
    mesh, k, n, _ = cut
    reason = misfit(w.spec, w.k, w.n, axes_of(mesh, k), axes_of(mesh, n), tiled=True)
    return choice if reason is None else Choice(REFERENCE, reason)


def _cut(w: QTensor) -> tuple[Any, Any, Any, tuple[Any, ...]] | None:
    """(mesh, axes of K, of N, and of the leading axes) of a weight that has a NamedSharding."""
    sharding = getattr(w.codes, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    spec = (*sharding.spec, *(None,) * (w.codes.ndim - len(sharding.spec)))
    return sharding.mesh, spec[-2], spec[-1], spec[:-2]


def _convert(w: QTensor, dtype: str, capability: Capability) -> PreparedTensor:
    def convert(w: QTensor) -> PreparedTensor:
        return to_kernel(w, dtype, capability)

    cut = _cut(w)
    if cut is None:
        return convert(w)
    mesh, k, n, lead = cut
    specs = partition_specs(jax.eval_shape(convert, w), k, n, lead)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.jit(convert, out_shardings=shardings)(w)
