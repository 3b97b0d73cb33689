"""What `selfsup look` draws and measures of one checkpoint."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from selfsup.batch import ImageBatch, normalise
from selfsup.data.decode import decode_image
from selfsup.data.images import EvalImages
from selfsup.data.index import ShardIndex
from selfsup.data.loader import load
from selfsup.data.reader import ShardReader
from selfsup.data.views import augment
from selfsup.look.attention import attention_maps, no_attention, patch_maps
from selfsup.look.neighbours import cosine, nearest
from selfsup.look.page import class_name
from selfsup.look.pictures import attention_picture, captioned, enlarged, grid, save_png
from selfsup.objectives.base import Objective
from selfsup.recipe import Recipe

_TILE = 96
_SPRITE = 32
"""Longest side of a thumbnail in the projector: 5,000 of them make a sprite of 2,272 pixels."""
_BATCH = 64
_PER_PICTURE = 8
"""Images an objective draws into one picture."""


class Loaded(NamedTuple):
    """A checkpoint, ready to be looked at."""

    objective: Objective
    recipe: Recipe
    checkpoint: Path
    step: int
    device: torch.device


def look(
    loaded: Loaded,
    index: ShardIndex,
    rows: Int64[np.ndarray, " n"],
    samples: int,
    views: int,
    neighbours: int,
    folder: Path,
    board: SummaryWriter,
) -> dict[str, Any]:
    """Everything on the images at `rows`, the first `samples` of them shown; PNG files into `folder`.

    Returns what look.json says of the images. Raises ValueError, naming shard and key, for an image
    that cannot be read or decoded.
    """
    recipe, shown = loaded.recipe, rows[:samples]
    images = torch.cat(list(read_images(index, shown, recipe)))

    def put(name: str, tag: str, picture: Tensor) -> None:
        save_png(folder / f"{name}.png", picture)
        board.add_image(tag, picture, loaded.step)

    put_images(loaded, index, shown, images, views, put)
    features, by_pixels, thumbnails = embed(loaded, index, rows, images)
    itself = np.arange(len(shown), dtype=np.int64)
    by_embedding = cosine(features[: len(shown)], features)
    pairs = [(found, nearest(found, neighbours, itself)) for found in (by_embedding, by_pixels)]
    put("neighbours", "neighbours: embedding, pixels", neighbour_picture(recipe, index, rows, pairs))
    labels = [class_name(index, label) for label in index.label[rows].tolist()]
    keys = [index.key(row) for row in rows]
    metadata = [[" ".join(text.split()) for text in pair] for pair in zip(keys, labels)]  # tabs end a field
    sprites = thumbnails.float() / 255
    board.add_embedding(features, metadata, sprites, loaded.step, "features", ["key", "label"])

    def listed(i: int, found: np.ndarray, near: np.ndarray) -> list[dict[str, Any]]:
        return [{"key": keys[j], "label": labels[j], "similarity": float(found[i, j])} for j in near[i]]

    return {
        "shards": str(index.folder),
        "fingerprint": index.fingerprint,
        "images": [
            {
                "key": keys[i],
                "label": labels[i],
                "by_embedding": listed(i, *pairs[0]),
                "by_pixels": listed(i, *pairs[1]),
            }
            for i in range(len(shown))
        ],
    }


def put_images(
    loaded: Loaded,
    index: ShardIndex,
    rows: Int64[np.ndarray, " b"],
    images: UInt8[Tensor, "b c s s"],
    views: int,
    put: Callable[[str, str, Tensor], None],
) -> None:
    """What concerns each image alone: attention maps (of a vit), the objective's own pictures, training views.

    put: takes a file's name without suffix, a tag for TensorBoard, and the picture.
    """
    recipe, encoder = loaded.recipe, loaded.objective.encoder
    reason = no_attention(encoder)
    if reason is not None:
        print(f"no attention maps: {reason}")
    for i, image in enumerate(images if reason is None else ()):
        inputs = normalise(image[None].to(loaded.device), recipe.data.mean, recipe.data.std)
        maps = patch_maps(attention_maps(encoder, inputs), encoder.num_prefix_tokens)
        picture = attention_picture(image, maps[:, 0].float(), _TILE)
        put(f"attention-{i:02d}", f"attention/{index.key(rows[i])}", picture)
    for number, tag, picture in objective_pictures(loaded, images, rows):
        kind = re.sub(r"\W+", "-", tag.partition(":")[0].lower())  # reconstruction
        put(f"{kind}-{number:02d}", tag, picture)
    drawn = enlarged(view_rows(recipe, index, rows, images, views), _TILE // 2)
    put("views", "training views", grid(drawn, 1 + views))


def read_images(
    index: ShardIndex, rows: Int64[np.ndarray, " n"], recipe: Recipe
) -> Iterator[UInt8[Tensor, "b c s s"]]:
    """The images at `rows` in their order, some at a time, resized and cropped as the probes do."""
    data = EvalImages(index, recipe.encoder.img_size, recipe.encoder.in_chans)
    batches = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
    for images, _, _ in load(data, batches, workers=0, prefetch=2):
        yield images


def objective_pictures(
    loaded: Loaded, images: UInt8[Tensor, "b c s s"], rows: Int64[np.ndarray, " b"]
) -> Iterator[tuple[int, str, Tensor]]:
    """The pictures that the objective itself draws (MAE: input, masked, predicted, pasted), numbered."""
    mean, std = loaded.recipe.data.mean, loaded.recipe.data.std
    for start in range(0, len(images), _PER_PICTURE):
        places = torch.from_numpy(rows[start : start + _PER_PICTURE])
        part = images[start : start + _PER_PICTURE]
        batch = ImageBatch(part, loaded.recipe.seed, torch.zeros_like(places), places, places)
        drawn = loaded.objective.pictures(batch.to(loaded.device, mean, std), mean, std)
        for number, (name, picture) in enumerate(drawn.items()):
            yield start // _PER_PICTURE * len(drawn) + number, f"{name}/{start}", picture


def view_rows(
    recipe: Recipe, index: ShardIndex, rows: Int64[np.ndarray, " b"], images: Tensor, views: int
) -> UInt8[Tensor, "n c s s"]:
    """For each row of the index its image and `views` training views, one after another.

    Drawn as training draws them, keyed by the run's seed; not the very ones it saw (`selfsup data show
    --config` shows those): view i is that of epoch i at the position numbered as the row. Of several
    views of an image (data.views), the first.
    """
    reader, shown, size = ShardReader(index), [], recipe.encoder.img_size
    kind = recipe.data.kinds(size)[0]
    epochs = np.arange(views, dtype=np.int64)
    for image, row, data in zip(images, rows, reader.read(rows)):
        pixels = decode_image(data, recipe.encoder.in_chans, index.name(row))
        positions = np.full(views, row, dtype=np.int64)
        shown += [image[None], augment(kind, recipe.seed, epochs, positions, [pixels] * views, size)]
    reader.close()
    return torch.cat(shown)


@torch.inference_mode()
def embed(
    loaded: Loaded, index: ShardIndex, rows: Int64[np.ndarray, " n"], queries: UInt8[Tensor, "q c s s"]
) -> tuple[Float[np.ndarray, "n d"], Float64[np.ndarray, "q n"], UInt8[Tensor, "n 3 t t"]]:
    """Of the images at `rows`: features, cosine similarity to the queries of pixels in [0, 1], thumbnails.

    Raises ValueError for an image that cannot be read and for features that are not finite.
    """
    recipe, features, similar, thumbnails = loaded.recipe, [], [], []
    asked = queries.flatten(1).numpy() / 255
    with tqdm(total=len(rows), desc="features", unit="img", disable=None) as bar:
        for images in read_images(index, rows, recipe):
            inputs = normalise(images.to(loaded.device), recipe.data.mean, recipe.data.std)
            features.append(loaded.objective.encoder(inputs).float().cpu().numpy())
            similar.append(cosine(asked, images.flatten(1).numpy() / 255))
            thumbnails.append(shrunk(images, _SPRITE).expand(-1, 3, -1, -1))
            bar.update(len(images))
    values = np.concatenate(features)
    broken = int((~np.isfinite(values).all(axis=1)).sum())
    if broken:
        raise ValueError(
            f"{loaded.checkpoint}: features of {broken} of {len(rows)} images are NaN or infinite"
        )
    return values, np.concatenate(similar, axis=1), torch.cat(thumbnails)


def neighbour_picture(
    recipe: Recipe,
    index: ShardIndex,
    rows: Int64[np.ndarray, " n"],
    pairs: list[tuple[np.ndarray, np.ndarray]],
) -> Float[Tensor, "3 H W"]:
    """A row for each query: itself, its nearest by embedding, a gap, its nearest by pixels.

    pairs: similarities (q, n) and nearest (q, k), by embedding and by pixels. Captions: label, similarity.
    """
    tiles, captions = [], []
    for i in range(len(pairs[0][1])):
        (by_embedding, near), (by_pixels, near_pixels) = ((found[i], near[i]) for found, near in pairs)
        places = np.concatenate([[i], near, [i], near_pixels])
        images = torch.cat(list(read_images(index, rows[places], recipe)))
        images[len(near) + 1] = 255  # the gap
        names = [class_name(index, label) for label in index.label[rows[places]].tolist()]
        similar = np.concatenate([[1.0], by_embedding[near], [1.0], by_pixels[near_pixels]])
        texts = [f"{similarity:.2f} {name}" for similarity, name in zip(similar, names)]
        texts[0], texts[len(near) + 1] = names[0], ""
        tiles.append(enlarged(shrunk(images, _TILE), _TILE // 2))
        captions += texts
    return grid(captioned(torch.cat(tiles), captions), 2 * pairs[0][1].shape[1] + 2)


def shrunk(images: UInt8[Tensor, "b c s s"], side: int) -> UInt8[Tensor, "b c t t"]:
    """Images at most `side` pixels wide, antialiased."""
    if images.shape[-1] <= side:
        return images
    small = interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)
