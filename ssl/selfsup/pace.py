"""How long each process takes for its own part of a step, and which one is much slower than the others."""

import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from selfsup import dist

SLOW = 2.0
"""A process is named where its own part takes so many times as long as the others' median."""
_LEAST = 0.01
"""Seconds a step by which it must be slower, too: below that it is noise."""


class Pace:
    """Adds up what a process does alone: waiting for its own data, and forward passes.

    A step as a whole takes the same time on every process, since the fast ones wait for the slow ones in the
    gradients' sum. Time in our own collectives inside a forward pass (negatives, batch norm) is taken out on a
    CPU; on CUDA, and in fully_shard's gathering of weights, it is not: there only slow data tells.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds, self._steps = 0.0, 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._named: int | None = None

    @contextmanager
    def own(self) -> Iterator[None]:
        """Around a forward pass."""
        if self._cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))
            return
        began, shared = time.perf_counter(), dist.seconds_in_collectives()
        yield
        self._seconds += time.perf_counter() - began - (dist.seconds_in_collectives() - shared)

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for this process's loader, once a step."""
        self._seconds += seconds
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Metrics of the steps since the last call, the same on every process (a collective); then starts anew.

        slowest_rank, and slowest_ratio: its own part over the median of the others'. Prints where that is above
        SLOW, once for a process in a row. Empty in a single process.
        """
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        mine = self._seconds / max(1, self._steps)
        self._seconds, self._steps, self._events = 0.0, 0, []
        if dist.world_size() == 1:
            return {}
        told = [line.split(" ", 1) for line in dist.gather_texts(f"{mine} {platform.node()}")]
        seconds = [float(number) for number, _ in told]
        slow = max(range(len(seconds)), key=seconds.__getitem__)
        others = statistics.median(s for rank, s in enumerate(seconds) if rank != slow)
        ratio = seconds[slow] / max(others, 1e-9)
        is_slow = ratio > SLOW and seconds[slow] - others > _LEAST
        if is_slow and slow != self._named and dist.rank() == 0:
            print(
                f"process {slow} on {told[slow][1]} is slow: its own part of a step takes {1e3 * seconds[slow]:.0f} ms, "
                f"the others' {1e3 * others:.0f} ms; all wait for it",
                flush=True,
            )
        self._named = slow if is_slow else None
        return {"slowest_rank": slow, "slowest_ratio": ratio}
