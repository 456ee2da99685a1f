"""Agreements between processes: no rank goes on, stops or fails alone.

They travel over the control group (gloo, CPU), so they neither wait for a GPU nor make one wait. In one process they
cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron.distributed.topology import Topology
from megatron.errors import UserError


def any_rank(topology: Topology, flag: int) -> int:
    """The largest ``flag`` of all processes: did any of them see the signal, the file, the deadline? Collective."""
    if topology.world_size == 1:
        return int(flag)
    value = torch.tensor(int(flag), dtype=torch.int64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=topology.control_group)
    return int(value)


def gather_objects(topology: Topology, value: Any) -> list[Any]:
    """``value`` (picklable) of every process, in the order of ranks. Collective."""
    if topology.world_size == 1:
        return [value]
    values: list[Any] = [None] * topology.world_size
    dist.all_gather_object(values, value, group=topology.control_group)
    return values


def first_said(topology: Topology, own: str | None) -> str | None:
    """What the first rank says that says anything, on all; None where all have None to say. Collective."""
    return next(filter(None, gather_objects(topology, own)), None)


@contextmanager
def agree_on_error(topology: Topology) -> Iterator[None]:
    """Run the body on every process; if it fails on any, fail on all. Collective, at the end of the body.

    The body must not itself wait for other processes after the point where one of them may fail.

    Raises:
        UserError: on every process, with the message of the first rank whose body raised UserError or OSError (a file
            that one node does not see, say).
        RuntimeError: on the others, naming the first rank that failed otherwise; that rank raises its own exception.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    report = None if own is None else (isinstance(own, UserError | OSError), _message(own))
    reports = gather_objects(topology, report)
    failed = [(rank, *found) for rank, found in enumerate(reports) if found is not None]
    if not failed:
        return
    defects = [(rank, message) for rank, is_input, message in failed if not is_input]
    if own is not None and not isinstance(own, UserError | OSError):
        raise own
    if defects:
        raise RuntimeError(f"rank {defects[0][0]} failed: {defects[0][1]}") from own
    raise UserError(failed[0][2]) from own


def _message(error: Exception) -> str:
    """One line that says what is wrong; for a system error the file comes first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
