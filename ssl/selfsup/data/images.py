"""Images from shards to batches: the config, the data set, the loaders."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from pydantic import Field, field_validator, model_validator
from torch.utils.data import Dataset

from selfsup.batch import ImageBatch
from selfsup.config import Section
from selfsup.data.decode import decode
from selfsup.data.index import ShardIndex
from selfsup.data.loader import load
from selfsup.data.order import BatchPlan, micro_batches, sample_order
from selfsup.data.reader import ShardReader
from selfsup.data.views import (
    Positive,
    Share,
    View,
    ViewBatch,
    Views,
    augment,
    crop,
    draw_colours,
    low_before_high,
    view_kinds,
)


class ImageData(Section):
    """Images in WebDataset shards."""

    name: Literal["images"] = "images"
    shards: str
    """The folder that holds the shards, local."""
    index: Literal["auto", "none"] = "auto"
    """auto: read by the index beside the shards; none: stream with webdataset, its promises weaker."""
    order: Literal["shuffled", "chunked", "sequential"] = "shuffled"
    """shuffled over everything; chunked for hard disks and network file systems; or as stored."""
    crop_scale: tuple[Positive, Share] = (0.2, 1.0)
    """Random resized crop: least and largest share of the image's area."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Random resized crop: least and largest width / height."""
    hflip: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring left to right."""
    views: Views = "none"
    """none: one view, cropped and mirrored as above. Several, which have crops of their own: simclr, simclr-32
    (32 pixels), byol (MoCo-v3 too), or in YAML a list of kinds of view: [{blur: 1.0}, {blur: 0.1, hue: 0.1}]."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from pixels scaled to 0..1, one value a channel (3, or 1 for grey)."""
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    """Divides what is left, one value a channel."""

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _low_before_high(cls, value: tuple[float, float]) -> tuple[float, float]:
        return low_before_high(value)

    @field_validator("mean", "std")
    @classmethod
    def _one_or_three(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in (1, 3):
            raise ValueError(f"expected 1 or 3 values, one a channel, got {len(value)}")
        return value

    @field_validator("views", mode="before")
    @classmethod
    def _no_mapping(cls, value: Any) -> Any:
        if isinstance(value, dict):  # as --data.views.0.blur reads
            raise ValueError(
                f"expected the name of a preset, or a list of kinds of view, which only YAML can say: "
                f"[{{blur: 0.5}}, {{}}]; got {value}"
            )
        return value

    @field_validator("views")
    @classmethod
    def _at_least_one(cls, value: str | tuple[View, ...]) -> str | tuple[View, ...]:
        if not value:
            raise ValueError("expected at least one kind of view, got an empty list")
        return value

    @model_validator(mode="after")
    def _nothing_ignored(self) -> "ImageData":
        for key in ("crop_scale", "crop_ratio", "hflip"):
            given, default = getattr(self, key), ImageData.model_fields[key].default
            if self.views != "none" and given != default:
                raise ValueError(
                    f"{key}: views have their own, so this one would be ignored: expected its default "
                    f"{default}, got {given}; write data.views as a list and set {key} there"
                )
        return self

    def to(self, batch: ImageBatch | ViewBatch, device: torch.device) -> ImageBatch | ViewBatch:
        """The batch on the device, normalised."""
        return batch.to(device, self.mean, self.std)

    def kinds(self, img_size: int) -> tuple[View, ...]:
        """The views of an image in the order of their numbers, `size` resolved; the plain crop for none."""
        if self.views != "none":
            kinds = view_kinds(self.views)
            return tuple(kind.model_copy(update={"size": kind.size or img_size}) for kind in kinds)
        crops = {"crop_scale": self.crop_scale, "crop_ratio": self.crop_ratio, "hflip": self.hflip}
        return (View(size=img_size, **crops, jitter=0, grey=0, blur=0, solarise=0),)


class TrainImages(Dataset):
    """Map-style: from global cursors to a finished micro-batch, a pure function."""

    def __init__(
        self,
        config: ImageData,
        index: ShardIndex,
        seed: int,
        img_size: int,
        channels: int,
        colours_on_device: bool = False,
    ) -> None:
        self.config, self.index, self.seed = config, index, seed
        self.img_size, self.channels, self.colours_on_device = img_size, channels, colours_on_device
        self.reader = ShardReader(index)

    def batch(self, cursors: Int64[np.ndarray, "b"]) -> ImageBatch | ViewBatch:
        """The micro-batch at int64 (b,) cursors; pixels uint8.

        Raises ValueError naming shard and key for a sample that cannot be read or decoded.
        """
        epoch, position = np.divmod(cursors, len(self.index))
        rows = sample_order(self.seed, epoch, position, len(self.index), self.config.order)
        images = _decode_rows(self.index, self.reader, rows, self.channels)
        return make_batch(
            self.config, self.seed, epoch, position, rows, images, self.img_size, self.colours_on_device
        )

    def __getitems__(self, cursors: Int64[np.ndarray, "b"]) -> ImageBatch | ViewBatch | ValueError:
        """`batch`, its ValueError returned: the loader would bury the message in two tracebacks."""
        try:
            return self.batch(cursors)
        except ValueError as error:
            return error


def make_batch(
    config: ImageData,
    seed: int,
    epoch: Int64[np.ndarray, "b"],
    position: Int64[np.ndarray, "b"],
    rows: Int64[np.ndarray, "b"],
    images: list[UInt8[np.ndarray, "_ _ c"]],
    img_size: int,
    colours_on_device: bool,
) -> ImageBatch | ViewBatch:
    """A finished micro-batch of decoded images: an ImageBatch where data.views is none.

    colours_on_device: crops only, their colours drawn and left to `ViewBatch.to`.
    """
    kinds = config.kinds(img_size)
    keys = (seed, torch.from_numpy(epoch), torch.from_numpy(position), torch.from_numpy(rows))
    if config.views == "none":
        return ImageBatch(augment(kinds[0], seed, epoch, position, images, img_size), *keys)
    pixels = crop if colours_on_device else augment
    views = tuple(
        pixels(kind, seed, epoch, position, images, kind.size, number) for number, kind in enumerate(kinds)
    )
    if not colours_on_device:
        return ViewBatch(views, *keys)
    colours = (draw_colours(kind, seed, epoch, position, number) for number, kind in enumerate(kinds))
    return ViewBatch(views, *keys, tuple(colours))


class EvalImages(Dataset):
    """Map-style: from rows of the index to images resized and cropped the same way every time."""

    def __init__(self, index: ShardIndex, img_size: int, channels: int) -> None:
        self.index, self.img_size, self.channels = index, img_size, channels
        self.reader = ShardReader(index)

    def __getitems__(
        self, rows: Int64[np.ndarray, "b"]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | ValueError:
        try:
            images = _decode_rows(self.index, self.reader, rows, self.channels)
        except ValueError as error:
            return error
        pixels = torch.stack([_resize_and_crop(image, self.img_size) for image in images])
        return pixels, torch.from_numpy(self.index.label[rows]), torch.from_numpy(rows)


def _decode_rows(index: ShardIndex, reader: ShardReader, rows: np.ndarray, channels: int) -> list[np.ndarray]:
    images = []
    for row, data in zip(rows, reader.read(rows)):
        try:
            images.append(decode(data, channels))
        except Exception as error:
            fix = f"find all with: selfsup data check {index.folder}"
            raise ValueError(f"{index.name(row)}: cannot decode the image: {error}; {fix}") from error
    return images


def _resize_and_crop(image: np.ndarray, size: int) -> torch.Tensor:
    """Short side to `size`, then the centre; images of that size are left as they are."""
    from torchvision.transforms.v2 import InterpolationMode, functional  # seconds to import: only where used

    pixels = torch.from_numpy(image).permute(2, 0, 1)
    pixels = functional.resize(pixels, [size], InterpolationMode.BICUBIC, antialias=True)
    return functional.center_crop(pixels, [size, size])


def train_batches(
    config: ImageData,
    index: ShardIndex,
    seed: int,
    img_size: int,
    channels: int,
    plan: BatchPlan,
    start_cursor: int,
    workers: int,
    colours_on_device: bool = False,
) -> Iterator[ImageBatch | ViewBatch]:
    """This rank's micro-batches from `start_cursor` on, without end; `.close()` ends the workers.

    The same batches whatever the number of workers. colours_on_device: see `make_batch`. Iterating raises
    ValueError, naming shard and key, for a sample that cannot be read or decoded: nothing is replaced in silence.
    """
    dataset = TrainImages(config, index, seed, img_size, channels, colours_on_device)
    # Workers hold about the next whole step ready, and at least two micro-batches each.
    prefetch = min(8, max(2, -(-plan.accumulation // max(1, workers)) + 1))
    return load(dataset, micro_batches(plan, start_cursor), workers, prefetch)


def eval_batches(
    index: ShardIndex, img_size: int, channels: int, batch_size: int, workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every sample once, in index order: images uint8 (b, c, img_size, img_size), labels int64 (b,)
    with -1 for none, rows int64 (b,). Short side to img_size, centre crop; nothing is random.

    Iterating raises ValueError, naming shard and key, for a sample that cannot be read or decoded.
    """
    rows = np.arange(len(index), dtype=np.int64)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return load(EvalImages(index, img_size, channels), batches, workers, prefetch=2)
