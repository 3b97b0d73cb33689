"""y of a law: the loss on data never trained on, the same rows, the same masks, the same batches for every cell."""

from collections.abc import Callable

import numpy as np
import torch

from selfsup.batch import ImageBatch, TextBatch
from selfsup.data.images import EvalImages, ImageData, TrainImages
from selfsup.data.index import open_shards
from selfsup.data.rows import TextData, open_rows
from selfsup.data.text import TrainText
from selfsup.data.views import ViewBatch
from selfsup.encoders.vit import ViTConfig
from selfsup.objectives.base import Objective
from selfsup.objectives.simclr import SimCLR
from selfsup.recipe import Recipe
from selfsup.scaling.probed import probe_of
from selfsup.scaling.sweep_config import HeldOut

SEED = 0
"""Of every mask, crop and shift: that of the evaluation, whatever a cell was trained with."""


def measure_of(recipe: Recipe, held: HeldOut) -> Callable[[Objective], float]:
    """y of a model of the recipe, lower is better: byol's probe error, else the held-out loss.

    What it is measured on is read here: faults of it, ValueErrors, are found before the training.
    """
    if recipe.objective.name == "byol":
        return probe_of(recipe, held)
    batches = held_out_batches(recipe, held)

    def loss(objective: Objective) -> float:
        if isinstance(objective, SimCLR):
            objective.config = objective.config.model_copy(update={"temperature": held.temperature})
        return mean_loss(objective, batches)

    return loss


def held_out_batches(recipe: Recipe, held: HeldOut) -> list[TextBatch | ImageBatch | ViewBatch]:
    """The first `held.samples` samples, in stored order, as the objective takes them.

    Text in the rows of training's packing; mae's images resized and cropped at the centre; simclr's in two views.
    Raises ValueError for fewer samples than that, and for text of another tokenizer.
    """
    dataset = _text(recipe, held) if isinstance(recipe.data, TextData) else _images(recipe, held)
    parts = [np.arange(i, min(i + held.batch, held.samples)) for i in range(0, held.samples, held.batch)]
    found = []
    for part in parts:
        if isinstance(dataset, EvalImages):
            read = dataset.__getitems__(part)
            if isinstance(read, ValueError):
                raise read
            rows = torch.from_numpy(part)
            batch = ImageBatch(read[0], SEED, torch.zeros_like(rows), rows, rows)
        else:
            batch = dataset.batch(part)
        found.append(recipe.data.to(batch, torch.device("cpu")))
    return found


def unique_samples(recipe: Recipe) -> int:
    """Distinct tokens or images that the recipe trains on: more than these are repeats.

    Raises ValueError for images without an index, which nobody has counted.
    """
    if isinstance(recipe.data, TextData):
        rows = open_rows(recipe.data, recipe.encoder.max_length, recipe.objective.wrap, recipe.objective.next_token)
        return len(rows) * recipe.encoder.max_length
    if recipe.data.index == "none":
        raise ValueError("data.index: a sweep must know how many images there are; selfsup data index SHARDS counts them")
    return len(open_shards(recipe.data.shards))


def _text(recipe: Recipe, held: HeldOut) -> TrainText:
    data, objective = recipe.data, recipe.objective
    config = data.model_copy(update={"shards": held.shards, "order": "sequential"})
    rows, trained = (
        open_rows(each, recipe.encoder.max_length, objective.wrap, objective.next_token) for each in (config, data)
    )
    if rows.tokenizer.sha256 != trained.tokenizer.sha256:
        raise ValueError(f"held_out.shards: {held.shards} is of another tokenizer than {data.shards}")
    _enough(len(rows), held, "rows")
    if objective.name == "mlm":
        objective = objective.model_copy(update={"final_mask_ratio": None})  # one ratio for all lengths of run
    return TrainText(config, rows, SEED, held.batch, objective.masking(1))


def _images(recipe: Recipe, held: HeldOut) -> EvalImages | TrainImages:
    assert isinstance(recipe.data, ImageData) and isinstance(recipe.encoder, ViTConfig)
    index, encoder = open_shards(held.shards), recipe.encoder
    _enough(len(index), held, "images")
    if recipe.objective.views == 1:
        return EvalImages(index, encoder.img_size, encoder.in_chans)
    config = recipe.data.model_copy(update={"order": "sequential"})
    return TrainImages(config, index, SEED, encoder.img_size, encoder.in_chans)


def _enough(count: int, held: HeldOut, what: str) -> None:
    if count < held.samples:
        raise ValueError(f"held_out.samples: expected at most the {count} {what} of {held.shards}, got {held.samples}")


@torch.inference_mode()
def mean_loss(objective: Objective, batches: list[TextBatch | ImageBatch | ViewBatch]) -> float:
    """Mean over the targets of all batches, in eval mode and float32; of clm without its z-loss, of mlm without the
    next sentence."""
    training = objective.training
    objective.eval()
    total, count = 0.0, 0
    for batch in batches:
        output = objective(batch, float(batch.targets))
        value = output.metrics.get("nll", output.metrics.get("mlm_loss", output.loss))
        total += float(value.double()) * batch.targets
        count += batch.targets
    objective.train(training)
    return total / count
