"""Ranks, sums over ranks: the only user of torch.distributed besides Accelerate.

Every function also works in a single process without a process group. Numbers and strings travel
on the CPU (gloo), so that agreeing on them never waits for the GPU's queue.
"""

import functools
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


def from_first_rank(value: str) -> str:
    """Rank 0's string, on every rank. Plain bytes: nothing is pickled."""
    if world_size() == 1:
        return value
    data = torch.tensor(list(value.encode()), dtype=torch.uint8)
    length = torch.tensor([len(data)])
    dist.broadcast(length, src=0, group=_host_group())
    if rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, src=0, group=_host_group())
    return bytes(data.tolist()).decode()


class FirstRankFailed(ValueError):
    """Raised on the other ranks where rank 0 raised ValueError; rank 0 says it, they need not."""


def on_first_rank(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Calls `action` on rank 0 while the others wait; its result there, None elsewhere.

    A ValueError on rank 0 is raised on every rank, so that all leave together.
    """
    result, fault = None, None
    if rank() == 0:
        try:
            result = action(*args, **kwargs)
        except ValueError as error:
            fault = error
    message = from_first_rank("" if fault is None else str(fault) or "failed")
    if fault is not None:
        raise fault
    if message:
        raise FirstRankFailed(message)
    return result


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
