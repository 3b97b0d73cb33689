"""MAE training steps per second: selfsup against transformers, lightly and timm on the same work.

    python tools/bench_mae.py                                  ViT-Tiny, 64 px, patch 8, batch 128, bf16
    python tools/bench_mae.py --preset small                   ViT-Small, 224 px, patch 16, batch 16
    python tools/bench_mae.py --only transformers selfsup      ratios are to the first one named
    python tools/bench_mae.py --profile                        where our own step spends its time
    python tools/bench_mae.py --shards data/cifar10/train      end to end from shards against the pure step
    python tools/bench_mae.py --help

Needs `pip install transformers "lightly>=1.6"`; a contestant whose library is missing is left out,
and the output says so.

One step is forward, backward and fused AdamW on the same shapes, mask ratio and decoder. The
contestants take turns, in an order rotated every round. Printed are the median images/s, and the
median and range of the ratio to the first one, round by round: ratios hold on a busy machine, single
figures do not. MFU is the model's FLOPs (selfsup.flops, the same for all) at the median rate, over the
fastest square matrix product of the run, timed before every round in the same dtype on the same threads.
Exits with 1 where a contestant's loss did not fall or it trains another number of parameters than the rest.
"""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from bench_mae_measure import Ceiling, Contestant, Precision, interleave, results, unfair
from bench_mae_peers import WORDS, Name, build
from bench_mae_profile import profile_steps, show_profile
from torch import Tensor

from selfsup.config import validate
from selfsup.data.images import ImageData, train_batches
from selfsup.data.index import open_shards
from selfsup.data.order import BatchPlan
from selfsup.durable import write_atomically
from selfsup.encoders.vit import ViTConfig
from selfsup.memory import keep_freed_memory
from selfsup.objectives.mae import MAEConfig
from selfsup.run_folder import git_revision

