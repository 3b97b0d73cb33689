"""SimCLR and BYOL: selfsup against lightly on the same work, in speed and in what is learned in a given time.

    python tools/bench_simclr.py speed                           every objective, model, precision and input
    python tools/bench_simclr.py speed --objectives byol --models vit --precisions bf16 --inputs ready
    python tools/bench_simclr.py speed --profile                 where our own step spends its time
    python tools/bench_simclr.py learn CONFIG --minutes 30       a recipe trained for a time, then probed
    python tools/bench_simclr.py speed --help

Needs lightly, which is not to change this environment's torch:

    pip install --no-deps --target peers lightly lightning-utilities
    PYTHONPATH=peers python tools/bench_simclr.py ...

speed: a step is forward and backward over two views of each image, the same fused AdamW, BYOL's momentum
update. The sides take turns, in an order rotated every round. Printed are the median images/s (an image is
two views), and the median and range of the ratio to the first side, round by round: ratios hold on a busy
machine, single figures do not. Inputs: `ready`, one batch of views that lies on the device; `loaded`,
views cut from the shards by as many loader processes on both sides; `loader`, these alone, no step. A
turn with a loader starts it anew and ends it, so that no side's processes work in the other's turn; its
first step is not counted. A loader on a core of its own can hide behind the step: `taskset -c 0` before
the command makes everything share one core. MFU: as in bench_mae.py.

Exits with 1 where a side's loss on a ready batch did not fall, or it trains another number of parameters.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from bench_mae import machine, show
from bench_mae_measure import Ceiling, Contestant, Precision, clock, interleave, results, summarise, unfair
from bench_mae_profile import profile_steps, show_profile
from bench_simclr_learn import Learn, learn
from bench_simclr_peers import Side, build, open_batches, require_lightly
from torch import Tensor, nn

from selfsup.data.images import ImageData
from selfsup.data.index import ShardIndex, open_shards
from selfsup.data.views import ViewBatch
from selfsup.durable import write_atomically
from selfsup.encoders import EncoderConfig
from selfsup.encoders.timm import TimmConfig
from selfsup.encoders.vit import ViTConfig
from selfsup.memory import keep_freed_memory
from selfsup.objectives.byol import BYOLConfig
from selfsup.objectives.simclr import SimCLRConfig

Model = Literal["vit", "resnet18"]
Input = Literal["ready", "loaded", "loader"]
# lightly's own sizes for CIFAR-10.
OBJECTIVES = {
    "simclr": SimCLRConfig(temperature=0.5, hidden_dim=512, out_dim=128, num_layers=2),
    "byol": BYOLConfig(momentum=0.996, hidden_dim=1024, out_dim=256),
}
SIDES = {"lightly": "lightly on timm, as documented", "selfsup": "selfsup"}
STEPS = 10_000
"""Of the run that the timed steps pretend to begin: BYOL's momentum depends on it."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Steps per second, ours and lightly's."""

    objectives: tuple[Literal["simclr", "byol"], ...] = ("simclr", "byol")
    """What is trained."""
    models: tuple[Model, ...] = ("vit", "resnet18")
    """vit: ViT-Tiny (192/12/3), 64 px, patch 8; resnet18: 32 px, 3x3 stem without max-pooling."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """bf16 is autocast."""
    inputs: tuple[Input, ...] = ("ready", "loaded")
    """Where the views come from."""
    only: tuple[Side, ...] = ()
    """Sides, in this order; none named: lightly and selfsup, or selfsup with --profile."""
    batch_size: int = 128
    """Images a step; the encoder sees twice as many views."""
    rounds: int = 5
    """Timed turns of each side."""
    steps: int = 3
    """Timed steps of a turn with a loader, ten times as many batches of a loader alone; with a ready batch one."""
    shards: str = "data/cifar10/train"
    """For loaded and loader; see tools/cifar10.py."""
    workers: int = 1
    """Loader processes of each side."""
    threads: int = 1
    """Torch threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    allocator: Literal["as-it-comes", "kept"] = "as-it-comes"
    """kept: the process keeps the memory it frees, as in selfsup train on a CPU; for both sides."""
    profile: bool = False
    """No contest: the share of each kind of operator in the step on a ready batch."""
    report: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write everything measured to this file."""

    def check(self) -> None:
        """Raises ValueError for options that do not go together and where lightly is asked for and missing."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device; leave it out")
        if min(self.rounds, self.steps, self.threads) < 1 or self.workers < 0 or self.batch_size < 2:
            raise ValueError("--rounds, --steps, --threads: expected 1 or more; --workers 0, --batch-size 2")
        if self.report is not None and not self.report.absolute().parent.is_dir():
            raise ValueError(f"--json {self.report}: its folder does not exist; make it first")
        if "lightly" in self.sides():
            require_lightly()

    def sides(self) -> tuple[Side, ...]:
        """Who takes part."""
        return self.only or (("selfsup",) if self.profile else ("lightly", "selfsup"))


