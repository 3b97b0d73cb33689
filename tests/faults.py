"""What can happen to a run, made to happen at a chosen step: not bugs of ours (those are in mutants.py)."""

import os
import signal
import time

import torch

from selfsup import dist, opening, saving, start, train
from selfsup.objectives.base import Output
from selfsup.objectives.byol import BYOL
from selfsup.objectives.mae import MAE
from selfsup.probe.online import OnlineMonitor
from selfsup.sharding import local


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


def one_broken_gradient(step: int) -> None:
    """At that step (0, 1, ...) one parameter's gradient is NaN."""
    original, calls = train.gradient_norm, [0]

    def gradient_norm(accelerator, objective):
        calls[0] += 1
        if calls[0] == step + 1:
            objective.encoder.norm.weight.grad[0] = torch.nan
        return original(accelerator, objective)

    train.gradient_norm = gradient_norm


def cannot_flush(rank: int) -> None:
    """From the second checkpoint on one rank's files do not reach the disk: a quota, as network file systems tell it."""
    original, calls = saving._flush, [0]

    def flush(path):
        if path.suffix == ".safetensors":
            calls[0] += 1
            if dist.rank() == rank and calls[0] > 1:
                raise OSError(122, "Disk quota exceeded")
        return original(path)

    saving._flush = flush


def broken_part(rank: int) -> None:
    """At the second checkpoint one rank's part of the weights holds a NaN."""
    original, calls = saving.snapshot, [0]

    def snapshot(state, copy):
        calls[0] += 1
        if dist.rank() == rank and calls[0] == 2:
            with torch.no_grad():
                local(dict(state.objective.named_parameters())["encoder.norm.weight"])[:1] = torch.nan
        return original(state, copy)

    saving.snapshot = snapshot


def slow_writes(seconds: float) -> None:
    """Every checkpoint takes long to write."""
    original = saving.write_checkpoint

    def write_checkpoint(*arguments):
        time.sleep(seconds)
        return original(*arguments)

    saving.write_checkpoint = write_checkpoint


def half_precision(scale: float) -> None:
    """A gradient scaler in the loop, as fp16 has it, on a CPU."""
    original = start.accelerator

    def accelerator(recipe):
        made = original(recipe)
        made.scaler, made.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True
        type(made).mixed_precision = property(lambda self: "fp16")
        return made

    start.accelerator = accelerator


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