PRESETS = {
    "tiny": {"img_size": 64, "patch_size": 8, "embed_dim": 192, "num_heads": 3, "batch_size": 128},
    "small": {"img_size": 224, "patch_size": 16, "embed_dim": 384, "num_heads": 6, "batch_size": 16},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    preset: Literal["tiny", "small"] = "tiny"
    """tiny: ViT-Tiny, 64 px, patch 8, batch 128; small: ViT-Small, 224 px, patch 16, batch 16."""
    img_size: int | None = None
    """Image side in pixels; none: the preset's, as for the next four."""
    patch_size: int | None = None
    """Patch side in pixels."""
    embed_dim: int | None = None
    """Encoder width."""
    num_heads: int | None = None
    """Encoder heads."""
    batch_size: int | None = None
    """Images per step."""
    depth: int = 12
    """Encoder blocks."""
    decoder_embed_dim: int = 512
    """Decoder width."""
    decoder_depth: int = 8
    """Decoder blocks."""
    decoder_num_heads: int = 16
    """Decoder heads."""
    only: tuple[Name, ...] = ()
    """Contestants, in this order; none named: all, or selfsup with --profile."""
    precision: Precision = "bf16"
    """bf16 is autocast."""
    rounds: int = 5
    """Timed steps of each contestant, after two that are not counted."""
    threads: int = 1
    """Torch threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    compile: bool = False
    """torch.compile every contestant."""
    allocator: Literal["as-it-comes", "kept"] = "as-it-comes"
    """kept: the process keeps the memory it frees, as in selfsup train on a CPU; for all contestants."""
    shards: str | None = None
    """A folder of shards: compare our step on ready tensors with our step fed from it."""
    profile: bool = False
    """No contest: the share of each kind of operator in the step."""
    report: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Write everything measured to this file."""

    def configs(self) -> tuple[MAEConfig, ViTConfig, int]:
        """Objective, encoder and batch size. Raises ValueError for sizes that do not fit."""
        given = {key: getattr(self, key) for key in PRESETS[self.preset]}
        sizes = PRESETS[self.preset] | {key: value for key, value in given.items() if value is not None}
        batch_size = sizes.pop("batch_size")
        vit = validate(ViTConfig, {**sizes, "depth": self.depth})
        decoder = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
        mae = validate(MAEConfig, {key: getattr(self, key) for key in decoder})
        mae.check(vit)
        return mae, vit, batch_size

    def check(self) -> None:
        """Raises ValueError for options that do not go together."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device; leave it out")
        if self.rounds < 1 or self.threads < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError("--rounds, --threads, --batch-size: expected 1 or more")
        if self.shards is not None and (self.only or self.profile):
            raise ValueError("--shards compares selfsup with itself; leave out --only and --profile")
        if self.profile and self.compile:
            raise ValueError("--profile: compiled kernels hide their operators; leave out --compile")
        if self.report is not None and not self.report.absolute().parent.is_dir():
            raise ValueError(f"--json {self.report}: its folder does not exist; make it first")


def main(options: Options) -> int:
    """Runs the contest; returns the exit code. Raises ValueError for options that do not go together."""
    mae, vit, batch_size = options.configs()
    options.check()
    torch.set_num_threads(options.threads)
    if options.allocator == "kept" and not keep_freed_memory():
        raise ValueError("--allocator kept: this C library has no such switch; leave it out")
    device = torch.device(options.device)
    flops_per_image = mae.build(vit).flops_per_sample()
    print(
        f"ViT {vit.embed_dim}/{vit.depth}/{vit.num_heads}, {vit.img_size} px, patch {vit.patch_size}, decoder "
        f"{mae.decoder_embed_dim}/{mae.decoder_depth}/{mae.decoder_num_heads}, batch {batch_size}, "
        f"{flops_per_image / 1e9:.3g} GFLOP an image; {options.precision}, {options.device}, "
        f"{options.threads} threads, {'compiled' if options.compile else 'eager'}, allocator {options.allocator}, "
        f"{options.rounds} rounds, torch {torch.__version__}",
        flush=True,
    )
    contestants, left_out = enter(options, mae, vit, batch_size, device)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if not contestants:
        raise ValueError("--only: the libraries of all contestants are missing")
    problems: list[str] = []
    if options.profile:
        found = {name: profile_steps(c.step, options.rounds, device) for name, c in contestants.items()}
        for name, groups in found.items():
            show_profile(WORDS[name], groups)
        facts = {"profile": found}
    else:
        ceiling = Ceiling(options.precision, device)
        interleave(contestants, ceiling, options.rounds, device)
        facts = results(contestants, ceiling, batch_size, flops_per_image)
        show(facts, WORDS)
        problems = unfair(facts["contestants"])
    for problem in problems:
        print(f"not a fair contest: {problem}", file=sys.stderr)
    if options.report is not None:
        sizes = {"encoder": vit.model_dump(mode="json"), "objective": mae.model_dump(mode="json")}
        head = {**machine(options, device), **sizes, "batch_size": batch_size}
        facts = {**head, "left_out": left_out, "problems": problems, **facts}
        write_atomically(options.report, json.dumps(facts, indent=1).encode())
    return 1 if problems else 0


def enter(
    options: Options, mae: MAEConfig, vit: ViTConfig, batch_size: int, device: torch.device
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants by name, and those whose library is missing with the reason."""
    torch.manual_seed(0)
    ready = torch.randn(batch_size, vit.in_chans, vit.img_size, vit.img_size, device=device)
    # Noise has nothing to learn; a ramp across each patch lets every loss fall within three steps.
    ready += 3 * (torch.arange(vit.img_size, device=device) % vit.patch_size) / vit.patch_size
    alone = options.profile or options.shards is not None
    names = options.only or (("selfsup",) if alone else tuple(WORDS))
    contestants: dict[str, Contestant] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            module = build(name, mae, vit).to(device)
        except ImportError as error:
            left_out[name] = str(error)
            continue
        if options.compile:
            module.compile()
        contestants[name] = Contestant(module, lambda: ready, options.precision)
    if options.shards:
        module = build("selfsup", mae, vit).to(device)
        if options.compile:
            module.compile()
        images = images_from(options.shards, vit, batch_size, device)
        contestants["selfsup from shards"] = Contestant(module, images, options.precision)
    return contestants, left_out


def images_from(shards: str, vit: ViTConfig, batch_size: int, device: torch.device) -> Callable[[], Tensor]:
    """Images through one loader process: read, checked, decoded, cropped, moved, normalised."""
    data, plan = ImageData(shards=shards), BatchPlan(batch_size, batch_size, rank=0, world=1)
    batches = train_batches(data, open_shards(shards), 0, vit.img_size, vit.in_chans, plan, 0, workers=1)
    return lambda: next(batches).to(device, data.mean, data.std).images


def show(facts: dict[str, Any], words: dict[str, str]) -> None:
    """The table; words: what a contestant is called in it, where that is not its name."""
    ceiling, rows = facts["ceiling"], facts["contestants"]
    print(
        f"ceiling {ceiling['flops_per_second'] / 1e12:.3f} TFLOP/s: the fastest product of "
        f"{' or '.join(f'{n}^3' for n in ceiling['sizes'])}; best of a round "
        f"{min(ceiling['rounds']) / 1e12:.3f} to {max(ceiling['rounds']) / 1e12:.3f}"
    )
    print(f"{'':46s}images/s  ratio (range)            MFU   of peak  parameters  loss")
    for name, row in rows.items():
        ratio = f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        peak = "unknown" if row["mfu_of_peak"] is None else f"{row['mfu_of_peak']:.1%}"
        print(
            f"{words.get(name, name):46s}{row['images_per_second']:8.1f}  {ratio:20s}{row['mfu']:8.1%}  "
            f"{peak:>8s}  {row['parameters'] / 1e6:8.3f} M  {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}"
        )


def machine(options: Any, device: torch.device) -> dict[str, Any]:
    """Options (a dataclass), versions and machine."""
    versions = {}
    for name in ("selfsup", "torch", "timm", "transformers", "lightly"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()},
        "versions": versions,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options, description=__doc__)))
    except ValueError as error:
        sys.exit(f"bench_mae: {error}")
