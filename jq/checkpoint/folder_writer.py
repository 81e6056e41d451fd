"""What the writers of whole folders share: a hidden place to build in, and the end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jq.checkpoint import files as fs
from jq.distributed import Team
from jq.errors import CheckpointError


class FolderWriter:
    """A context in which a folder is built that appears complete or not at all.

    A subclass opens it with `_build` when it is entered, and ends with `_publish`. Where several
    processes write, the first of them makes the folder, and holds its lock.

    Args:
      path: the folder to make.
      overwrite: replace an existing folder that jaxq has made.
      team: the processes that write it.
      own: the team is not in a `with` of the caller's.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, overwrite: bool, team: Team, own: bool = True
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self._overwrite = overwrite
        self._team, self._own = team, own
        self._scope = contextlib.ExitStack()
        self._partial: Path | None = None
        self._finished = False

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._scope.__exit__(kind, error, trace)
        if kind is None and not self._finished:
            raise CheckpointError(
                f"{self.path}: the writer was left without finish(); nothing was kept"
            )

    @contextlib.contextmanager
    def _build(self):
        """Take the folder's lock and give the hidden place; kept open unless an error comes."""
        with self._scope as scope:
            if self._own:
                scope.enter_context(self._team)
            building = fs.building(self.path, overwrite=self._overwrite)
            partial = self._team.lead(
                f"{self.path} is begun", lambda: str(scope.enter_context(building))
            )
            partial = Path(partial)
            self._team.attempt(
                f"{self.path} is seen", lambda: self._team.check_seen(partial, self.path)
            )
            yield partial
            self._partial = partial
            self._scope = scope.pop_all()

    def _open(self) -> Path:
        """The hidden place, while there is one."""
        if self._partial is None:
            state = "is finished" if self._finished else "was not entered (use `with`)"
            raise CheckpointError(f"{self.path}: this {type(self).__name__} {state}")
        return self._partial

    def _publish(self, small: Mapping[str, bytes]) -> None:
        """Write the last files, in order, and make the folder visible."""
        partial = self._open()

        def publish() -> None:
            fs.check_room(partial, sum(map(len, small.values())))
            with fs.output_errors(partial):
                for name, data in small.items():
                    (partial / name).write_bytes(data)
            # Somebody may have put something there in the meantime.
            fs.check_target(self.path, overwrite=self._overwrite)
            fs.publish(partial, self.path)

        self._team.lead(f"{self.path} is finished", publish)
        self._finished = True
        self._partial = None
