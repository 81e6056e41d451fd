"""Write a checkpoint, part by part."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jq.checkpoint import files as fs
from jq.checkpoint import format as fmt
from jq.checkpoint.digests import bytes_entry
from jq.checkpoint.folder_writer import FolderWriter
from jq.checkpoint.format import Manifest, PartEntry
from jq.checkpoint.manifest import encode_json, library_versions, manifest_json
from jq.checkpoint.part_writer import save_part
from jq.cuts import CutRule
from jq.distributed import Team
from jq.errors import CheckpointError, ModelError


class CheckpointWriter(FolderWriter):
    """Build a checkpoint folder that appears complete or not at all.

        with CheckpointWriter(path, config_files_from=model_folder) as writer:
            writer.write_part("embed", params["embed"])
            ...
            writer.finish({"recipe": ...})

    Parts may be written as they are finished; host memory holds one at a time. In a program of
    several processes all of them do so, with the same arguments; each writes its own shards, and
    the folder must lie on a file system that all of them see. Until `finish`
    everything stands in a hidden sibling folder, which any exception removes; what a killed process
    left is removed by the next writer. Equal parameters, files and meta give equal bytes in every
    file.

    Args:
      path: the folder to make; parents are made where missing.
      config_files_from: a model folder whose config, generation and tokenizer files are copied as
        they are (`jq.checkpoint.format.CONFIG_FILES`; config.json must be there).
      files: further files to put beside them, by plain name; they win over copied ones.
      overwrite: replace an existing folder that jaxq has made (anything else is never replaced).
      team: the program's processes, where they are kept in step already.
      cuts: the model's rule for the axes that the pieces of large arrays lie along; without one it
        is the last axis.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config_files_from: str | os.PathLike[str] | None = None,
        files: Mapping[str, bytes] | None = None,
        overwrite: bool = False,
        team: Team | None = None,
        cuts: CutRule | None = None,
    ) -> None:
        super().__init__(path, overwrite=overwrite, team=team or Team(), own=team is None)
        self._copies = _collect(config_files_from, files or {})
        self._parts: dict[str, PartEntry] = {}
        self._cuts = cuts or CutRule()

    def __enter__(self) -> CheckpointWriter:
        """Take the folder's lock and clear away what dead processes left.

        Raises OutputError: the folder is not empty, not writable, being written by another, or not
        seen by all processes.
        """
        if self._partial is not None or self._finished:
            raise CheckpointError(f"{self.path}: a CheckpointWriter is for one use")
        with self._build() as partial:

            def begin() -> None:
                with fs.output_errors(partial):
                    (partial / fmt.PARAMS).mkdir()

            self._team.lead(f"{self.path} has room", begin)
        return self

    def write_part(self, name: str, subtree: Any) -> None:
        """Write one top-level entry of the parameter tree.

        Args:
          name: the key, for instance "layers_0".
          subtree: nested dicts of arrays and QTensors, or one of those.
        Raises:
          CheckpointError: a leaf that is no array, a dtype that would not survive, a QTensor whose
            arrays do not follow from its spec, a name that is no plain file name.
          OutputError: no room, or the disk refuses.
        """
        partial = self._open()
        if name in self._parts:
            raise CheckpointError(f"part {name!r} was written already")
        folder = partial / fmt.PARAMS / name
        self._parts[name] = save_part(folder, name, subtree, self._team, self._cuts)

    def link_part(self, name: str, folder: Path, part: PartEntry) -> None:
        """Take over a part that `save_part` has written into `folder`, which stays as it is.

        Files are linked where the file system can, and copied otherwise.
        """
        partial = self._open()
        if name in self._parts:
            raise CheckpointError(f"part {name!r} was written already")

        def link() -> None:
            with fs.output_errors(partial):
                if folder.is_dir():  # a part of nothing but empty arrays has none
                    fs.link_tree(folder, partial / fmt.PARAMS / name)

        self._team.lead(f"part {name!r} is linked", link)
        self._parts[name] = part

    def finish(
        self, meta: Mapping[str, Any] | None = None, report: Mapping[str, Any] | None = None
    ) -> None:
        """Write report and manifest, and make the folder visible.

        Args:
          meta: facts for the manifest: recipe, calibration, ... (see `encode_json`).
          report: what was measured per layer, for report.json.
        Raises: CheckpointError when either has no JSON form; OutputError when the disk refuses.
        """
        self._open()
        small = dict(self._copies)
        if report is not None:
            small[fmt.REPORT] = encode_json(report, fmt.REPORT)
        manifest = Manifest(
            parts=self._parts,
            meta=dict(meta or {}),
            versions=library_versions(),
            files={name: bytes_entry(data) for name, data in small.items()},
        )
        small[fmt.MANIFEST] = manifest_json(manifest)  # the last of the files
        self._publish(small)


def _collect(folder: Any, files: Mapping[str, bytes]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    if folder is not None:
        present = [name for name in fmt.CONFIG_FILES if Path(folder, name).is_file()]
        if "config.json" not in present:
            raise ModelError(f"{folder}: no config.json: not a model folder")
        found = {name: Path(folder, name).read_bytes() for name in present}
    for name in files:
        if not fmt.safe_name(name) or name in (fmt.MANIFEST, fmt.REPORT, fmt.PARAMS):
            raise CheckpointError(f"{name!r} is no name for a file beside the manifest")
    return found | dict(files)
