"""Language-model training steps per second: selfsup against transformers, and nanoGPT, on the same work.

    python tools/bench_text.py                                     every model, fp32 and bf16
    python tools/bench_text.py --models mlm-256 --precisions bf16 --compile
    python tools/bench_text.py --models clm-128 --nanogpt ../nanoGPT
    python tools/bench_text.py --models mlm-512 --profile          where our own step spends its time
    python tools/bench_text.py --help

Needs `pip install transformers`. nanoGPT takes part where --nanogpt points to a checkout of it
(git clone https://github.com/karpathy/nanoGPT), for the clm models.

One step is forward, backward and the same fused AdamW, on one ready batch of full rows, the same for all;
nobody has dropout. What differs is how the loss comes about, each side as it is meant to be used:
transformers computes scores of the whole vocabulary at every place of a masked row and ignores 85% of them,
selfsup at the masked places only; for clm everybody computes all of them. transformers takes part twice,
with torch's attention (sdpa) and its own (eager). The sides take turns of about --turn seconds each, in an
order rotated every round. Printed are the median tokens/s, and the median and range of the ratio to the
first one, round by round: ratios hold on a busy machine, single figures do not. MFU: as in bench_mae.py,
from selfsup's FLOPs, so that work on places without a target does not count.

Exits with 1 where a side's loss did not fall or it trains another number of parameters than the rest.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from bench_mae import machine
from bench_mae_measure import Ceiling, Contestant, Precision, clock, results, unfair
from bench_mae_profile import profile_steps, show_profile
from bench_text_peers import SIDES, Model, Shape, Side, batches_of, build, shape_of, takes_part

from selfsup.durable import write_atomically
from selfsup.memory import keep_freed_memory

WARMUP = 2


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    models: tuple[Model, ...] = ("mlm-256", "mlm-512", "clm-128", "clm-384")
    """mlm-256: BERT 256/4/4, mlm-512: 512/8/8, both 32 rows of 128 tokens, 15% masked; clm-128: nanoGPT's on a
    CPU, 128/4/4, 12 rows of 64 characters; clm-384: its on a GPU, 384/6/6, 64 rows of 256."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """bf16 is autocast."""
    only: tuple[Side, ...] = ()
    """Sides, in this order; none named: all there are, or selfsup with --profile."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT."""
    vocab_size: int | None = None
    """Tokens of the vocabulary; none: 8192 for mlm (BERT's is 30522), 65 for clm."""
    batch_size: int | None = None
    """Rows a step; none: the model's."""
    attention: Literal["auto", "reference", "tiled", "torch", "flex"] = "auto"
    """selfsup's kernel."""
    compile: bool = False
    """torch.compile every side."""
    rounds: int = 5
    """Timed turns of each side, after two that are not counted."""
    turn: float = 0.5
    """Seconds of a turn: as many steps as take so long, at least one."""
    threads: int = 1
    """Torch threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    allocator: Literal["as-it-comes", "kept"] = "as-it-comes"
    """kept: the process keeps the memory it frees, as in selfsup train on a CPU; for all sides."""
    profile: bool = False
    """No contest: the share of each kind of operator in the step."""
    report: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write everything measured to this file."""

    def check(self) -> None:
        """Raises ValueError for options that do not go together."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device; leave it out")
        least = min(self.rounds, self.threads, self.batch_size or 1, self.vocab_size or 8)
        if least < 1 or (self.vocab_size or 8) < 8 or self.turn < 0:
            raise ValueError(
                "--rounds, --threads, --batch-size: expected 1 or more, --vocab-size 8, --turn 0"
            )
        if self.nanogpt is not None and not (self.nanogpt / "model.py").is_file():
            raise ValueError(f"--nanogpt {self.nanogpt}: no model.py in it; name a checkout of nanoGPT")
        if "nanogpt" in self.only and self.nanogpt is None:
            raise ValueError("--only nanogpt: needs --nanogpt CHECKOUT")
        if self.profile and self.compile:
            raise ValueError("--profile: compiled kernels hide their operators; leave out --compile")
        if self.report is not None and not self.report.absolute().parent.is_dir():
            raise ValueError(f"--json {self.report}: its folder does not exist; make it first")

    def sides(self, model: Model) -> tuple[Side, ...]:
        """Who takes part in a contest."""
        named = self.only or (("selfsup",) if self.profile else tuple(SIDES))
        return tuple(side for side in named if takes_part(side, model, self.nanogpt))


def main(options: Options) -> int:
    """Runs the contests; returns the exit code. Raises ValueError for options that do not go together."""
    options.check()
    torch.set_num_threads(options.threads)
    if options.allocator == "kept" and not keep_freed_memory():
        raise ValueError("--allocator kept: this C library has no such switch; leave it out")
    device = torch.device(options.device)
    print(
        f"{options.device}, {options.threads} threads, {'compiled' if options.compile else 'eager'}, allocator "
        f"{options.allocator}, attention {options.attention}, {options.rounds} rounds, torch {torch.__version__}",
        flush=True,
    )
    facts, problems = [], []
    for model in options.models:
        for precision in options.precisions:
            found = run(options, model, precision, device)
            facts.append(found)
            problems += found["problems"]
    for problem in problems:
        print(f"not a fair contest: {problem}", file=sys.stderr)
    if options.report is not None:
        write_atomically(
            options.report, json.dumps({**machine(options, device), "contests": facts}, indent=1).encode()
        )
    return 1 if problems else 0


def run(options: Options, model: Model, precision: Precision, device: torch.device) -> dict[str, Any]:
    """One contest: printed, and everything measured, ready for JSON."""
    shape = shape_of(model, options.vocab_size, options.batch_size)
    batches = batches_of(shape, device)
    contestants: dict[str, Contestant] = {}
    for side in options.sides(model):
        torch.manual_seed(0)
        module = build(side, shape, options.attention, options.nanogpt).to(device)
        if options.compile:
            module.compile()
        contestants[side] = Contestant(module, giver(batches[side == "selfsup"]), precision)
    if not contestants:
        raise ValueError(f"--only: nobody named takes part in {model}")
    words = f"{model}, {shape}, {precision}"
    print(f"\n{words}", flush=True)
    facts = {"model": model, "precision": precision, "shape": dataclasses.asdict(shape), "problems": []}
    if options.profile:
        profiles = {side: profile_steps(c.step, options.rounds, device) for side, c in contestants.items()}
        for side, groups in profiles.items():
            show_profile(SIDES[side], groups)
        return {**facts, "profile": profiles}
    ceiling = Ceiling(precision, device)
    take_turns(contestants, ceiling, options.rounds, options.turn, device)
    flops = shape.objective.build(shape.encoder(options.attention)).flops_per_sample()
    facts |= per_token(results(contestants, ceiling, shape.batch_size, flops), shape)
    show(facts)
    return {**facts, "problems": [f"{words}: {problem}" for problem in unfair(facts["contestants"])]}


def giver(batch: Any) -> Callable[[], Any]:
    """What gives the same batch again and again."""
    return lambda: batch


def take_turns(
    contestants: dict[str, Contestant], ceiling: Ceiling, rounds: int, seconds: float, device: torch.device
) -> None:
    """A turn of each a round, as many steps as its last warm-up step fits into `seconds`; each round another begins.

    The time of a turn is kept as seconds a step.
    """
    order, steps = list(contestants.values()), {}
    for contestant in order:
        for _ in range(WARMUP):
            began = clock(device)
            contestant.step()
            steps[id(contestant)] = max(1, math.ceil(seconds / (clock(device) - began)))
    for _ in range(rounds):
        ceiling.measure()
        for contestant in order:
            began = clock(device)
            for _ in range(steps[id(contestant)]):
                contestant.step()
            contestant.seconds.append((clock(device) - began) / steps[id(contestant)])
        order = order[1:] + order[:1]


def per_token(facts: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """The figures of `results`, where a sample is a row, by token."""
    facts["flops_per_token"] = facts.pop("flops_per_image") / shape.length
    for row in facts["contestants"].values():
        row["tokens_per_second"] = row.pop("images_per_second") * shape.length
    return facts


def show(facts: dict[str, Any]) -> None:
    """The table."""
    ceiling = facts["ceiling"]
    print(
        f"{facts['flops_per_token'] / 1e6:.3g} MFLOP a token; ceiling {ceiling['flops_per_second'] / 1e12:.3f} "
        f"TFLOP/s, best of a round {min(ceiling['rounds']) / 1e12:.3f} to {max(ceiling['rounds']) / 1e12:.3f}"
    )
    print(f"{'':34s}tokens/s  ratio (range)            MFU   of peak  parameters  loss")
    for side, row in facts["contestants"].items():
        ratio = f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        peak = "unknown" if row["mfu_of_peak"] is None else f"{row['mfu_of_peak']:.1%}"
        print(
            f"{SIDES[side]:34s}{row['tokens_per_second']:8.0f}  {ratio:20s}{row['mfu']:8.1%}  {peak:>8s}  "
            f"{row['parameters'] / 1e6:8.3f} M  {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}"
        )


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options, description=__doc__)))
    except ValueError as error:
        sys.exit(f"bench_text: {error}")
