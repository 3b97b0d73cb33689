"""y of byol: the error of a nearest-neighbour probe. Its own loss says nothing of what was learned: it falls to 0 where
the features collapse (Grill et al. 2020)."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from selfsup.batch import normalise
from selfsup.data.images import EvalImages
from selfsup.data.index import ShardIndex, open_shards
from selfsup.export.frozen import FrozenEncoder, from_encoder
from selfsup.objectives.base import Objective
from selfsup.probe.features import Features
from selfsup.probe.knn import knn_accuracy
from selfsup.probe.sources import check_labels
from selfsup.recipe import Recipe
from selfsup.scaling.sweep_config import HeldOut

Images = tuple[UInt8[Tensor, "n c s s"], Int64[np.ndarray, " n"]]


def probe_of(recipe: Recipe, held: HeldOut) -> Callable[[Objective], float]:
    """The share of the held-out images that `probe.knn` gets wrong, 0 to 1, voting by the same labelled images for
    every cell; of the online encoder, in float32.

    Raises ValueError where labels are missing or do not belong together, for fewer images than asked for, and where
    the first images lack a class.
    """
    key = "data.shards" if held.neighbours is None else "held_out.neighbours"
    train, test = open_shards(held.neighbours or recipe.data.shards), open_shards(held.shards)
    try:
        check_labels(train, test)
    except ValueError as error:  # of `selfsup probe`, by its options
        said = str(error).replace("--train", key).replace("--test", "held_out.shards")
        raise ValueError(f"{said} (byol is judged by a nearest-neighbour probe)") from None
    pair = (
        _first(train, held.neighbour_samples, "held_out.neighbour_samples", recipe),
        _first(test, held.samples, "held_out.samples", recipe),
    )

    def error(objective: Objective) -> float:
        encoder = from_encoder(objective.encoder, recipe, "cell")
        neighbours, judged = (_features(encoder, part, held.batch) for part in pair)
        return 1.0 - knn_accuracy(neighbours, judged)

    return error


def _first(index: ShardIndex, count: int, key: str, recipe: Recipe) -> Images:
    """The first images, resized and cropped at the centre, and their labels."""
    if len(index) < count:
        raise ValueError(f"{key}: expected at most the {len(index)} images of {index.folder}, got {count}")
    labels = np.asarray(index.label[:count])
    have, all_ = len(np.unique(labels)), len(np.unique(index.label))
    if have < all_:
        raise ValueError(
            f"{key}: the first {count} images of {index.folder} are of {have} of its {all_} classes; take more of them, "
            f"or pack the images in random order"
        )
    read = EvalImages(index, recipe.encoder.img_size, recipe.encoder.in_chans).__getitems__(np.arange(count))
    if isinstance(read, ValueError):
        raise read
    return read[0], labels


def _features(encoder: FrozenEncoder, images: Images, batch: int) -> Features:
    parts = [encoder.features(normalise(part, encoder.mean, encoder.std)).float() for part in images[0].split(batch)]
    return Features(torch.cat(parts).numpy(), images[1])
