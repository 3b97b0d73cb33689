"""A watchdog: a run that makes no step for too long says where every rank stands, and ends."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from selfsup import dist
from selfsup.run_folder import write_outcome

STALLED = 76
"""Exit code of a rank whose watchdog ended it."""


class Watchdog:
    """A thread that ends the process where `beat` has not been called for `minutes`.

    It prints the stack of every thread first, with the rank, and writes outcome.json. Each rank has its own: a
    rank that hangs in a collective prints where it waits, the one it waits for prints what it does. A process
    that is stopped (SIGSTOP) or holds Python's lock in a C call prints nothing; the others do.
    """

    def __init__(self, run_dir: Path, minutes: float, step: int) -> None:
        """minutes: 0 for no watchdog. step: that the run begins at."""
        self._run_dir, self._limit, self._rank = run_dir, 60 * minutes, dist.rank()
        self._last, self._step, self._closed = time.monotonic(), step, threading.Event()
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """The run has come to this step, or to its checkpoint."""
        self._last, self._step = time.monotonic(), step

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(self._limit / 10, 10)):
            silent = time.monotonic() - self._last
            if silent >= self._limit:
                self._end(silent)

    def _end(self, silent: float) -> None:
        try:
            write_outcome(self._run_dir, "stalled", self._step, reason=f"no step for {silent:.0f} s")
            with tempfile.TemporaryFile("w+") as file:  # one write below: other ranks print theirs at the same time
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                stacks = file.read()
            title = f"[rank {self._rank}] no step for {silent:.0f} s (run.stall_minutes), every thread stands at:"
            print(f"{title}\n{stacks}", file=sys.stderr, flush=True)
        except OSError:  # a full disk, nobody there to read: the stacks as far as they go
            faulthandler.dump_traceback(2, all_threads=True)
        finally:
            os._exit(STALLED)  # the main thread hangs: nothing gentler would end it
