"""A watchdog: a run that makes no step for too long says where every rank stands, and ends."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

STALLED = 76
"""Exit code of a rank whose watchdog ended it."""


class Watchdog:
    """A thread that ends the process where `beat` has not been called for `minutes`.

    It prints the stack of every thread first, with the rank, and calls `on_stall` (the outcome file). Each rank
    has its own: a rank that hangs in a collective prints where it waits, the one it waits for prints what it
    does. A process that is stopped (SIGSTOP) or holds Python's lock in a C call prints nothing; the others do.
    """

    def __init__(self, minutes: float, rank: int, on_stall: Callable[[float], None]) -> None:
        """minutes: 0 for no watchdog. on_stall: gets the seconds without a beat; its OSErrors are printed."""
        self._limit, self._rank, self._on_stall = 60 * minutes, rank, on_stall
        self._last, self._closed = time.monotonic(), threading.Event()
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Something was achieved: a step, a checkpoint, a measurement."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(self._limit / 10, 10)):
            silent = time.monotonic() - self._last
            if silent >= self._limit:
                self._end(silent)

    def _end(self, silent: float) -> None:
        with tempfile.TemporaryFile("w+") as file:  # one write below: other ranks print theirs at the same time
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        title = f"[rank {self._rank}] no step for {silent:.0f} s (run.stall_minutes), every thread stands at:"
        print(f"{title}\n{stacks}", file=sys.stderr, flush=True)
        try:
            self._on_stall(silent)
        except OSError as error:
            print(f"[rank {self._rank}] cannot write the outcome: {error}", file=sys.stderr, flush=True)
        os._exit(STALLED)  # the main thread hangs: nothing gentler would end it
