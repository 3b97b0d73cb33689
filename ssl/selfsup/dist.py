"""Ranks, sums over ranks: the only user of torch.distributed besides Accelerate.

Every function also works in a single process without a process group. Numbers travel on the
CPU (gloo), so that agreeing on them never waits for the GPU's queue.
"""

import functools
import typing
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache
def _host_group() -> dist.ProcessGroup | None:
    """A gloo group; the default group (None) where that is gloo already."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def sum_over_ranks(*values: float) -> tuple[float, ...]:
    """The sums of Python numbers over all ranks, in float64 (exact for counts below 2**53)."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=_host_group())
    return tuple(total.tolist())


class OtherRankFailed(ValueError):
    """Raised on the ranks that are well where another one failed; that one says why, they need not."""


def together(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `action` on every rank; a ValueError or OSError on any of them ends the call on all."""
    result, fault = None, None
    try:
        result = action(*args, **kwargs)
    except (ValueError, OSError) as error:
        fault = error
    raise_together(fault, sum_over_ranks(fault is not None)[0])
    return typing.cast(T, result)


def on_first_rank(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """As `together`, but only rank 0 calls `action`; its result there, None elsewhere."""
    return together(action, *args, **kwargs) if rank() == 0 else together(lambda: None)


def raise_together(fault: Exception | None, faults: float) -> None:
    """Raises this rank's fault, or OtherRankFailed where `faults` ranks have one and this has none."""
    if fault is not None:
        raise fault
    if faults:
        raise OtherRankFailed(f"{faults:.0f} other processes failed")


def leave() -> None:
    """Ends the process group, if there is one. Not after a fault: others may wait in a collective."""
    if dist.is_initialized():
        dist.destroy_process_group()
