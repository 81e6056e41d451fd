"""One run over several hosts: every host is given the same command."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Annotated

import tyro

from jq.errors import SpecError


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several processes, one per host, that do one run together; start the same command on each.

    Attributes:
        distributed: this is one of them. Slurm, Open MPI, Kubernetes and TPU pods tell the rest.
        coordinator: process 0, as the others reach it.
        processes: how many there are.
        process_id: this one's, from 0.
    """

    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    process_id: Annotated[int | None, tyro.conf.arg(metavar="I")] = None


@contextlib.contextmanager
def joined(hosts: Hosts) -> Iterator[None]:
    """Join the run's processes, before JAX is used; only process 0 prints what is no error.

    Raises: SpecError for options without --distributed; ProcessError when the processes do not find
    each other.
    """
    if not hosts.distributed:
        if any(value is not None for value in dataclasses.astuple(hosts)[1:]):
            raise SpecError(
                "--coordinator, --processes and --process-id are for --distributed: add it"
            )
        yield
        return
    import jax

    from jq import distributed

    distributed.initialize(hosts.coordinator, hosts.processes, hosts.process_id)
    _Membership.joined = True
    with contextlib.ExitStack() as scope:
        if jax.process_index() > 0:
            nowhere = scope.enter_context(open(os.devnull, "w", encoding="utf-8"))
            scope.enter_context(contextlib.redirect_stdout(nowhere))
            scope.enter_context(contextlib.redirect_stderr(nowhere))
        scope.enter_context(distributed.Team())  # for errors before and after the run
        yield


class _Membership:
    joined = False


def leave(code: int) -> None:
    """End this process with an error's exit code, if it was joined with others."""
    if _Membership.joined:
        from jq import distributed

        distributed.leave(code)
