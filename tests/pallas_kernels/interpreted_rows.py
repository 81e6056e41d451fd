"""Run the kernel of `quantize_rows` in Mosaic's interpreter, see `interpreting`."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from jq.pallas_kernels.quantize_rows import quantize_rows, quantize_rows_reference
from tests.pallas_kernels import interpreting


@dataclasses.dataclass(frozen=True)
class Case:
    """Activations to quantize."""

    codes: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    group: int | None = None
    norm: bool = False

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.dtype}_{self.codes}_{size}_g{self.group or 'row'}" + "_norm" * self.norm


FP8 = "float8_e4m3fn"
CASES = (
    Case("int8", (3, 1024)),
    Case(FP8, (2, 2, 384), "float16"),
    Case("int8", (2, 640), "float32"),
    # Nine groups: the last block is padded.
    Case("int8", (3, 384), group=128),
    Case(FP8, (2, 2, 1024), "float32", group=128),
    Case("int8", (4, 512), norm=True),
    Case(FP8, (3, 1024), "float16", norm=True),
)


def activations(rows: int, k: int, dtype: str = "bfloat16") -> jax.Array:
    """Rows of very different sizes, one of zeros, with values at half of the largest."""
    rng = np.random.default_rng(k)
    x = rng.standard_normal((rows, k)) * 10.0 ** rng.integers(-4, 5, (rows, 1))
    x[:, 3] = 0.5 * np.abs(x).max(-1)
    x[1] = 0
    return jnp.asarray(x, dtype)


def result(case: Case) -> dict:
    k = case.shape[-1]
    x = activations(int(np.prod(case.shape[:-1])), k, case.dtype).reshape(case.shape)
    gain = jnp.linspace(0.5, 2, k, dtype=case.dtype)
    options = {"group": case.group, "norm": (gain, 1e-5) if case.norm else None}
    codes, scale = quantize_rows(x, case.codes, interpret=True, **options)
    wanted, exact = quantize_rows_reference(x, case.codes, **options)
    assert (codes.shape, codes.dtype, scale.shape) == (x.shape, wanted.dtype, exact.shape)
    steps = np.abs(np.asarray(codes).view(np.int8).astype(int) - np.asarray(wanted).view(np.int8))
    return {
        "name": case.name,
        "races": interpreting.races(),
        "different": float(np.mean(steps > 0)),
        "steps": int(steps.max()),
        "scale": float(np.max(np.abs(scale / exact - 1))),
    }


def special() -> dict:
    """A row that is too small, one with NaN, and one of ones."""
    x = jnp.ones((3, 128), jnp.float32).at[0].set(1e-30).at[1, 5].set(jnp.nan)
    codes, scale = quantize_rows(x, "int8", interpret=True)
    return {
        "name": "special",
        "scales": [str(float(s)) for s in scale[:, 0]],
        "codes": [int(jnp.abs(codes[0]).max()), int(codes[2, 0])],
    }


def main() -> None:
    interpreting.show(CASES, result)
    print(json.dumps(special()), flush=True)


if __name__ == "__main__":
    main()
