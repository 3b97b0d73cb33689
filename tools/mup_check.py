"""Whether muP (selfsup/mup.py) holds: sizes of activations over widths, and the best learning rate over widths.

    python tools/mup_check.py coordinates         slopes of log size on log width, with muP and without
    python tools/mup_check.py transfer            losses of a language model of letters by width and learning rate

The text is the source code of a few modules of the Python at hand.
"""

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from selfsup.batch import TextBatch
from selfsup.config import validate
from selfsup.layers.block import Block
from selfsup.objectives.base import Objective
from selfsup.optim import build_optimizer, set_lr
from selfsup.recipe import Recipe
from selfsup.scaling.timing import random_batch
from selfsup.start import build_objective

HEAD = 16
VOCAB, LENGTH = 96, 32
WIDTHS = (32, 64, 128, 256, 512)
BASE = 32
MODULES = ("argparse", "typing", "tarfile", "inspect", "subprocess", "zipfile", "mailbox", "ssl", "logging/__init__")


def make_recipe(name: str, width: int, mup: bool, init_std: float = 0.02, **optim: Any) -> Recipe:
    """clm, mlm or mae of two blocks with 16 channels a head; mup: with base width 32. init_std: of text."""
    sizes = {"embed_dim": width, "depth": 2, "num_heads": width // HEAD}
    text = name != "mae"
    decoder = {"decoder_embed_dim": width, "decoder_depth": 1, "decoder_num_heads": width // HEAD}
    if text:
        encoder = {"vocab_size": VOCAB, "max_length": LENGTH, "causal": name == "clm", "init_std": init_std}
    else:
        encoder = {"img_size": 16, "patch_size": 4}
    base = {"mup_base_width": BASE} if mup else {}
    return validate(Recipe, {
        "objective": {"name": name, **({} if text else decoder)}, "encoder": {**sizes, **encoder},
        "data": {"shards": "none"}, "run": {"dir": "none", "device": "cpu"},
        "optim": {"batch_size": 8, "lr_scaling": "none", "weight_decay": 0.0, **base, **optim},
    })  # fmt: skip


def activations(objective: Objective, batch: Any) -> dict[str, Tensor]:
    """Outputs of every block and linear layer, and `output`: logits, pixels."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out.detach().clone()))
        for name, layer in objective.named_modules()
        if isinstance(layer, (Block, nn.Linear)) and layer not in objective.readouts
    ]
    with torch.no_grad():
        match objective.config.name:
            case "clm":
                found["output"] = objective.logits(objective.encoder.encode(batch))
            case "mlm":
                found["output"] = objective.logits(batch)
            case "mae":
                found["output"] = objective.predict(batch.images, objective.noise(batch))[0]
    for hook in hooks:
        hook.remove()
    return found


def coordinates(recipe: Recipe, steps: int) -> dict[str, tuple[float, float]]:
    """Of each layer the mean |activation| at the first step, and of its change over `steps` steps on one batch."""
    torch.manual_seed(recipe.seed)
    batch = random_batch(recipe)
    objective = build_objective(recipe, torch.device("cpu"))
    optimizer = build_optimizer(recipe.optim, objective)
    before = activations(objective, batch)
    for _ in range(steps):
        objective(batch, float(batch.targets)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = activations(objective, batch)
    return {k: (v.abs().mean().item(), (after[k] - v).abs().mean().item()) for k, v in before.items()}


def slopes(
    name: str, mup: bool, widths: Sequence[int] = WIDTHS, steps: int = 3, lr: float = 2e-3, seeds: int = 2, **optim: Any
) -> dict[str, tuple[float, float]]:
    """Of each layer the slopes of log size at the start and of log change on log width, over the mean of seeds."""
    sizes: dict[str, list[np.ndarray]] = {}
    for width in widths:
        recipe = make_recipe(name, width, mup, base_lr=lr, **optim)
        each = [coordinates(recipe.model_copy(update={"seed": seed}), steps) for seed in range(seeds)]
        for layer in each[0]:
            sizes.setdefault(layer, []).append(np.mean([found[layer] for found in each], axis=0))
    logs = np.log2(widths)
    return {layer: tuple(np.polyfit(logs, np.log2(found), 1)[0].tolist()) for layer, found in sizes.items()}


def letters() -> Tensor:
    """int64 (n,): bytes of the modules' source, all beyond printable ASCII as one."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)
    codes = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() - 31
    return codes.clamp(0, VOCAB - 1)


def rows(text: Tensor, count: int, seed: int) -> TextBatch:
    """Random rows and the letters that follow."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH - 1, (count, 1), generator=generator)
    cut = text[starts + torch.arange(LENGTH + 1)]  # (count, length + 1)
    number = torch.arange(count)
    return TextBatch(
        cut[:, :-1].contiguous(), cut[:, 1:].flatten(), None, None, None, None, None, count, 0, 0 * number, number,
        number,
    )  # fmt: skip


def trained_loss(width: int, mup: bool, lr: float, text: Tensor, steps: int, batch: int, seed: int = 0) -> float:
    """Loss on the last tenth of the text, in nats a letter, after so many steps on the rest; infinite for no number.

    The init is 0.1: at a width of 32 GPT-2's 0.02 would leave the blocks next to nothing to say."""
    optim = {"base_lr": lr, "steps": steps, "batch_size": batch, "warmup_fraction": 0.1}
    recipe = make_recipe("clm", width, mup, init_std=0.1, **optim).model_copy(update={"seed": seed})
    split = len(text) * 9 // 10
    objective = build_objective(recipe, torch.device("cpu"))
    optimizer = build_optimizer(recipe.optim, objective)
    for step in range(steps):
        set_lr(optimizer, recipe.optim.lr(step))
        each = rows(text[:split], batch, seed * 1_000_000 + step)
        objective(each, float(each.targets)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        held = rows(text[split:], 256, 10**9)
        loss = objective(held, float(held.targets)).loss.item()
    return loss if np.isfinite(loss) else np.inf


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """log2 of the best rate: the vertex of the parabola through the least loss and its neighbours; at an end, it."""
    i, x = int(np.argmin(losses)), np.log2(rates)
    if i in (0, len(rates) - 1) or not np.isfinite(losses[i - 1 : i + 2]).all():
        return float(x[i])
    left, middle, right = losses[i - 1 : i + 2]
    return float(x[i] + 0.5 * (left - right) / (left - 2 * middle + right))


def show_coordinates() -> None:
    """Prints every layer's slopes."""
    for name in ("clm", "mlm", "mae"):
        ours, theirs = slopes(name, True), slopes(name, False)
        print(f"\n{name}: slope of log mean |activation| on log width, {WIDTHS[0]} to {WIDTHS[-1]}")
        print(f"{'':34}{'at the start':>16}{'change, 3 steps':>20}")
        print(f"{'layer':34}{'muP':>8}{'without':>8}{'muP':>12}{'without':>8}")
        for layer in ours:
            (start, change), (start0, change0) = ours[layer], theirs[layer]
            print(f"{layer:34}{start:8.2f}{start0:8.2f}{change:12.2f}{change0:8.2f}")


def show_transfer(widths: Sequence[int], exponents: Sequence[int], steps: int, batch: int) -> None:
    """Prints a line a width: the loss at each learning rate, and log2 of the best one."""
    text, rates = letters(), [2.0**i for i in exponents]
    print(f"nats a letter after {steps} steps of {batch} rows of {LENGTH}, by log2 of the learning rate; one seed")
    print(f"{'':16}" + "".join(f"{i:>8}" for i in exponents) + f"{'best':>8}")
    for mup in (True, False):
        for width in widths:
            losses = [trained_loss(width, mup, lr, text, steps, batch) for lr in rates]
            best = best_rate(rates, losses)
            said = "".join(f"{loss:8.3f}" for loss in losses)
            print(f"{'muP' if mup else 'without':8}{width:8}{said}{best:8.2f}", flush=True)


def main(
    what: Literal["coordinates", "transfer"], /, widths: tuple[int, ...] = (32, 64, 128, 256),
    exponents: tuple[int, ...] = (-11, -10, -9, -8, -7, -6, -5), steps: int = 150, batch: int = 8,
) -> None:  # fmt: skip
    """Print one of the two tables; the options are of `transfer`."""
    torch.set_num_threads(1)
    if what == "coordinates":
        show_coordinates()
    else:
        show_transfer(widths, exponents, steps, batch)


if __name__ == "__main__":
    tyro.cli(main)
