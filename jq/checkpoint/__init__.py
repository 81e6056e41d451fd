"""Quantized checkpoints: written part by part, visible only when complete, verified when read.

    with CheckpointWriter(path, config_files_from=model_folder) as writer:
        for name, subtree in params.items():
            writer.write_part(name, subtree)
        writer.finish({"recipe": ...})

    params = load_params(path)

`jq.checkpoint.format` describes the folder.
"""

from jq.checkpoint.format import Manifest
from jq.checkpoint.reader import (
    check_files,
    is_checkpoint,
    iter_parts,
    load_params,
    read_manifest,
)
from jq.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointWriter",
    "Manifest",
    "check_files",
    "is_checkpoint",
    "iter_parts",
    "load_params",
    "read_manifest",
]
