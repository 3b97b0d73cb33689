"""Frozen features of every sample in a folder of shards, and the two baselines for them."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from tqdm import tqdm

from selfsup.batch import normalise
from selfsup.data.images import eval_batches
from selfsup.data.index import ShardIndex
from selfsup.export.frozen import FrozenEncoder, from_encoder
from selfsup.recipe import Recipe

TOKEN_LIMIT = 4 * 2**30
"""Bytes of tokens of one data set above which they are not kept in memory."""

CROP = "short side resized to the input size (bicubic, antialiased), centre crop, no augmentation"


Device = Literal["auto", "cpu", "cuda"]


class Features(NamedTuple):
    """One row per sample, in index order."""

    values: Float32[np.ndarray, "n d"]
    labels: Int64[np.ndarray, " n"]
    """-1: no label."""


def pixel_features(
    index: ShardIndex,
    img_size: int,
    channels: int,
    batch_size: int = 256,
    workers: int = 0,
    title: str = "pixels",
) -> Features:
    """The images themselves as features: float32 (n, channels * img_size**2) in [0, 1].

    Raises ValueError for a sample that cannot be read.
    """
    values = np.empty((len(index), channels * img_size**2), dtype=np.float32)
    with tqdm(total=len(index), desc=title, unit="img", disable=None) as bar:
        for images, _, rows in eval_batches(index, img_size, channels, batch_size, workers):
            values[rows.numpy()] = images.flatten(1).numpy().astype(np.float32) / 255
            bar.update(len(rows))
    return Features(values, np.asarray(index.label))


def encoder_features(
    encoder: FrozenEncoder,
    index: ShardIndex,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device = torch.device("cpu"),
    bf16: bool = False,
    title: str = "features",
) -> Features:
    """The encoder's feature of every sample: float32 (n, d), whatever it was computed in.

    bf16: autocast matrix products to bfloat16. Raises ValueError for a sample that cannot be read
    and for features that are not finite.
    """
    encoder.to(device)
    values = None
    with tqdm(total=len(index), desc=title, unit="img", disable=None) as bar:
        for images, _, rows in eval_batches(index, encoder.img_size, encoder.in_chans, batch_size, workers):
            inputs = normalise(images.to(device, non_blocking=True), encoder.mean, encoder.std)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                features = encoder.features(inputs).float().cpu().numpy()
            if values is None:
                values = np.empty((len(index), features.shape[1]), dtype=np.float32)
            values[rows.numpy()] = features
            bar.update(len(rows))
    assert values is not None, "an index holds at least one sample"
    broken = int((~np.isfinite(values).all(axis=1)).sum())
    if broken:
        raise ValueError(f"{encoder.name}: features of {broken} of {len(index)} images are NaN or infinite")
    return Features(values, np.asarray(index.label))


def encoder_tokens(
    encoder: FrozenEncoder,
    index: ShardIndex,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device = torch.device("cpu"),
    bf16: bool = False,
    title: str = "tokens",
) -> Float[torch.Tensor, "n t d"]:
    """The encoder's patch tokens of every sample, in index order, on the CPU.

    bf16: computed under autocast and kept in bfloat16, else float32. Raises ValueError for a sample
    that cannot be read, for tokens that are not finite, and above TOKEN_LIMIT bytes.
    """
    encoder.to(device)
    values = None
    with tqdm(total=len(index), desc=title, unit="img", disable=None) as bar:
        for images, _, rows in eval_batches(index, encoder.img_size, encoder.in_chans, batch_size, workers):
            inputs = normalise(images.to(device, non_blocking=True), encoder.mean, encoder.std)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                tokens = encoder.tokens(inputs)
            tokens = tokens.to("cpu", torch.bfloat16 if bf16 else torch.float32)
            if values is None:
                needed = len(index) * tokens[0].nbytes
                if needed > TOKEN_LIMIT:
                    raise ValueError(
                        f"{index.folder}: its tokens would take {needed / 2**30:.1f} GiB, the limit is "
                        f"{TOKEN_LIMIT / 2**30:.0f}; --bf16 halves them, --mode paper keeps none"
                    )
                values = torch.empty(len(index), *tokens.shape[1:], dtype=tokens.dtype)
            values[rows] = tokens
            bar.update(len(rows))
    assert values is not None, "an index holds at least one sample"
    if not all(bool(part.isfinite().all()) for part in values.split(batch_size)):
        raise ValueError(f"{encoder.name}: tokens of images in {index.folder} are NaN or infinite")
    return values


def random_encoder(recipe: Recipe, seed: int) -> FrozenEncoder:
    """The recipe's encoder as initialised from `seed`, never trained.

    With the run's own seed these are the weights the run began with: train.py too seeds torch's
    generator and builds the encoder first. Leaves the global generator as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = recipe.encoder.build()
    return from_encoder(encoder, recipe, f"random initialisation, seed {seed}")


def choose_device(device: Device) -> torch.device:
    """auto: CUDA where there is one. Raises ValueError for cuda where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
