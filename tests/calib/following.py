"""A driver's result judged against the whole procedure in float64, code by code.

The oracle walks through the blocks as the driver should have: statistics on inputs that quantized
predecessors make, scales chosen and folded, then each linear's codes.  It judges every code given
the driver's own past, so that a tie at a rounding boundary is one difference and not many; where no
code differs at all, the driver's codes are those of the oracle left to itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jq import recipe as recipes
from jq.calib.report import BlockReport, LinearReport
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.smoothquant import SmoothQuant
from jq.qtensor import QTensor
from tests.calib import decoders
from tests.jq import problems
from tests.oracles import awq, blockwise, gptq, qmatmul, rtn, smoothquant
from tests.oracles.formats import format_of


@dataclasses.dataclass
class Verdict:
    """differing: codes that fell to the other side of a tie; codes: how many there are;
    activation_margin: how near (in steps) an 8-bit activation came to a rounding boundary;
    choices: group -> exponent or alpha, of the last block."""

    differing: int = 0
    codes: int = 0
    activation_margin: float = np.inf
    choices: dict[str, float | None] = dataclasses.field(default_factory=dict)


class Follower:
    """The oracle's walk along a driver's result."""

    def __init__(self, raw, weights, params, recipe, samples: Sequence[np.ndarray]) -> None:
        self.raw, self.weights, self.params, self.recipe = raw, weights, params, recipe
        self.tokens = sum(len(row) for row in samples)
        self.stream = [blockwise.embed(weights, row) for row in samples]
        self.found = decoders.qtensors(params)
        self.verdict = Verdict()

    def block(self, index: int, report: BlockReport) -> None:
        """Judge one block; its output becomes the next one's input."""
        self.index = index
        self.reports = {r.path: r for r in report.linears}
        layer = blockwise.layer_of(self.weights, index)
        scales = self.choose_scales(layer)
        for group, scale in scales.items():
            layer = blockwise.fold(layer, group, scale, self.raw)
        self.check_norms(layer)
        early = None if self.sequential() else self.inputs(layer, ())
        done: list[str] = []
        for group, names in blockwise.GROUPS.items():
            seen = (early or self.inputs(layer, done))[group]
            for name in names:
                layer = self.linear(layer, name, np.concatenate(seen), scales.get(group))
            done.append(group)
        self.stream = self.inputs(layer, done)["out"]

    def path(self, name: str) -> str:
        return f"layers_{self.index}/{decoders.PATHS[name]}"

    def rule(self, name: str) -> recipes.Rule | None:
        return recipes.resolve(self.recipe, self.path(name))

    def sequential(self) -> bool:
        rules = [self.rule(name) for name in decoders.PATHS]
        roundings = [recipes.rounding_of(rule.method) for rule in rules if rule is not None]
        return all(r.true_sequential for r in roundings if isinstance(r, GPTQ))

    def inputs(self, layer, done: Sequence[str]) -> dict[str, list[np.ndarray]]:
        """Inputs of all groups when the linears of the groups `done` are quantized."""

        def rounded(group: str, x: np.ndarray) -> np.ndarray:
            tensor = self.found.get(self.path(blockwise.GROUPS[group][0]))
            if group not in done or tensor is None or tensor.spec.activation is None:
                return x
            return self.round_activations(x, tensor)

        return blockwise.inputs(self.raw, layer, self.index, self.stream, rounded)

    def round_activations(self, x: np.ndarray, tensor: QTensor) -> np.ndarray:
        static = None if tensor.input_scale is None else float(tensor.input_scale)
        if tensor.spec.activation.dtype == "int8":
            axis = None if tensor.spec.activation.granularity == "tensor" else 1
            scale = static or np.abs(x).max(axis=axis, keepdims=True) / 127
            steps = np.abs(x / scale)
            margin = np.abs(steps - np.floor(steps) - 0.5)[steps < 127].min()
            self.verdict.activation_margin = min(self.verdict.activation_margin, float(margin))
        return qmatmul.activations(x, tensor.spec, static)

    def linear(self, layer, name: str, x: np.ndarray, scale: np.ndarray | None) -> dict:
        """Judge one linear [out, in] and put what the driver made of it in its place."""
        key, path, rule = f"{name}.weight", self.path(name), self.rule(name)
        w = layer[key].T
        if rule is None:
            assert path not in self.found
            kept = decoders.kernel(self.params, path)
            assert problems.relative_error(kept, w) < 2e-6, path
            return layer | {key: np.asarray(kept, np.float64).T}
        tensor = self.found[path]
        assert tensor.spec == rule.spec
        self.judge(w, x.T @ x, tensor, rule, path)
        if rule.spec.activation is not None and rule.spec.activation.static:
            top = 448 if rule.spec.is_float else 127
            np.testing.assert_allclose(tensor.input_scale, np.abs(x).max() / top, rtol=1e-5)
        made = qmatmul.weight(tensor)
        self.check_report(self.reports[path], x, w, made, rule, scale)
        return layer | {key: made.T}

    def judge(self, w, gram, tensor: QTensor, rule: recipes.Rule, path: str) -> None:
        """Codes, scales, zero points and order of one linear."""
        spec, rounding = tensor.spec, recipes.rounding_of(rule.method)
        shared = w.shape[1] if spec.granularity == "tensor" else 1
        fmt, codes = format_of(spec), problems.code_bytes(tensor.unsigned_codes())
        order = None
        if isinstance(rounding, GPTQ):
            gar, desc = rounding.act_group_aware, rounding.desc_act
            expected = gptq.quantize(
                *(w, gram, fmt, spec.group_size),
                damp=self.reports[path].damp_percent,
                how="desc_act" if desc else "gar" if gar else "plain",
                static_groups=rounding.static_groups,
                clip=rounding.clip,
                shared=shared,
                follow=codes,
            )
            order = expected.order
        else:
            expected = rtn.quantize(
                *(w, fmt, spec.group_size), shared=shared, clip=rounding.clip, gram=gram
            )
        exact = spec.scale_dtype != "float32"
        every = slice(None, None, shared)
        stored = np.asarray(tensor.scale, np.float64)
        rtol = 0 if exact else 1e-5
        np.testing.assert_allclose(stored, expected.scale[:, every], rtol=rtol, err_msg=path)
        if not spec.symmetric:
            np.testing.assert_array_equal(tensor.zeros(), expected.zero[:, every], err_msg=path)
        assert (tensor.order is None) == (order is None), path
        if order is not None:
            np.testing.assert_array_equal(tensor.order, order, err_msg=path)
        # An unrounded symmetric scale puts the lowest weight of a set on a boundary.
        most = expected.scale.size if spec.symmetric and not exact else 0
        ties = problems.count_ties(codes, expected.codes, expected.margins, most)
        self.verdict.differing += ties
        self.verdict.codes += codes.size

    def check_report(self, report: LinearReport, x, w, made, rule, scale) -> None:
        """The report's errors, on the very inputs."""
        assert report.weight_error == _near(problems.relative_error(made, w))
        if report.output_error is None:
            assert not rule.method.needs_statistics
            return
        assert report.tokens == self.tokens
        assert report.output_error == _near(problems.relative_error(x @ made, x @ w))
        fmt, size = format_of(rule.spec), rule.spec.group_size
        factor = np.ones(len(w)) if scale is None else scale
        shared = w.shape[1] if rule.spec.granularity == "tensor" else 1
        original = w / factor[:, None]
        nearest = rtn.dequantize(rtn.quantize(original, fmt, size, shared=shared), fmt)
        nearest = nearest * factor[:, None]
        expected = problems.relative_error(x @ nearest, x @ w)
        # Codes at boundaries are the oracle's own here, and not the driver's.
        boundary = rule.spec.symmetric and rule.spec.scale_dtype == "float32"
        assert report.rtn_output_error == _near(expected, 0.2 if boundary else 1e-2)

    # Scales

    def choose_scales(self, layer) -> dict[str, np.ndarray]:
        """The scale of every group that has one, all chosen on the block's own weights."""
        seen = self.inputs(layer, ())
        scales = {}
        for group, names in blockwise.GROUPS.items():
            rules = [rule for name in names if (rule := self.rule(name)) is not None]
            if not rules:
                continue
            method, x = rules[0].method, np.concatenate(seen[group])
            reported = self.reports[self.path(names[0])].scale_choice if self.rule(names[0]) else ()
            match method:
                case AWQ():
                    scales[group] = self.awq_scale(layer, group, x, method, reported)
                case SmoothQuant(alpha=float(alpha)) if group in blockwise.NORMS or (
                    method.smooth == "all"
                ):
                    scales[group] = self.smooth_scale(layer, group, x, alpha)
                    assert reported == pytest.approx(alpha, rel=1e-6)
        return scales

    def smooth_scale(self, layer, group: str, x: np.ndarray, alpha: float) -> np.ndarray:
        weights = [w for w in self.kernels(layer, group) if w is not None]
        if group != "o":
            return smoothquant.scale(alpha, x, weights)
        x_max = blockwise.shared(np.abs(x).max(axis=0), group, self.raw, np.max)
        w_max = np.max([np.abs(w).max(axis=1) for w in weights], axis=0)
        w_max = blockwise.shared(w_max, group, self.raw, np.max)
        return x_max**alpha / w_max ** (1 - alpha)

    def awq_scale(self, layer, group, x, method: AWQ, reported: Any) -> np.ndarray:
        """The driver's choice, if it is the best one (or as good as that to 2 in 1000)."""
        magnitude = None
        if method.duo_scaling:
            rules = [self.rule(name) for name in blockwise.GROUPS[group]]
            total, outputs = np.zeros(x.shape[1]), 0
            for w, rule in zip(self.kernels(layer, group), rules, strict=True):
                if w is not None:
                    part = awq.weight_magnitude([w], rule.spec.group_size)
                    total, outputs = total + part * w.shape[1], outputs + w.shape[1]
            magnitude = blockwise.shared(total / outputs, group, self.raw, np.mean)
        abs_mean = blockwise.shared(np.abs(x).mean(axis=0), group, self.raw, np.mean)
        if not method.search_scale:
            return awq.scale(method.exponent, abs_mean, magnitude)
        tried = [np.ones(x.shape[1])]
        tried += [awq.scale(i / method.n_grid, abs_mean, magnitude) for i in range(method.n_grid)]
        losses = np.array([self.awq_loss(layer, group, x, s, method) for s in tried])
        picked = int(np.argmin(losses))
        if reported != ():
            picked = 0 if reported is None else 1 + round(reported * method.n_grid)
        assert losses[picked] <= losses.min() * 1.002, (group, picked, losses)
        self.verdict.choices[group] = picked
        return tried[picked]

    def awq_loss(self, layer, group, x, scale, method: AWQ) -> float:
        """What the rounded weights change: outputs of a single linear, or of the next group's."""
        changed = dict(layer)
        for name in blockwise.GROUPS[group]:
            rule, w = self.rule(name), layer[f"{name}.weight"].T
            if rule is not None:
                fmt = format_of(rule.spec)
                codes = rtn.quantize(w * scale[:, None], fmt, rule.spec.group_size)
                changed[f"{name}.weight"] = (rtn.dequantize(codes, fmt) / scale[:, None]).T
        if len(blockwise.GROUPS[group]) == 1:
            key = f"{blockwise.GROUPS[group][0]}.weight"
            return float(np.square(x @ (changed[key] - layer[key]).T).sum())
        after = list(blockwise.GROUPS)[list(blockwise.GROUPS).index(group) + 1]
        following = layer[f"{blockwise.GROUPS[after][0]}.weight"].T
        total, count = 0.0, max(1, method.search_tokens // len(self.stream[0]))
        for h in self.stream[:count]:
            one = blockwise.run_block(self.raw, changed, self.index, h)[after]
            other = blockwise.run_block(self.raw, layer, self.index, h)[after]
            total += float(np.square((one - other) @ following).sum())
        return total

    def kernels(self, layer, group: str) -> list[np.ndarray | None]:
        """[in, out] of the group's linears; None for those that stay as they are."""
        names = blockwise.GROUPS[group]
        return [layer[f"{n}.weight"].T if self.rule(n) is not None else None for n in names]

    def check_norms(self, layer) -> None:
        """The norms' weights carry the scales."""
        block = self.params[f"layers_{self.index}"]
        for name, path in (
            ("input_layernorm", "input_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
        ):
            expected = layer[f"{name}.weight"]
            assert problems.relative_error(block[path]["scale"], expected) < 1e-5, path


def _near(expected: float, rel: float = 1e-3) -> Any:
    return pytest.approx(expected, rel=rel, abs=1e-7)


def follow(
    raw: Any,
    weights: Any,
    quantized: Any,
    reports: Sequence[BlockReport],
    recipe: recipes.Recipe,
    samples: Sequence[np.ndarray],
) -> Verdict:
    """Judge all blocks; samples are token ids, one array each, without padding."""
    follower = Follower(raw, weights, quantized, recipe, samples)
    for index, report in enumerate(reports):
        follower.block(index, report)
    assert follower.verdict.codes > 0
    return follower.verdict
