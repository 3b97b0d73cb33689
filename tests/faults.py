"""What can happen to a run, made to happen at a chosen step: not bugs of ours (those are in mutants.py)."""

import os
import signal
import time

import torch

from selfsup import dist, opening, saving, train
from selfsup.objectives.base import Output
from selfsup.objectives.byol import BYOL
from selfsup.objectives.mae import MAE
from selfsup.probe.online import OnlineMonitor


class _Infinite(torch.autograd.Function):
    """The identity, with a gradient of infinity."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


def not_finite(what: str, rank: int, first: int, last: int) -> None:
    """Steps first to last (0, 1, ...) go wrong on one rank: a NaN `loss` whose gradient is finite, or an infinite
    `gradient` under a finite loss. By the step, not by how often it was called: a resumed run meets it again."""
    now, seeded = [0], train.seed_model

    def seed_model(seed, step, micro):
        now[0] = step
        seeded(seed, step, micro)

    def wrap(original):
        def forward(self, batch, total):
            output = original(self, batch, total)
            if dist.rank() != rank or not first <= now[0] <= last:
                return output
            if what == "loss":
                return Output(output.loss + torch.nan, output.metrics)
            return Output(_Infinite.apply(output.loss), output.metrics)

        return forward

    train.seed_model = seed_model
    MAE.forward, BYOL.forward = wrap(MAE.forward), wrap(BYOL.forward)


def stuck(rank: int, step: int) -> None:
    """One rank never comes back from its forward pass."""
    original = MAE.noise
    calls = [0]

    def never_comes_back(self, batch):
        calls[0] += 1
        if dist.rank() == rank and calls[0] > step:
            time.sleep(600)
        return original(self, batch)

    MAE.noise = never_comes_back


def slow(rank: int, seconds: float) -> None:
    """One rank takes longer for its forward passes."""
    original = MAE.noise

    def noise(self, batch):
        time.sleep(seconds if dist.rank() == rank else 0)
        return original(self, batch)

    MAE.noise = noise


def signalled_while(doing: str, number: int) -> None:
    """A signal comes to the first rank while it is opening, measuring or saving for the second time."""
    holder, name = {
        "opening": (opening.start, "open_data"),
        "measuring": (OnlineMonitor, "measure"),
        "saving": (saving, "write_checkpoint"),
    }[doing]
    original, calls = getattr(holder, name), [0]

    def during(*arguments, **options):
        calls[0] += 1
        if dist.rank() == 0 and calls[0] == (1 if doing == "opening" else 2):
            os.kill(os.getpid(), signal.Signals(number))
        return original(*arguments, **options)

    setattr(holder, name, during)
