"""What bench_mae.py and bench_simclr.py measure: steps taken in turn, matrix products between them, the figures
made of both."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfsup import flops
from selfsup.optim import AdamWConfig, build_optimizer

Precision = Literal["fp32", "bf16"]
WARMUP = 2


def clock(device: torch.device) -> float:
    """Seconds, when all that was queued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Contestant:
    """A module, its optimizer, and what its steps left behind."""

    def __init__(self, module: nn.Module, images: Callable[[], Any], precision: Precision):
        self.module, self.images, self.precision = module, images, precision
        self.optimizer = build_optimizer(AdamWConfig(), module)
        self.parameters = 0
        """Values in the tensors that got a gradient in the first step."""
        self.losses: list[Tensor] = []
        """Of all steps."""
        self.seconds: list[float] = []
        """Of the timed steps."""

    def step(self) -> None:
        """Forward, backward, AdamW; with `images` fetching the batch."""
        images, device = self.images(), next(self.module.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.module(images)
        loss.backward()
        if not self.losses:
            trained = [p for p in self.module.parameters() if p.grad is not None]
            self.parameters = sum(p.numel() for p in trained)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())


class Ceiling:
    """The fastest square matrix product of this machine, in FLOP/s."""

    def __init__(self, precision: Precision, device: torch.device):
        self.sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.matrices = [torch.randn(n, n, device=device).to(dtype) for n in self.sizes]
        self.rates: list[float] = []
        """The best of each round."""

    def measure(self) -> None:
        """Two products of every size."""
        rates = []
        for matrix in self.matrices * 2:
            began = clock(matrix.device)
            torch.mm(matrix, matrix)
            rates.append(2 * len(matrix) ** 3 / (clock(matrix.device) - began))
        self.rates.append(max(rates))


def interleave(
    contestants: dict[str, Contestant], ceiling: Ceiling, rounds: int, device: torch.device
) -> None:
    """One step of each a round, after `WARMUP` rounds that do not count; each round another begins."""
    order = list(contestants.values())
    for turn in range(WARMUP + rounds):
        ceiling.measure()
        for contestant in order:
            began = clock(device)
            contestant.step()
            if turn >= WARMUP:
                contestant.seconds.append(clock(device) - began)
        order = order[1:] + order[:1]


def summarise(
    seconds: dict[str, list[float]],
    ceiling: float,
    peak: float | None,
    batch_size: int,
    flops_per_image: float,
) -> dict[str, dict[str, Any]]:
    """Figures of each contestant from its seconds per step, round by round.

    `images_per_second` is at the median; `ratios` are the first contestant's seconds over its own in the
    same round, `ratio` their median; `mfu` is FLOP/s at the median over `ceiling`, `mfu_of_peak` over
    `peak` (both FLOP/s), None where the peak is unknown.
    """
    first, figures = next(iter(seconds.values())), {}
    for name, mine in seconds.items():
        ratios = [base / own for base, own in zip(first, mine, strict=True)]
        rate = batch_size / statistics.median(mine)
        figures[name] = {
            "images_per_second": rate,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "mfu": rate * flops_per_image / ceiling,
            "mfu_of_peak": None if peak is None else rate * flops_per_image / peak,
            "seconds": mine,
        }
    return figures


def results(
    contestants: dict[str, Contestant], ceiling: Ceiling, batch_size: int, flops_per_image: float
) -> dict[str, Any]:
    """Everything measured, ready for JSON."""
    some = next(iter(contestants.values()))
    peak, top = flops.peak(ceiling.matrices[0].device, some.precision), max(ceiling.rates)
    seconds = {name: contestant.seconds for name, contestant in contestants.items()}
    rows = summarise(seconds, top, peak, batch_size, flops_per_image)
    for name, contestant in contestants.items():
        rows[name]["parameters"] = contestant.parameters
        rows[name]["losses"] = [loss.item() for loss in contestant.losses]
    return {
        "flops_per_image": flops_per_image,
        "ceiling": {"sizes": ceiling.sizes, "flops_per_second": top, "rounds": ceiling.rates},
        "peak": peak,
        "contestants": rows,
    }


def unfair(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What makes a contest worthless: a loss that did not fall, parameters more than 1% off the median."""
    problems = []
    size = statistics.median(row["parameters"] for row in rows.values())
    for name, row in rows.items():
        first, last = row["losses"][0], row["losses"][-1]
        if not last < first:
            problems.append(f"{name}: its loss went from {first:.4f} to {last:.4f}, so it does not train")
        if abs(row["parameters"] - size) > 0.01 * size:
            problems.append(f"{name}: trains {row['parameters']} parameters, the median is {size:.0f}")
    return problems
