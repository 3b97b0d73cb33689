"""What travels from the loader to an objective."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class ImageBatch(NamedTuple):
    """A micro-batch of single-view images.

    `(seed, epoch, position)` key every random number drawn for a sample (see `keyed.py`), so masks
    can be drawn on the device. A NamedTuple, because loader workers, pinned memory and DDP all
    know how to carry one.
    """

    images: Tensor
    """(b, c, h, w): uint8 as the loader yields them, float32 normalised after `to`."""
    seed: int
    epoch: Tensor
    """(b,) int64."""
    position: Tensor
    """(b,) int64: place in the epoch's order."""
    index: Tensor
    """(b,) int64: row of the sample in the shard index; -1 where there is no index."""

    @property
    def targets(self) -> int:
        """The number of loss terms: one per image."""
        return len(self.images)

    def to(self, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> "ImageBatch":
        """Moves to the device, then scales uint8 images to (x / 255 - mean) / std in float32."""
        images = normalise(self.images.to(device, non_blocking=True), mean, std)
        epoch = self.epoch.to(device, non_blocking=True)
        position = self.position.to(device, non_blocking=True)
        return self._replace(images=images, epoch=epoch, position=position)

    def shown(self, mean: tuple[float, ...], std: tuple[float, ...], most: int = 64) -> Tensor:
        """For a picture, after `to`: the first images, at most `most`, as uint8 (n, c, h, w) again."""
        return pixels(self.images[:most], mean, std)


class TextBatch(NamedTuple):
    """A micro-batch of token rows and what is to be predicted in them."""

    tokens: Tensor
    """(b, l) int64: what the model reads, masks applied."""
    labels: Tensor
    """(t,) int64: the tokens to predict."""
    where: Tensor | None
    """(t,) int64: their places in `tokens.flatten()`, ascending; None: every place in order, t = b * l."""
    document_ids: Tensor | None
    """(b, l) int64: number of the document within its row, -1 for padding; a token sees its own number only.
    None: all tokens of a row see one another."""
    positions: Tensor | None
    """(b, l) int64: place in the token's own document; None: 0 .. l - 1."""
    token_types: Tensor | None
    """(b, l) int64: 0 in the first segment, 1 in the second; None: all 0."""
    random_next: Tensor | None
    """(b,) int64: 1 where the second segment is of another document; None where there are no segments."""
    global_batch: int
    """Samples in the global batch that this is a part of."""
    seed: int
    epoch: Tensor
    """(b,) int64."""
    position: Tensor
    """(b,) int64: place in the epoch's order."""
    index: Tensor
    """(b,) int64: number of the row."""

    @property
    def targets(self) -> int:
        """The number of loss terms: tokens to predict."""
        return len(self.labels)

    def to(self, device: torch.device) -> "TextBatch":
        """The same on the device."""
        return TextBatch(*(v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in self))


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(b, c, h, w) in 0..255 (uint8 or float) -> torch's default float type, (x / 255 - mean) / std per channel.

    Raises ValueError where mean or std do not have one value per channel.
    """
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"data.mean, data.std: expected {images.shape[1]} values, one per channel, "
            f"got {len(mean)} and {len(std)}"
        )
    scale, shift = _scale_and_shift(mean, std, images.device, torch.get_default_dtype())
    return torch.addcmul(shift, images.to(scale.dtype), scale)


def pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What `normalise` was given: (b, c, h, w) float -> uint8, rounded."""
    scale, shift = _scale_and_shift(mean, std, images.device, images.dtype)
    return ((images - shift) / scale).round_().clamp_(0, 255).to(torch.uint8)


@functools.lru_cache
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Kept, because a copy of Python numbers to a GPU waits for everything queued there."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device, dtype=dtype).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std)], device=device, dtype=dtype).view(-1, 1, 1)
    return scale, shift
