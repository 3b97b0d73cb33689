"""When a run must stop before its last step: signals, a time limit, a launcher that died."""

import ctypes
import os
import signal
import sys
import time
from types import FrameType

INTERRUPTED = 75
"""Exit code of a run that saved and left before its last step (EX_TEMPFAIL): run it again with --resume."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run to save and leave. USR1 only comes where a launcher passes it on: plain torchrun dies of it."""

_SAME = 1.0
"""Seconds within which another signal is the same request: a launcher, `timeout` or scancel signals a process,
and then its group."""
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class StopRequest:
    """Whether this process has been asked to stop: by a signal, or by having run for `max_hours`.

    Only remembers it: the loop asks between two steps, and stops where any rank was asked. A second signal leaves
    at once, with exit code 128 + its number; the last checkpoint is whole, one being written is dropped.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self._began, self._limit = time.monotonic(), None if max_hours is None else 3600 * max_hours
        self._asked: float | None = None
        self.reason = ""
        """What asked, for people; empty as long as nothing has."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        """Whether to stop before the next step."""
        if not self.reason and self._limit is not None and time.monotonic() - self._began >= self._limit:
            self.reason = f"run.max_hours {self._limit / 3600:g} are over"
        return bool(self.reason)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._asked is None:
            self.reason, self._asked = self.reason or name, time.monotonic()
            _write(f"{name}: saving at the end of this step, then leaving\n")
        elif time.monotonic() - self._asked > _SAME:
            _write(f"{name} again: leaving at once, without saving; the last checkpoint is whole\n")
            os._exit(128 + number)


def _write(line: str) -> None:
    """To standard error from a signal handler, on the first rank: print would fail inside another print."""
    if os.environ.get("RANK", "0") == "0":
        try:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
        except OSError:
            return  # whoever read it has gone; the request counts all the same


def follow_launcher() -> bool:
    """Has the kernel send this process SIGTERM when its launcher dies; True where that took effect.

    torchrun starts every rank in a session of its own: a launcher that is killed (kill -9, out of memory) would
    leave ranks that train on, holding devices and the run folder. Under no launcher nothing is done: a run
    started from a shell may outlive it. Linux only.
    """
    if not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys() or sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) == 0