def encoder_of(model: Model) -> EncoderConfig:
    """The encoder that both sides train."""
    if model == "vit":
        return ViTConfig(img_size=64, patch_size=8, embed_dim=192, depth=12, num_heads=3)
    return TimmConfig(model="resnet18", img_size=32, stem="cifar")


class Turn(Contestant):
    """A side that takes its turns: of one step on a ready batch, or of a few with a loader of its own."""

    def __init__(self, module: nn.Module, batches: Any, precision: Precision):
        super().__init__(module, lambda: next(batches), precision)
        self.batches = batches

    def step(self) -> None:
        super().step()
        self.module.after_step(len(self.losses), STEPS)

    def turn(self, steps: int, device: torch.device) -> None:
        """Starts the loader, takes one step that does not count and `steps` that do, ends the loader."""
        self.step()
        began = clock(device)
        for _ in range(steps):
            self.step()
        self.seconds.append((clock(device) - began) / steps)
        self.batches.close()


class LoaderOnly(Turn):
    """A side that only fetches its batches."""

    def step(self) -> None:
        self.images()


def speed(options: Speed) -> int:
    """Runs the contests; returns the exit code. Raises ValueError for options that do not go together."""
    options.check()
    torch.set_num_threads(options.threads)
    if options.allocator == "kept" and not keep_freed_memory():
        raise ValueError("--allocator kept: this C library has no such switch; leave it out")
    device = torch.device(options.device)
    needs_shards = not options.profile and set(options.inputs) & {"loaded", "loader"}
    index = open_shards(options.shards) if needs_shards else None
    inputs = ("ready",) if options.profile else options.inputs
    contests = [
        (objective, model, "fp32" if given == "loader" else precision, given)
        for objective in options.objectives
        for model in options.models
        for given in inputs
        for precision in options.precisions
        if given != "loader" or (precision, objective) == (options.precisions[0], options.objectives[0])
    ]
    print(
        f"batch {options.batch_size} (two views each), {options.device}, {options.threads} threads, "
        f"{options.workers} workers, allocator {options.allocator}, {options.rounds} rounds, "
        f"torch {torch.__version__}",
        flush=True,
    )
    facts, problems = [], []
    for contest in contests:
        found = run(options, *contest, index, device)
        facts.append(found)
        problems += found["problems"]
    for problem in problems:
        print(f"not a fair contest: {problem}", file=sys.stderr)
    if options.report is not None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        head = {**machine(options, device), "usable_cpus": cores}
        write_atomically(options.report, json.dumps({**head, "contests": facts}, indent=1).encode())
    return 1 if problems else 0


