"""Ranks, sums over ranks: the only user of torch.distributed besides Accelerate.

Every function also works in a single process without a process group. Numbers travel on the
CPU (gloo), so that agreeing on them never waits for the GPU's queue; tensors of a model travel in
the default group (NCCL or gloo), on the device they lie on.
"""

import contextlib
import functools
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache
def host_group(purpose: str = "") -> dist.ProcessGroup | None:
    """A gloo group of all ranks, one for each purpose; None in a single process.

    What another thread sends needs a purpose of its own: messages of one group must come in one order on all
    ranks. Making a group is a collective.
    """
    if world_size() == 1:
        return None
    if not purpose and dist.get_backend() == "gloo":
        return dist.group.WORLD
    return dist.new_group(backend="gloo", timeout=_timeout[0])


_timeout: list[timedelta | None] = [None]


def allow(minutes: float) -> timedelta:
    """Sets how long ranks may wait for each other in the groups that `host_group` makes; before the first is made."""
    _timeout[0] = timedelta(minutes=minutes)
    return _timeout[0]


def sum_over_ranks(*values: float, group: dist.ProcessGroup | None = None) -> tuple[float, ...]:
    """The sums of Python numbers over all ranks, in float64 (exact for counts below 2**53)."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=group or host_group())
    return tuple(total.tolist())


def gather_texts(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """Every rank's text, on every rank."""
    if world_size() == 1:
        return [text]
    group, content = group or host_group(), torch.tensor([*text.encode(), 0], dtype=torch.uint8)  # never empty
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(content)]), group=group)
    longest = max(int(size) for size in sizes)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, torch.nn.functional.pad(content, (0, longest - len(content))), group=group)
    return [bytes(row[: int(size) - 1].tolist()).decode() for row, size in zip(texts, sizes)]


_seconds = [0.0]


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    began = time.perf_counter()
    yield
    _seconds[0] += time.perf_counter() - began


def seconds_in_collectives() -> float:
    """Seconds that this process has spent in `all_gather` and `all_reduce` so far; on CUDA, in starting them."""
    return _seconds[0]


def all_gather(x: Shaped[Tensor, "b *d"]) -> Shaped[Tensor, "world_b *d"]:
    """The tensors of all ranks, rank-major along the first dimension, without gradient. One shape on all ranks."""
    x = x.detach().contiguous()
    if world_size() == 1:
        return x
    gathered = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    with _timed():
        dist.all_gather_into_tensor(gathered, x)
    return gathered


def all_reduce(x: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """The sum of all ranks' tensors, a new tensor without gradient, half precision summed in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
    if world_size() > 1:
        with _timed():
            dist.all_reduce(total)
    return total.to(x.dtype)


class _AllGather(torch.autograd.Function):
    """Forward: every rank's tensor, rank-major. Backward: what every rank's copy of ours received, summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = all_reduce(grads[0])
        b = len(total) // world_size()
        return total[rank() * b : (rank() + 1) * b]


@torch.compiler.disable  # a compiled model breaks its graph here
def all_gather_with_grad(x: Shaped[Tensor, "b *d"]) -> Shaped[Tensor, "world_b *d"]:
    """The tensors of all ranks, rank-major along the first dimension; `x` itself in one process.

    x: any float dtype and device that the default process group carries (gloo and NCCL carry bf16),
    of the same shape on every rank: nothing checks that, and the library ends the process or gives
    garbage where it is not so. All ranks must also agree on whether `x` requires a gradient: the
    backward pass is a collective too.

    The gradient of `x` is the sum over ranks of the gradients of their copies of it. So each rank may
    write down the loss of its own rows against all gathered ones: the sum of the ranks' losses is the
    loss of the global batch, and each rank's gradient is that sum's. With losses scaled by world/total
    (`global_mean`) and DDP's average over ranks this is exactly the gradient of the global mean. A
    gather without gradient that puts its own rows back in, as is common, drops all the other ranks' terms.
    """
    return x if world_size() == 1 else typing.cast(Tensor, _AllGather.apply(x))


class OtherRankFailed(ValueError):
    """Raised on the ranks that are well where another one failed; that one says why, they need not."""


def together(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `action` on every rank; a ValueError or OSError on any of them ends the call on all."""
    result, fault = None, None
    try:
        result = action(*args, **kwargs)
    except (ValueError, OSError) as error:
        fault = error
    raise_together(fault, sum_over_ranks(float(fault is not None))[0])
    return typing.cast(T, result)


def on_first_rank(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """As `together`, but only rank 0 calls `action`; its result there, None elsewhere."""
    return together(action, *args, **kwargs) if rank() == 0 else together(lambda: None)


def raise_together(fault: Exception | None, faults: float, group: dist.ProcessGroup | None = None) -> None:
    """Raises this rank's fault, or OtherRankFailed, with theirs, where `faults` ranks have one and this has none."""
    if not faults:
        return
    texts = gather_texts("" if fault is None else str(fault), group)
    if fault is not None:
        raise fault
    raise OtherRankFailed("; ".join(f"process {i}: {text}" for i, text in enumerate(texts) if text))


def leave() -> None:
    """Ends the process group, if there is one. Not after a fault: others may wait in a collective."""
    if dist.is_initialized():
        host_group.cache_clear()
        dist.destroy_process_group()


def finish(code: int) -> int:
    """The exit code of a process, for sys.exit; one of several processes ends here and now.

    torch's caches of split tensors keep gloo's threads alive beyond the process group. One of them that wants
    Python's lock while Python takes itself down aborts the process (seen: SIGABRT, once in some sixty runs), and
    the launcher takes a run that had finished for a failure.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
