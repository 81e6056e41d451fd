"""The work on a block, on one device: what the driver asks for, done by one program each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jq.blockwise import BlockwiseModel
from jq.calib.scaling import Scaling, choose_scale, sample
from jq.calib.stages import StageResult, Stream, prepare_block, run_stage
from jq.errors import CalibrationError
from jq.group import RoundedGroup, round_group
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.spec import QuantSpec
from jq.statistics import InputStats


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """Everything on JAX's default device; `jq.calib.many_devices` is the same on a mesh.

    model: see `jq.blockwise`.
    batch_size, offload: see `quantize_blocks`.
    """

    model: BlockwiseModel
    batch_size: int
    offload: bool

    def first(self, outer: Mapping[str, Any], tokens: np.ndarray, mask: Any) -> Stream:
        """What the first block reads: the embedded calibration set."""
        if not self.offload:
            return jax.device_put(Stream(embed(self.model, outer, tokens), None, mask))
        size = self.batch_size
        parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        x = np.concatenate([np.asarray(embed(self.model, outer, part)) for part in parts])
        return Stream(x, None, mask)

    def restored(self, hidden: Any, tokens: np.ndarray, mask: Any) -> Stream:
        """What a block reads, as the one before has left it in an earlier run."""
        check_hidden(hidden, tokens.shape)
        stream = Stream(hidden, None, mask)
        return stream if self.offload else jax.device_put(stream)

    def prepare(self, params: Any, dtype: Any) -> tuple[Any, Any]:
        """See `prepare_block`."""
        return prepare_block(params, dtype)

    def settle(self, params: Any) -> Any:
        """Parameters that were changed, where the programs want them."""
        return params

    def stage(
        self, kind: Hashable, index: int, params: Any, stream: Stream, *, collect: bool
    ) -> StageResult:
        """See `run_stage`."""
        return run_stage(
            self.model, kind, index, params, stream, collect=collect, batch_size=self.batch_size
        )

    def choose(
        self,
        kind: Hashable,
        index: int,
        params: Any,
        stream: Stream,
        stats: InputStats,
        *,
        specs: tuple[QuantSpec | None, ...],
        method: AWQ | SmoothQuant,
    ) -> Scaling:
        """See `choose_scale`."""
        some = sample(stream, method.search_tokens)
        return choose_scale(
            self.model, kind, index, params, some, stats, specs=specs, method=method
        )

    def round(
        self,
        weights: Sequence[jax.Array],
        stats: InputStats | None,
        spec: QuantSpec,
        rounding: RTN | GPTQ,
        scale: jax.Array | None,
    ) -> RoundedGroup:
        """See `round_group`."""
        return round_group(weights, stats, spec, rounding, scale=scale)


@functools.partial(jax.jit, static_argnums=0)
def embed(model: BlockwiseModel, outer: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """Tokens [samples, T] -> the first block's input [samples, T, D]."""
    # What the embedding does not read (the output head) is not sent to the device.
    return model.embed(outer, tokens)


def check_hidden(hidden: Any, shape: tuple[int, ...]) -> None:
    """Raise CalibrationError unless hidden states [samples, T, D] are those of such tokens."""
    if hidden.shape[:2] != shape:
        raise CalibrationError(f"hidden {hidden.shape} does not fit tokens {shape}")