def run(
    options: Speed,
    objective: str,
    model: Model,
    precision: Precision,
    given: Input,
    index: ShardIndex | None,
    device: torch.device,
) -> dict[str, Any]:
    """One contest: printed, and everything measured, ready for JSON."""
    config, encoder = OBJECTIVES[objective], encoder_of(model)
    contestants: dict[str, Turn] = {}
    for side in options.sides():
        torch.manual_seed(0)
        module = build(side, config, encoder).to(device)
        if given == "ready":
            batches: Any = ready(side, encoder, options.batch_size, device)
        else:
            data = ImageData(shards=options.shards, views="simclr-32")
            batches = open_batches(side, data, index, encoder, options.batch_size, options.workers, device)
        taker = LoaderOnly if given == "loader" else Turn
        contestants[side] = taker(module, batches, precision)
    words = f"{objective}, {model}, {precision}, views {'ready' if given == 'ready' else 'from a loader'}"
    if given == "loader":
        words = f"{model}, views of {encoder.img_size} px from the loader alone"
    print(f"\n{words}", flush=True)
    facts = {"objective": objective, "model": model, "precision": precision, "input": given, "problems": []}
    if options.profile:
        profiles = {side: profile_steps(c.step, options.rounds, device) for side, c in contestants.items()}
        for side, groups in profiles.items():
            show_profile(side, groups)
        return {**facts, "profile": profiles}
    if given == "loader":
        take_turns(contestants, options.rounds, 10 * options.steps, device)  # a batch is quickly cut
        return {**facts, "contestants": show_loaders(contestants, options.batch_size)}
    ceiling = Ceiling(precision, device)
    if given == "ready":
        interleave(contestants, ceiling, options.rounds, device)
    else:
        take_turns(contestants, options.rounds, options.steps, device, ceiling)
    flops = config.build(encoder).flops_per_sample()
    facts |= results(contestants, ceiling, options.batch_size, flops)
    show(facts, SIDES)
    rows = facts["contestants"]
    if given == "loaded":  # every batch is another: a few steps need not lower the loss, only keep it finite
        rows = {side: {**row, "losses": [torch.inf, row["losses"][-1]]} for side, row in rows.items()}
    return {**facts, "problems": [f"{words}: {problem}" for problem in unfair(rows)]}


def take_turns(
    contestants: dict[str, Turn],
    rounds: int,
    steps: int,
    device: torch.device,
    ceiling: Ceiling | None = None,
) -> None:
    """A turn of each a round; each round another begins."""
    order = list(contestants.values())
    for _ in range(rounds):
        if ceiling is not None:
            ceiling.measure()
        for contestant in order:
            contestant.turn(steps, device)
        order = order[1:] + order[:1]


def show_loaders(contestants: dict[str, Turn], batch_size: int) -> dict[str, dict[str, Any]]:
    """Prints and returns the figures of loaders that fed no one."""
    seconds = {side: contestant.seconds for side, contestant in contestants.items()}
    rows = summarise(seconds, ceiling=1.0, peak=None, batch_size=batch_size, flops_per_image=0.0)
    print(f"{'':46s}images/s  ratio (range)")
    for side, row in rows.items():
        del row["mfu"], row["mfu_of_peak"]
        span = f"({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        print(f"{SIDES[side]:46s}{row['images_per_second']:8.1f}  {row['ratio']:.2f} {span}")
    return rows


def ready(side: Side, encoder: EncoderConfig, batch_size: int, device: torch.device) -> Iterator[Any]:
    """The same two views of every image again and again: what an image has, and noise of each view."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch_size, encoder.in_chans, encoder.img_size, encoder.img_size)
    image, *noise = torch.randn(shape, generator=generator)  # (b, c, h, w) each
    views = [(image + 0.5 * each).to(device) for each in noise]
    batch = views if side == "lightly" else view_batch(views)
    while True:
        yield batch


def view_batch(views: list[Tensor]) -> ViewBatch:
    """The views of samples 0 .. b-1 as our objectives take them."""
    rows = torch.arange(len(views[0]), device=views[0].device)
    return ViewBatch(tuple(views), 0, torch.zeros_like(rows), rows, rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code. What `learn` does not know is an override of its recipe."""
    options, rest = tyro.cli(Speed | Learn, description=__doc__, args=arguments, return_unknown_args=True)
    if isinstance(options, Learn):
        return learn(options, rest)
    if rest:
        raise ValueError(f"speed: no such option: {' '.join(rest)}; see speed --help")
    return speed(options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"bench_simclr: {error}")
