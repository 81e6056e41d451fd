"""Training of a small decoder, deterministic and resumable."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jq.models import Decoder, ModelConfig

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Optimizer and schedule.

    steps, batch_size, seq_len: length of the run; `batch_size * seq_len` tokens a step.
    learning_rate: the peak, reached after `warmup` steps and lowered along a cosine to `final` of
      it.  It counts in AdamW's units for all weights: Muon's steps are scaled to the same size.
    weight_decay: of the kernels.
    clip_norm: largest norm of the whole gradient.
    z_loss: weight of mean(logsumexp(logits)^2) (Chowdhery et al. 2022, section 5).
    seed: of the initial weights and of the order of the windows.
    """

    steps: int = 1500
    batch_size: int = 4
    seq_len: int = 512
    learning_rate: float = 6e-3
    warmup: int = 40
    final: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    z_loss: float = 1e-4
    seed: int = 0


class State(NamedTuple):
    """Everything a run needs to go on."""

    step: int
    params: Params
    opt_state: Any


def windows(stream: np.ndarray, settings: Settings, step: int) -> np.ndarray:
    """int32 `[batch_size, seq_len + 1]`: the batch of a step.

    An epoch cuts the stream (made a ring) into windows from a new offset and visits them in a new
    order; it ends where the next batch would not be full.
    """
    per_epoch = len(stream) // settings.seq_len // settings.batch_size
    if per_epoch < 1:
        raise ValueError(f"{len(stream)} tokens are less than one batch of {settings}")
    epoch, place = divmod(step, per_epoch)
    rng = np.random.default_rng((settings.seed, epoch))
    offset = rng.integers(settings.seq_len)
    order = rng.permutation(len(stream) // settings.seq_len)
    rows = order[place * settings.batch_size :][: settings.batch_size]
    at = offset + rows[:, None] * settings.seq_len + np.arange(settings.seq_len + 1)
    return stream[at % len(stream)]


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the kernels, AdamW (Loshchilov & Hutter 2019) for embedding and norms.

    Muon needs a fraction of the tokens that AdamW alone needs here.  Its steps have the root mean
    square of AdamW's, 0.2 (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        settings.warmup,
        max(settings.steps, settings.warmup + 1),
        settings.learning_rate * settings.final,
    )
    optimizer = muon(
        schedule,
        weight_decay=settings.weight_decay,
        adam_b2=0.95,
        muon_weight_dimension_numbers=_orthogonalized,
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


def _orthogonalized(params: Any) -> Any:
    """Muon's description of a kernel; None for what AdamW trains."""

    def describe(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        return MuonDimensionNumbers() if path[-1].key == "kernel" else None

    return jax.tree_util.tree_map_with_path(describe, params)


def start(model: Decoder, settings: Settings) -> State:
    """Fresh weights; the linears that write to the residual stream start smaller by sqrt(2 L)
    (Radford et al. 2019, section 2.3)."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(settings.seed), tokens)["params"]
    shrink = (2 * model.config.num_hidden_layers) ** -0.5
    for name in model.block_names:
        for part, linear in (("attention", "o_proj"), ("mlp", "down_proj")):
            params[name][part][linear]["kernel"] *= shrink
    return State(0, params, make_optimizer(settings).init(params))


def token_losses(model: Decoder, params: Params, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihoods in nats `[B, T-1]` of a row's tokens but the first, and the
    log-normalisers."""
    logits = model.apply({"params": params}, rows[:, :-1])
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
    return normaliser - chosen, normaliser


@functools.cache
def make_step(model: Decoder, settings: Settings) -> Callable[..., Any]:
    """Jitted (params, opt_state, rows) -> (params, opt_state, mean loss); donates the first two."""
    optimizer = make_optimizer(settings)

    def objective(params: Params, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, normaliser = token_losses(model, params, rows)
        loss = jnp.mean(losses)
        return loss + settings.z_loss * jnp.mean(normaliser**2), loss

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, opt_state: Any, rows: jax.Array) -> Any:
        grads, loss = jax.grad(objective, has_aux=True)(params, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def train(
    config: ModelConfig,
    stream: np.ndarray,
    settings: Settings,
    *,
    state: State | None = None,
    every: int = 50,
    report: Callable[[State, float], None] = lambda state, loss: None,
) -> State:
    """Run to `settings.steps`.

    Args:
        stream: int32 `[n]`, the training tokens.
        state: where to go on; the start when None.
        report: called with the state and the mean training loss since the last call, after every
            `every` steps and after the last.  The state's arrays are given up by the next step.
    """
    model = Decoder(config)
    state = state if state is not None else start(model, settings)
    step, params, opt_state = state
    update = make_step(model, settings)
    losses = []
    while step < settings.steps:
        rows = jnp.asarray(windows(stream, settings, step))
        params, opt_state, loss = update(params, opt_state, rows)
        step += 1
        losses.append(loss)
        if step % every == 0 or step == settings.steps:
            report(State(step, params, opt_state), float(np.mean(jax.device_get(losses))))
            losses = []
    return State(step, params, opt_state)


@functools.cache
def make_scorer(model: Decoder) -> Callable[..., jax.Array]:
    """Jitted (params, rows `[B, T]`) -> losses `[B, T-1]` (see `token_losses`)."""
    return jax.jit(lambda params, rows: token_losses(model, params, rows)[0])


def held_out_loss(
    model: Decoder, params: Params, stream: np.ndarray, seq_len: int, batch_size: int = 8
) -> float:
    """Mean negative log-likelihood in nats a token, over windows of `seq_len` that do not overlap.

    The GPTQ protocol (Frantar et al. 2023, section 4): all tokens of a window but its first are
    scored; what does not fill a window is left out.  exp of it is the perplexity.
    """
    rows = stream[: len(stream) // seq_len * seq_len].reshape(-1, seq_len)
    if not len(rows):
        raise ValueError(f"{len(stream)} held-out tokens do not fill a window of {seq_len}")
    score = make_scorer(model)
    total = [
        np.asarray(score(params, rows[i : i + batch_size]), np.float64).sum()
        for i in range(0, len(rows), batch_size)
    ]
    return float(sum(total) / (len(rows) * (seq_len - 1)))


def save_state(state: State, path: Path) -> None:
    """Write a state; a run that is cut off while writing keeps the one before."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, *leaves)
    partial.replace(path)


def load_state(path: Path, like: State) -> State:
    """Read a state of the same model and optimizer as `like`."""
    with np.load(path, allow_pickle=False) as stored:
        leaves = [stored[f"arr_{i}"] for i in range(len(stored.files))]
    wanted = jax.tree.leaves(like)
    if [np.shape(leaf) for leaf in wanted] != [leaf.shape for leaf in leaves]:
        raise ValueError(f"{path} is of another model; delete it or choose another --out")
    step, *rest = leaves
    arrays = [jnp.asarray(leaf) for leaf in rest]
    return State(int(step), *jax.tree.unflatten(jax.tree.structure(like[1:]), arrays))


class Progress:
    """Makes the line of a report: step, losses, speed, time left."""

    def __init__(self, settings: Settings, step: int) -> None:
        self._settings = settings
        self._step = step
        self._began = time.perf_counter()

    def seconds(self) -> float:
        """Since the start of this run."""
        return time.perf_counter() - self._began

    def line(self, step: int, loss: float, held_out: float | None) -> str:
        seconds = self.seconds()
        tokens = self._settings.batch_size * self._settings.seq_len
        speed = (step - self._step) / seconds
        left = (self._settings.steps - step) / speed
        tail = "" if held_out is None else f"  held out {held_out:.4f}"
        return (
            f"step {step:5d}/{self._settings.steps}  loss {loss:.4f}{tail}"
            f"  {speed * tokens:.0f} tokens/s  {left / 60:.1f} min left"
        )
