"""Which linear is quantized how."""

from __future__ import annotations

import dataclasses
import re

from jq.errors import SpecError
from jq.methods.awq import AWQ
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.methods.smoothquant import SmoothQuant
from jq.spec import QuantSpec

Method = RTN | GPTQ | AWQ | SmoothQuant


@dataclasses.dataclass(frozen=True)
class Rule:
    """Linears whose path ("layers_0/attention/q_proj") matches get `spec` and `method`.

    pattern: a regular expression, searched anywhere in the path.
    spec: None leaves the linear in full precision.
    method: how it is quantized; None only with spec None.
    """

    pattern: str
    spec: QuantSpec | None
    method: Method | None = RTN()

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise SpecError(
                f"rule pattern {self.pattern!r} is no regular expression: {error}"
            ) from None
        if self.spec is not None and self.method is None:
            raise SpecError(f"rule {self.pattern!r} has a spec but no method")


# Rules in order of precedence: the first whose pattern matches decides; without a match a linear
# stays as it is.
Recipe = tuple[Rule, ...]


def uniform(spec: QuantSpec, method: Method) -> Recipe:
    """Every linear of every block the same way; embeddings and output head keep their precision."""
    return (Rule(".*", spec, method),)


def resolve(recipe: Recipe, path: str) -> Rule | None:
    """The rule that decides about a linear; None to leave it in full precision."""
    for rule in recipe:
        if re.search(rule.pattern, path):
            return None if rule.spec is None else rule
    return None


def needs_calibration(rule: Rule) -> bool:
    """Whether a rule learns from calibration data; its spec is not None."""
    assert rule.spec is not None
    assert rule.method is not None
    static = rule.spec.activation is not None and rule.spec.activation.static
    return static or rule.method.needs_statistics or rounding_of(rule.method).needs_statistics


def rounding_of(method: Method | None) -> RTN | GPTQ:
    """What rounds the weights after the method, which is not None, has moved them."""
    assert method is not None
    match method:
        case AWQ() | SmoothQuant():
            return method.rounding
        case _:
            return method
