"""Models as the command line names them."""

from __future__ import annotations

import re
from pathlib import Path

from jq.errors import ModelError

DEMO = "demo"
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")  # an owner and a model
# What the manifest of a checkpoint made of it calls the model.
DEMO_NAME = "jaxq demo model"


def model_folder(name: str) -> Path:
    """A folder, or the embedded model for the word "demo"."""
    if name == DEMO:
        from jq.demo_model import demo_model_path

        return demo_model_path()
    path = Path(name)
    if path.is_dir():
        return path
    what = "is a file" if path.exists() else "does not exist"
    first = "models of a hub are downloaded first"
    if _HUB_NAME.fullmatch(name) and not path.parent.exists():
        first += f": hf download {name} --local-dir DIR"
    raise ModelError(
        f"{name} {what}; give a folder with config.json ({first}), or {DEMO!r} for the embedded "
        "model"
    )


def made_of_demo(path: Path) -> bool:
    """Whether a folder is the embedded model, or a checkpoint made of it."""
    from jq.checkpoint import is_checkpoint, read_manifest
    from jq.demo_model import demo_model_path

    if path.resolve() == demo_model_path():
        return True
    return is_checkpoint(path) and read_manifest(path).meta.get("model") == DEMO_NAME


def demo_text(name: str) -> Path:
    """A text file of the embedded model ("calibration.txt", "evaluation.txt")."""
    from jq.demo_model import demo_model_path

    return demo_model_path() / name
