"""Estimated memory of training steps beside what real ones take: the table in README.md.

python tools/memory.py [--json FILE] [NAME ...]

Each model takes two real steps in a process of its own, through Accelerate and with the loop's own settings, on
random input. On a CPU it is measured twice over: as torch's allocator saw it (torch.profiler counts each block
taken and given back; the peak of their sum) and as the system saw it (the largest resident size, VmHWM, less
the resident size after two steps of a tiny model of the same kind, which load what libraries load late; in another
process, without the profiler). On CUDA by torch.cuda.max_memory_allocated. The estimate is worked out without any
of these.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from selfsup import start
from selfsup.batch import ImageBatch, TextBatch
from selfsup.config import merge, validate
from selfsup.data.views import ViewBatch
from selfsup.ema import Ema
from selfsup.estimate import estimate
from selfsup.optim import build_optimizer
from selfsup.recipe import Recipe

MIB = 2**20
VIT_SMALL = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
BERT = {
    "name": "text", "vocab_size": 8192, "max_length": 128, "embed_dim": 512, "depth": 4, "num_heads": 8,
    "post_norm": True, "embed_norm": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "MAE, ViT-S/16, 224 px, 16 images, bf16": {
        "encoder": VIT_SMALL,
        "optim": {"batch_size": 16},
        "precision": {"mixed": "bf16"},
    },
    "the same, activation checkpointing": {
        "encoder": VIT_SMALL,
        "optim": {"batch_size": 16},
        "precision": {"mixed": "bf16"},
        "run": {"activation_checkpointing": True},
    },
    "the same, fp32, tiled attention": {
        "encoder": {**VIT_SMALL, "attention": "tiled"},
        "optim": {"batch_size": 16},
    },
    "MLM, BERT-small, 16 rows of 128, fp32": {
        "objective": {"name": "mlm"},
        "encoder": BERT,
        "data": {"name": "text"},
        "optim": {"batch_size": 16},
    },
    "MLM, BERT-base, 32 rows of 128, bf16": {
        "objective": {"name": "mlm"},
        "encoder": {**BERT, "embed_dim": 768, "depth": 12, "num_heads": 12},
        "data": {"name": "text"},
        "optim": {"batch_size": 32},
        "precision": {"mixed": "bf16"},
    },
    "SimCLR, ResNet-18, 32 px, 64 images, fp32": {
        "objective": {"name": "simclr"},
        "encoder": {"name": "timm", "model": "resnet18", "img_size": 32, "stem": "cifar"},
        "data": {"views": "simclr-32"},
        "optim": {"name": "lars", "batch_size": 64},
    },
    "BYOL, ResNet-18, 32 px, 2 x 32 images, bf16, average": {
        "objective": {"name": "byol"},
        "encoder": {"name": "timm", "model": "resnet18", "img_size": 32, "stem": "cifar"},
        "data": {"views": "simclr-32"},
        "optim": {"batch_size": 64, "ema": 0.99},
        "precision": {"mixed": "bf16"},
        "run": {"micro_batch": 32},
    },
}


def recipe_of(content: dict[str, Any]) -> Recipe:
    """A recipe whose data need not be there."""
    data, run = {"shards": "none", **content.get("data", {})}, {"dir": "none", **content.get("run", {})}
    return validate(Recipe, {**content, "data": data, "run": run})


def random_batch(recipe: Recipe, size: int, device: torch.device) -> ImageBatch | ViewBatch | TextBatch:
    """A micro-batch as the loader gives it, of random numbers."""
    number = torch.arange(size, device=device)
    keys = {"seed": 0, "epoch": torch.zeros_like(number), "position": number, "index": number}
    encoder = recipe.encoder
    if recipe.data.name == "text":
        tokens = torch.randint(5, encoder.vocab_size, (size, encoder.max_length), device=device)
        count = round(tokens.numel() * recipe.objective.mask_ratio)
        where = torch.randperm(tokens.numel(), device=device)[:count].sort().values
        return TextBatch(tokens, tokens.flatten()[where], where, None, None, None, None, size, **keys)
    views = tuple(
        torch.randn(size, encoder.in_chans, encoder.img_size, encoder.img_size, device=device)
        for _ in range(recipe.objective.views)
    )
    return ImageBatch(views[0], **keys) if len(views) == 1 else ViewBatch(views, **keys)


def train_two_steps(recipe: Recipe) -> None:
    """As the loop does them."""
    accelerator = start.accelerator(recipe)
    plan = start.batch_plan(recipe)
    objective = start.build_objective(recipe, accelerator.device)
    optimizer = build_optimizer(recipe.optim, objective)
    ema = None if recipe.optim.ema is None else Ema(objective, recipe.optim.ema)
    model, stepper = accelerator.prepare(objective, optimizer)
    for step in range(2):
        for _ in range(plan.accumulation):
            batch = random_batch(recipe, plan.micro_batch, accelerator.device)
            output = model(batch, float(recipe.optim.batch_size))
            accelerator.backward(output.loss)
        stepper.step()
        stepper.zero_grad()
        objective.after_step(step / 2)
        if ema is not None:
            ema.update(objective, step + 1)


def tiny(recipe: Recipe) -> Recipe:
    """The same kernels on next to nothing."""
    small: dict[str, Any] = {"optim": {"batch_size": 4}, "run": {"micro_batch": None}}
    if recipe.encoder.name == "text":
        small["encoder"] = {"embed_dim": 32, "depth": 1, "num_heads": 2, "vocab_size": 64, "max_length": 16}
    else:
        vit = recipe.encoder.name == "vit"
        small["encoder"] = (
            {"embed_dim": 32, "depth": 1, "num_heads": 2}
            if vit
            else {"model": "test_resnet", "stem": "default"}
        )
        small["encoder"]["img_size"] = 32
        small["objective"] = {"decoder_embed_dim": 32} if vit else {"hidden_dim": 32}
    return validate(Recipe, merge(recipe.model_dump(mode="json"), small))


def allocator_peak(recipe: Recipe) -> int:
    """The most bytes that torch's allocator had out at once, beyond those before the model was built."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        train_two_steps(recipe)
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        train_two_steps(recipe)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def resident_peak(recipe: Recipe) -> int:
    """How much the process grew, at most, in bytes."""
    train_two_steps(tiny(recipe))
    before = _status("VmRSS")
    train_two_steps(recipe)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"{key}: not told by this system"
    return 1024 * int(found[1])


def measured(content: dict[str, Any], how: str) -> int:
    """`allocator` or `resident`, in a process of its own."""
    command = [sys.executable, __file__, "--measure", how, json.dumps(content)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="models whose name holds one of these; default: all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        how, content = options.measure
        print({"allocator": allocator_peak, "resident": resident_peak}[how](recipe_of(json.loads(content))))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways = ["allocator"] if device.type == "cuda" else ["allocator", "resident"]
    rows = []
    for name, content in MODELS.items():
        if options.names and not any(part in name for part in options.names):
            continue
        estimated = estimate(recipe_of(content), device=device)
        row = {
            "model": name,
            "state": estimated.state,
            "activations": estimated.activations,
            "peak": estimated.peak,
        }
        row |= {way: measured(content, way) for way in ways}
        rows.append(row)
        shown = (f"{way} {row[way] / MIB:.0f} MiB ({estimated.peak / row[way] - 1:+.1%})" for way in ways)
        print(f"{name}: estimated {estimated.peak / MIB:.0f} MiB; {'; '.join(shown)}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"device": str(device), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
