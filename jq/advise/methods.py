"""Which method makes a format: the part of the decision that is about calibration and tools."""

from __future__ import annotations

import dataclasses

from jq.advise.formats import FP8, INT8, Format
from jq.advise.situation import Situation


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A preset that would do too, and when."""

    method: str
    why: str


@dataclasses.dataclass(frozen=True)
class Method:
    """A preset, why it was chosen, and what else would do."""

    name: str
    why: str
    alternatives: tuple[Alternative, ...]


_AWQ = Alternative("awq", "no slower to run, quicker to calibrate; with equal data the two tie")
_GPTQ = Alternative("gptq", "read by the most tools; with equal data the two tie")
_ACT_ORDER = Alternative(
    "gptq-act-order", "the Hessian's full order, for the last bit of quality; inference gathers"
)


def method_for(s: Situation, f: Format) -> Method:
    """The preset for a format; what the situation asks for first decides."""
    if s.existing is not None:
        other = method_for(dataclasses.replace(s, existing=None), f)
        why = "a pipeline that works is worth keeping: the gap rarely justifies a change"
        others = (Alternative(other.name, other.why), *other.alternatives)
        return Method(s.existing, why, tuple(a for a in others if a.method != s.existing))
    if f is INT8 or f is FP8:
        return _eight_bit(f)
    if s.engine == "exllama":
        return Method("gptq", "ExLlama-type kernels read GPTQ, and are quick at small batches", ())
    if s.requantize_often:
        return Method("awq", "re-quantized often: the cheapest calibration", (_GPTQ,))
    if s.widest_tooling:
        return Method("gptq", "the widest tooling and the longest track record", (_AWQ,))
    if s.goal == "quality":
        return _best(s)
    if s.instruction_tuned:
        return Method("awq", "instruction-tuned: AWQ leads by a small margin", (_GPTQ, _ACT_ORDER))
    why = "rounding that makes up for its own error, and no gather at inference"
    return Method("gptq", why, (_AWQ, _ACT_ORDER))


def _best(s: Situation) -> Method:
    if s.instruction_tuned:
        why = "quality first, on an instruction-tuned model: AWQ leads by a small margin"
        return Method("awq", why, (_ACT_ORDER, _GPTQ))
    if s.engine in ("vllm", "tgi"):
        why = f"the best quality among what {s.engine} runs quickly: no gather at inference"
        return Method("awq", why, (_ACT_ORDER, _GPTQ))
    why = "accuracy first, with time to calibrate: Hessian-based rounding in act order"
    return Method("gptq-act-order", why, (_GPTQ, _AWQ))


def _eight_bit(f: Format) -> Method:
    name, plain = ("smoothquant", "int8") if f is INT8 else ("smoothquant-fp8", "fp8")
    why = "the one method here that prepares activations for 8 bits: outliers move into the weights"
    return Method(name, why, (Alternative(plain, "the same arithmetic, without calibration"),))
