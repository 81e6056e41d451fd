"""jq: quantization of large language models in JAX.

    import jq

    model, params = jq.load("path/to/model")  # a Hugging Face folder, or a jaxq checkpoint
    recipe = jq.uniform(jq.w4a16(group_size=128), jq.GPTQ())
    small, reports = jq.quantize_model(model, params, recipe, tokens)
    result = jq.evaluate(model, small, held_out, reference_params=params, seq_len=256)
    jq.save("model-int4", model, small, config_files_from="path/to/model")

`tokens` are int32 [samples, T], as `jq.calibration_data` makes them from text.  Models too large
for memory go through `jq.quantize_checkpoint`, a block at a time; Flax models of one's own through
`jq.collect`, `jq.quantize` and, for `nn.Dense`, `jq.quantized_dense`.

Names are imported when they are first used: `import jq` itself needs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jq import calib as calib
    from jq import distributed as distributed
    from jq import errors as errors
    from jq import models as models
    from jq.api import load as load
    from jq.api import save as save
    from jq.blockwise import BlockwiseModel as BlockwiseModel
    from jq.blockwise import LinearGroup as LinearGroup
    from jq.calib.collect import collect as collect
    from jq.calib.config import CalibrationConfig as CalibrationConfig
    from jq.calib.driver import quantize_blocks as quantize_blocks
    from jq.calib.driver import quantize_model as quantize_model
    from jq.calib.source import calibration_data as calibration_data
    from jq.dense import quantized_dense as quantized_dense
    from jq.errors import JaxqError as JaxqError
    from jq.evaluate import evaluate as evaluate
    from jq.experts import Experts as Experts
    from jq.experts import expert_matmul as expert_matmul
    from jq.formats.convert import convert as convert
    from jq.kernels.choice import explain as explain
    from jq.matmul import qmatmul as qmatmul
    from jq.methods.awq import AWQ as AWQ
    from jq.methods.gptq import GPTQ as GPTQ
    from jq.methods.rtn import RTN as RTN
    from jq.methods.smoothquant import SmoothQuant as SmoothQuant
    from jq.models.generation import generate as generate
    from jq.oneshot import quantize as quantize
    from jq.pipeline import quantize_checkpoint as quantize_checkpoint
    from jq.prepare import prepare as prepare
    from jq.presets import default_recipe as default_recipe
    from jq.qtensor import QTensor as QTensor
    from jq.recipe import Recipe as Recipe
    from jq.recipe import Rule as Rule
    from jq.recipe import uniform as uniform
    from jq.spec import ActivationSpec as ActivationSpec
    from jq.spec import QuantSpec as QuantSpec
    from jq.spec import w4a16 as w4a16
    from jq.spec import w8a8 as w8a8

# Where each public name lives; the test of the public API compares this with the imports above.
_HOME = {
    "jq": ("calib", "distributed", "errors", "models"),
    "jq.api": ("load", "save"),
    "jq.blockwise": ("BlockwiseModel", "LinearGroup"),
    "jq.calib.collect": ("collect",),
    "jq.calib.config": ("CalibrationConfig",),
    "jq.calib.driver": ("quantize_blocks", "quantize_model"),
    "jq.calib.source": ("calibration_data",),
    "jq.dense": ("quantized_dense",),
    "jq.errors": ("JaxqError",),
    "jq.evaluate": ("evaluate",),
    "jq.experts": ("Experts", "expert_matmul"),
    "jq.formats.convert": ("convert",),
    "jq.kernels.choice": ("explain",),
    "jq.matmul": ("qmatmul",),
    "jq.methods.awq": ("AWQ",),
    "jq.methods.gptq": ("GPTQ",),
    "jq.methods.rtn": ("RTN",),
    "jq.methods.smoothquant": ("SmoothQuant",),
    "jq.models.generation": ("generate",),
    "jq.oneshot": ("quantize",),
    "jq.pipeline": ("quantize_checkpoint",),
    "jq.prepare": ("prepare",),
    "jq.presets": ("default_recipe",),
    "jq.qtensor": ("QTensor",),
    "jq.recipe": ("Recipe", "Rule", "uniform"),
    "jq.spec": ("ActivationSpec", "QuantSpec", "w4a16", "w8a8"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'jq' has no attribute {name!r}")
    if module == "jq":
        return import_module(f"jq.{name}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, in which `jq.evaluate` is the function whatever was imported before.

    The import system binds a submodule in its package, and the package `jq.evaluate` would hide the
    function of the same name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        hides = isinstance(value, ModuleType) and _MODULE_OF.get(name, "jq") != "jq"
        if not hides:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
