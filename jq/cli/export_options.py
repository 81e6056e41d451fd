"""Options of the commands that write folders for other tools."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Literal

import tyro

from jq.errors import SpecError
from jq.formats.plan import FormatOptions
from jq.formats.shards import SHARD_BYTES

FORMATS = ("orbax", "gptq", "awq", "compressed-tensors")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True)
class Export:
    """How folders for other tools are written; nothing here matters to format orbax.

    Attributes:
        checkpoint_format: of GPTQ files; auto is gptq (v1) for symmetric weights, and gptq_v2
            with zero points, of which tools read v1 differently.
        scale_dtype: of scales in GPTQ and AWQ files.
        legacy_act_order: write compressed-tensors files with an act order across groups, for its
            releases before 0.19.
        shard_size: limit of a weight file, such as 500MB.
    """

    checkpoint_format: Literal["auto", "gptq", "gptq_v2"] = "auto"
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    legacy_act_order: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = f"{SHARD_BYTES // 10**9}GB"

    def format_options(self) -> FormatOptions:
        """The choices as the library takes them."""
        chosen = None if self.checkpoint_format == "auto" else self.checkpoint_format
        return FormatOptions(chosen, self.scale_dtype, self.legacy_act_order)

    def shard_bytes(self) -> int:
        """Bytes of `shard_size`; SpecError for a text that is no size."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?B|)", self.shard_size.strip().upper())
        if match is None or (count := int(float(match[1]) * _UNITS[match[2]])) < 1:
            raise SpecError(f"shard size {self.shard_size!r} is none; give one like 5GB or 500MB")
        return count
