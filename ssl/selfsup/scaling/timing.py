"""What a step costs here: a few steps of the real objective on made-up data, in one thread."""

import statistics
import time
from typing import NamedTuple

import torch

from selfsup.batch import ImageBatch, TextBatch
from selfsup.data.views import ViewBatch
from selfsup.encoders.text import TextConfig
from selfsup.optim import build_optimizer
from selfsup.recipe import Recipe
from selfsup.scaling.grid import Cell

STEPS = 3


class Speed(NamedTuple):
    """CPU-seconds of a step: the median of three after one that is not counted. On a busy machine it takes longer."""

    seconds: float
    flop_per_second: float


def cell_recipe(cell: Cell, run_dir: str) -> Recipe:
    """The cell's recipe in a run folder."""
    return Recipe.model_validate({**cell.recipe, "run": {**cell.recipe["run"], "dir": run_dir}})


def hours_of(cells: list[Cell]) -> tuple[dict[str, float], dict[str, Speed]]:
    """CPU-hours of each cell by its name, and the speed of each size and batch that was timed.

    A branch costs its own part only. Reading the data, checkpoints and the evaluation are not counted.
    """
    speeds: dict[str, Speed] = {}
    hours = {}
    for cell in cells:
        key = f"{cell.size}, {cell.batch} samples a step"
        if key not in speeds:
            speeds[key] = timed(cell_recipe(cell, "unused"))
        hours[cell.id] = speeds[key].seconds * (cell.steps - (cell.branch_step or 0)) / 3600
    return hours, speeds


def timed(recipe: Recipe, steps: int = STEPS) -> Speed:
    """Forward, backward and optimizer on random data in one thread; torch is as it was after."""
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1)
    try:
        objective = recipe.objective.build(recipe.encoder)
        optimizer = build_optimizer(recipe.optim, objective)
        batch, found = random_batch(recipe), []
        bf16 = recipe.precision.mixed == "bf16"
        for _ in range(1 + steps):
            began = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = objective(batch, float(batch.targets)).loss
            loss.backward()
            optimizer.step()
            objective.after_step(0.0)
            optimizer.zero_grad()
            found.append(time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
        torch.random.set_rng_state(state)
    seconds = statistics.median(found[1:])
    return Speed(seconds, objective.flops_per_sample() * recipe.optim.batch_size / seconds)


def random_batch(recipe: Recipe) -> TextBatch | ImageBatch | ViewBatch:
    """A global batch of the recipe's shapes, its content at random."""
    size, encoder = recipe.optim.batch_size, recipe.encoder
    number = torch.arange(size)
    if isinstance(encoder, TextConfig):
        tokens = torch.randint(encoder.vocab_size, (size, encoder.max_length))
        masked = recipe.objective.name == "mlm"
        count = max(1, round(encoder.max_length * recipe.objective.mask_ratio)) * size if masked else tokens.numel()
        where = torch.randperm(tokens.numel())[:count].sort().values if masked else None
        labels = torch.randint(encoder.vocab_size, (count,))
        paired = recipe.data.packing == "pairs"
        return TextBatch(
            tokens, labels, where, None, None, torch.zeros_like(tokens) if paired else None,
            torch.randint(2, (size,)) if paired else None, size, 0, torch.zeros_like(number), number, number,
        )  # fmt: skip
    keys = (0, torch.zeros_like(number), number, number)
    images = [torch.randn(size, encoder.in_chans, encoder.img_size, encoder.img_size) for _ in range(2)]
    return ImageBatch(images[0], *keys) if recipe.objective.views == 1 else ViewBatch(tuple(images), *keys)
