"""The decoder: pre-norm blocks of attention and a gated MLP, as Linen modules.

    model = Decoder(config)
    params = model.init(key, tokens)["params"]           # or HFCheckpoint(path).load()
    logits = model.apply({"params": params}, tokens)     # float32 [B, T, V]

Any `kernel` in `params` may be a QTensor.  `Decoder` is also a `jq.blockwise.BlockwiseModel`: its
blocks are chains of five stages, and running a block is running its stages.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jq.blockwise import LinearGroup
from jq.errors import ModelError
from jq.kernels.activations import shared_plan
from jq.models.attention import Attention
from jq.models.cache import KVCache, Places, make_places
from jq.models.config import ModelConfig
from jq.models.layers import MLP, Embed, Linear, RMSNorm

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

NUM_STAGES = 5
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


class Block(nn.Module):
    """One layer, as a chain of stages (see `jq.blockwise`)."""

    config: ModelConfig
    window: int | None = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.input_norm = RMSNorm(c.rms_norm_eps, self.param_dtype)
        self.attention = Attention(c, self.window, self.param_dtype)
        self.post_attention_norm = RMSNorm(c.rms_norm_eps, self.param_dtype)
        self.mlp = MLP(c, self.param_dtype)

    def __call__(
        self, h: Float[Array, "B T D"], places: Places, past: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The block's output, and the updated keys and values where `past` is given."""
        x, carry = h, past
        for index in range(NUM_STAGES):
            x, carry = self.stage(index, x, carry, places, once=True)
        return x, carry

    def stage(
        self, index: int, x: Any, carry: Any, places: Places, *, once: bool = False
    ) -> tuple[Any, Any]:
        """Stage `index`.  Before the first and after the last, `carry` is the cache (or None);
        in between it is (residual stream, cache).

        once: where the linears that share an input want it in 8 bits and agree how, it is quantized
          here, once, and not in each of them; the numbers are the same.
        """
        match index:
            case 0:
                return self._normed(self.input_norm, x, "attention", _QKV, once), (x, carry)
            case 1:
                residual, past = carry
                mixed, present = self.attention.mix(x, places, past)
                return mixed, (residual, present)
            case 2:
                residual, present = carry
                residual = residual + self.attention.output(x)
                x = self._normed(self.post_attention_norm, residual, "mlp", _GATE_UP, once)
                return x, (residual, present)
            case 3:
                return self.mlp.hidden(x), carry
            case 4:
                residual, present = carry
                return residual + self.mlp.output(x), present
        raise IndexError(f"a block has stages 0 to {NUM_STAGES - 1}, not {index}")

    def _normed(
        self, norm: RMSNorm, x: jax.Array, module: str, linears: tuple[str, ...], once: bool
    ) -> Any:
        """The input of some linears of a module."""
        params = self.variables.get("params", {}).get(module, {})
        kernels = [params[name]["kernel"] for name in linears if name in params]
        return norm(x, shared_plan(kernels) if once else None)


