"""An output folder that appears complete or not at all.

Everything is written into a hidden sibling, `.<name>.partial-<pid>`, synced to the disk, and
renamed. A lock file, held with flock, keeps a second writer out; the kernel drops the lock when its
process dies, so that whoever holds it may remove whatever partial folders lie about.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jq.checkpoint.digests import in_threads
from jq.checkpoint.format import EXPORT_MANIFEST, MANIFEST
from jq.errors import OutputError


@contextlib.contextmanager
def building(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden sibling of `target` to build it in, empty, for `publish` to rename.

    Holds the target's lock, clears away what dead processes left, and removes what was not
    published.
    Raises: OutputError when the target may not be made, or is being made by another process.
    """
    with output_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        recover(target)
        check_target(target, overwrite=overwrite)
        partial = partial_folder(target)
        try:
            with output_errors(partial):
                partial.mkdir(parents=True)
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(target: Path, shown: Path | None = None) -> Iterator[None]:
    """Hold the lock of an output folder.

    Raises OutputError when another process holds it, or when the place cannot be written; it names
    `shown`, or else the folder.
    """
    path = target.with_name(f".{target.name.removeprefix('.')}.lock")
    with output_errors(path):
        descriptor = _acquire(path, shown or target)
    try:
        with output_errors(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        # Unlinked before it is unlocked: nobody may lock a name that is about to go.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, target: Path) -> int:
    import fcntl  # not there on Windows, where the rest of the package still imports

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 32).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise OutputError(
                f"{target}: process {owner} is writing there; wait for it or choose another folder"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise OutputError(
                f"{target}: this file system has no locks ({error.strerror}); write to a local "
                "folder and copy it"
            ) from error
        if _same_file(descriptor, path):
            return descriptor
        os.close(descriptor)  # the former owner has unlinked it in between: again


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def partial_folder(target: Path) -> Path:
    """Where this process builds what will be `target`."""
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


def recover(target: Path) -> None:
    """Clear away what dead processes left; the caller holds the lock.

    A process that died between the two renames of `publish` left the old folder aside and no
    target: that one is put back.
    """
    with output_errors(target):
        for aside in _siblings(target, "replaced"):
            if target.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(target)
        for partial in _siblings(target, "partial"):
            shutil.rmtree(partial)


def _siblings(target: Path, kind: str) -> list[Path]:
    prefix = f".{target.name}.{kind}-"
    return sorted(
        path
        for path in target.parent.iterdir()
        if path.name.startswith(prefix) and path.name.removeprefix(prefix).isdigit()
    )


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless a folder may be made at `target`.

    overwrite: whether it may replace one that jaxq has made; others are never replaced.
    """
    with output_errors(target):
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise OutputError(f"{target} exists and is no folder; choose another one")
        if not any(target.iterdir()):
            return
    if not overwrite:
        raise OutputError(
            f"{target} exists and is not empty: choose another folder, or overwrite (--overwrite, "
            "overwrite=True), which replaces only what jaxq has made"
        )
    if not any((target / name).is_file() for name in (MANIFEST, EXPORT_MANIFEST)):
        raise OutputError(
            f"{target} holds something else than a jaxq checkpoint, and will not be overwritten: "
            "remove it yourself or choose another folder"
        )


def publish(partial: Path, target: Path) -> None:
    """Sync a finished folder and rename it to `target`, replacing what is there."""
    with output_errors(target):
        sync_tree(partial)
        if target.exists() and any(target.iterdir()):
            aside = target.with_name(f".{target.name}.replaced-{os.getpid()}")
            target.rename(aside)
            try:
                partial.rename(target)
            except OSError:
                aside.rename(target)
                raise
            _sync(target.parent)
            # The new folder is in place; what cannot be removed now, the next writer removes.
            shutil.rmtree(aside, ignore_errors=True)
        else:
            partial.rename(target)
            _sync(target.parent)


def link_tree(source: Path, target: Path) -> None:
    """Make `target` a tree of hard links to the files of `source`; copies where there are none."""

    def link(old: str, new: str) -> str:
        try:
            os.link(old, new)
        except OSError:
            shutil.copyfile(old, new)
        return new

    shutil.copytree(source, target, copy_function=link)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that is whole or not there, on the disk when this returns."""
    with output_errors(path):
        partial = path.with_name(f".{path.name}.new")
        partial.write_bytes(data)
        _sync(partial)
        partial.rename(path)
        _sync(path.parent)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below, and the folder itself."""
    paths: list[Path] = []
    for root, _, names in os.walk(folder):
        paths += [Path(root), *(Path(root, name) for name in names)]
    in_threads(_sync, paths)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_room(folder: Path, needed: int) -> None:
    """Raise OutputError, with both numbers, when fewer than `needed` bytes are free."""
    with output_errors(folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder.parent}: {needed} bytes are needed and {free} are free: no room; "
            "make some or choose another folder"
        )


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors into OutputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{error.filename or path}: cannot be written: {reason}") from error
