"""`--devices`: how many of this process's devices work together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jq.cli.progress import Meter
from jq.errors import SpecError

# Of commands that run a model.
HELP = "devices that the model is cut over; one unless it is given"
METAVAR = "N|all"


def device_count(text: str | None) -> int | Literal["all"] | None:
    """What `--devices` asks for.  Raises SpecError for anything but a number or "all"."""
    if text is None or text == "all":
        return text
    if not text.isdecimal():
        raise SpecError(f"--devices {text} is neither a number nor all")
    return int(text)


def model_mesh(text: str | None) -> Any:
    """The jax.sharding.Mesh that a model is cut over; None for one device.

    Raises: SpecError for what `device_count` refuses, and for more devices than there are.
    """
    count = device_count(text)
    if count is None:
        return None
    from jq.data_mesh import data_mesh

    return data_mesh(count, "model")


def load_model(folder: Path, mesh: Any = None) -> tuple[Any, Any]:
    """The model of a folder and its parameters, as the devices' kernels want them.

    mesh: of `model_mesh`; each of its devices gets its shards.
    """
    from jq.api import load
    from jq.prepare import prepare

    with Meter("load", every=5.0) as meter:
        model, params = load(folder, mesh=mesh, progress=meter.show)
    return model, prepare(params, dtype=model.dtype)