class Decoder(nn.Module):
    """Causal language model.

    Attributes:
        config: shape and arithmetic.
        dtype: of activations and matrix products; norms, rotary embeddings and softmax are float32.
        param_dtype: of parameters made by `init`; loaded ones keep their own.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        positions: Int[Array | np.ndarray, "B T"] | None = None,
        mask: Bool[Array | np.ndarray, "B T"] | None = None,
        cache: KVCache | None = None,
        at: Int[Array | np.ndarray, " B"] | None = None,
    ) -> Any:
        """Logits of every token, or of one per row.

        Args:
            tokens: int32 `[B, T]`.
            positions: int32 `[B, T]`, not decreasing along a row; counted from mask and cache when
                None.
            mask: bool `[B, T]`, True for real tokens; padding may stand left or right.
            cache: earlier tokens; the new ones are written behind them, and must fit: an overflow
                cannot be seen inside a compiled program.
            at: int32 `[B]`, the slot of each row whose logits are wanted; all when None.

        Returns:
            float32 `[B, T, V]` (`[B, 1, V]` with `at`); with a cache, (logits, new cache).
        """
        places = make_places((tokens.shape[0], tokens.shape[1]), positions, mask, cache)
        table = self._embedding(name="embed")
        h = table(tokens)
        pasts = _layer_caches(cache, self.config.num_hidden_layers)
        presents = []
        for i, past in enumerate(pasts):
            block = self._block(self.config.layer_windows[i], name=f"layers_{i}")
            h, present = block(h, places, past)
            presents.append(present)
        if at is not None:
            h = jnp.take_along_axis(h, jnp.asarray(at)[:, None, None], axis=1)
        h = self._final_norm(name="final_norm")(h)
        if self.config.tie_word_embeddings:
            logits = table.attend(h)
        else:
            logits = self._lm_head(name="lm_head")(h).astype(jnp.float32)
        if cache is None:
            return logits
        return logits, KVCache(
            keys=tuple(k for k, _ in presents),
            values=tuple(v for _, v in presents),
            positions=places.keys,
            length=cache.length + tokens.shape[1],
        )

    @property
    def block_names(self) -> tuple[str, ...]:
        """("layers_0", "layers_1", ...)."""
        return tuple(f"layers_{i}" for i in range(self.config.num_hidden_layers))

    @property
    def linear_groups(self) -> tuple[LinearGroup, ...]:
        """Linears that share an input, in the order of the stages."""
        c = self.config
        share = c.num_attention_heads // c.num_key_value_heads
        attention = tuple(f"attention/{name}_proj" for name in "qkv")
        return (
            LinearGroup("qkv", attention, "input_norm", "norm"),
            LinearGroup(
                "o", ("attention/o_proj",), "attention/v_proj", "linear", share, c.head_dim
            ),
            LinearGroup("gate_up", ("mlp/gate_proj", "mlp/up_proj"), "post_attention_norm", "norm"),
            LinearGroup("down", ("mlp/down_proj",), "mlp/up_proj", "linear"),
        )

    def block_kind(self, name: str) -> Hashable:
        """The layer's sliding window (None: full attention); all else is equal in all layers."""
        if name not in self.block_names:
            raise ModelError(f"no block {name!r}; blocks are layers_0 to {self.block_names[-1]}")
        return self.config.layer_windows[int(name.removeprefix("layers_"))]

    def embed(self, params: Mapping[str, Any], tokens: Int[Array | np.ndarray, "B T"]) -> jax.Array:
        """Tokens -> the first block's input `[B, T, D]`, in the model's dtype."""
        return _run(self._embedding(parent=None), params["embed"], tokens)

    def block_stage(
        self,
        kind: Hashable,
        index: int,
        params: Mapping[str, Any],
        x: jax.Array,
        carry: Any,
        mask: Bool[Array | np.ndarray, "B T"] | None = None,
    ) -> tuple[jax.Array, Any]:
        """One stage of a block of this kind, with its own parameters (see `jq.blockwise`)."""
        places = make_places((x.shape[0], x.shape[1]), mask=mask)
        block = self._block(kind, parent=None)
        return _run(block, params, index, x, carry, places, method="stage")

    def logits(self, params: Mapping[str, Any], h: Float[Array, "B T D"]) -> jax.Array:
        """The last block's output -> float32 logits `[B, T, V]`."""
        h = _run(self._final_norm(parent=None), params["final_norm"], h)
        if self.config.tie_word_embeddings:
            return _run(self._embedding(parent=None), params["embed"], h, method="attend")
        return _run(self._lm_head(parent=None), params["lm_head"], h).astype(jnp.float32)

    def _embedding(self, **scope: Any) -> Embed:
        c = self.config
        return Embed(
            c.vocab_size, c.hidden_size, c.initializer_range, self.dtype, self.param_dtype, **scope
        )

    def _block(self, window: Any, **scope: Any) -> Block:
        return Block(self.config, window, self.param_dtype, **scope)

    def _final_norm(self, **scope: Any) -> RMSNorm:
        return RMSNorm(self.config.rms_norm_eps, self.param_dtype, **scope)

    def _lm_head(self, **scope: Any) -> Linear:
        c = self.config
        return Linear(c.vocab_size, False, c.initializer_range, self.param_dtype, **scope)


def _run(module: nn.Module, params: Mapping[str, Any], *args: Any, **options: Any) -> Any:
    return module.apply({"params": params}, *args, **options)


def _layer_caches(cache: KVCache | None, layers: int) -> list[Any]:
    if cache is None:
        return [None] * layers
    return [(k, v, cache.length) for k, v in zip(cache.keys, cache.values, strict=True)]
