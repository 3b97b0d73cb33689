"""A profile on demand: torch.profiler over a few steps, as a trace to look at and a table to read."""

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from selfsup import dist
from selfsup.durable import fsync_path, write_atomically


def parse_range(text: str) -> range:
    """`10:20` as range(10, 20). Raises ValueError for anything else and for an empty range."""
    first, colon, last = text.partition(":")
    whole = colon and all(part.isascii() and part.isdecimal() for part in (first, last))
    if not whole or int(first) >= int(last):
        raise ValueError(f"expected FIRST:LAST, two steps with FIRST < LAST, like 10:20, got {text!r}")
    return range(int(first), int(last))


class StepProfiler:
    """Profiles the steps of a range on rank 0 and writes what it found below `folder`.

    Step n is the one that takes the run from n steps done to n + 1. Written are `trace-FIRST-LAST.json.gz`
    (Chrome's trace format, for ui.perfetto.dev; every step is a `ProfilerStep#n`) and `top-FIRST-LAST.txt`,
    the operators by the time they took themselves. A range that began before this process is profiled from
    where the process is; one that an interruption cuts is written as far as it came.
    """

    def __init__(self, folder: Path, steps: range):
        self._folder, self._steps = folder, steps
        self._began: int | None = None  # on every rank
        self._profile: profile | None = None  # on rank 0

    def before(self, step: int) -> None:
        """Called before each step, on every rank. Raises ValueError or OSError where rank 0 cannot write."""
        if step not in self._steps:
            self.close(step)
        elif self._began is None:
            self._began = step
            if dist.rank() == 0:
                self._profile = _start(step)
        elif self._profile is not None:
            self._profile.step()

    def close(self, step: int) -> None:
        """Writes the running profile, if there is one, of the steps before `step`; on every rank."""
        if self._began is not None:
            dist.on_first_rank(self._write, step)
            self._began = self._profile = None

    def _write(self, step: int) -> None:
        assert self._profile is not None, "rank 0 has begun"
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        trace = self._folder / f"trace-{self._began}-{step}.json.gz"
        temporary = trace.with_name(f".tmp-{trace.name}")  # torch compresses what ends in .gz
        self._profile.export_chrome_trace(str(temporary))
        fsync_path(temporary)
        os.replace(temporary, trace)
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)
        top = self._folder / f"top-{self._began}-{step}.txt"
        write_atomically(top, table.encode())
        print(f"profiled steps {self._began}:{step}: {trace} and {top.name} beside it", flush=True)


def _start(step: int) -> profile:
    """A running profile whose first step is called `ProfilerStep#step`."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    else:  # a CUDA build of torch would report the missing driver as an error
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    # Only with a schedule does torch label the steps; this one records until it is stopped.
    running = profile(activities=activities, schedule=lambda _: ProfilerAction.RECORD)
    running.step_num = step
    running.start()
    return running
