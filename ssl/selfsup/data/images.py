"""Images from shards to batches: the config, decoding, the data set, the loaders."""

import atexit
import io
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

import numpy as np
import simplejpeg
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from pydantic import Field, field_validator
from torch.utils.data import DataLoader, Dataset, IterableDataset

from selfsup.batch import ImageBatch
from selfsup.config import Section
from selfsup.data.augment import crop_and_resize, crop_boxes, flips
from selfsup.data.index import ShardIndex
from selfsup.data.order import BatchPlan, micro_batches, sample_order
from selfsup.data.reader import ShardReader

MAX_PIXELS = 50_000_000
"""A header that promises more is refused before anything is decoded: a few kB can claim gigabytes."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"

Positive = Annotated[float, Field(gt=0)]


class ImageData(Section):
    """Images in WebDataset shards."""

    name: Literal["images"] = "images"
    shards: str
    """The folder that holds the shards, local."""
    index: Literal["auto", "none"] = "auto"
    """auto: read by the index beside the shards; none: stream with webdataset, its promises weaker."""
    order: Literal["shuffled", "chunked", "sequential"] = "shuffled"
    """shuffled over everything; chunked for hard disks and network file systems; or as stored."""
    crop_scale: tuple[Positive, Annotated[float, Field(gt=0, le=1)]] = (0.2, 1.0)
    """Random resized crop: least and largest share of the image's area."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Random resized crop: least and largest width / height."""
    hflip: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring left to right."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from pixels scaled to 0..1, one value a channel (3, or 1 for grey)."""
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    """Divides what is left, one value a channel."""

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _low_before_high(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"expected low <= high, got {value[0]} and {value[1]}")
        return value

    @field_validator("mean", "std")
    @classmethod
    def _one_or_three(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in (1, 3):
            raise ValueError(f"expected 1 or 3 values, one a channel, got {len(value)}")
        return value


def decode_image(data: bytes, channels: int, name: str) -> UInt8[np.ndarray, "h w channels"]:
    """JPEG, PNG or WebP bytes to uint8 (h, w, channels), channels 1 (grey) or 3 (RGB).

    An EXIF orientation is not applied, transparency is dropped, 16 bits are cut to 8; of an
    animation the first frame. Raises ValueError naming the sample for other formats, for damage (a
    JPEG decoder's warnings count), and above MAX_PIXELS.
    """
    assert channels in (1, 3), channels
    try:
        return _decode(data, channels)
    except Exception as error:  # decoders raise anything from KeyError to SyntaxError on damaged input
        raise ValueError(f"{name}: cannot decode the image: {error}") from error


def _decode(data: bytes, channels: int) -> np.ndarray:
    if data.startswith(_JPEG):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width)
        if colours in ("CMYK", "YCCK"):
            return _decode_pil(JpegImageFile(io.BytesIO(data)), channels)
        return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    if data.startswith(_PNG):
        _check_size(int.from_bytes(data[20:24]), int.from_bytes(data[16:20]))  # IHDR comes first
        return _decode_pil(PngImageFile(io.BytesIO(data)), channels)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _check_size(*_webp_size(data))
        return _decode_pil(WebPImageFile(io.BytesIO(data)), channels)
    raise ValueError(f"not a JPEG, PNG or WebP image (it begins with {data[:8]!r})")


def _check_size(height: int, width: int) -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"expected 1 to {MAX_PIXELS} pixels, its header says {height} x {width}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the first chunk: extended, lossless or lossy."""
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return int.from_bytes(data[28:30], "little") & 0x3FFF, int.from_bytes(data[26:28], "little") & 0x3FFF


def _decode_pil(image: Image.Image, channels: int) -> np.ndarray:
    _check_size(image.height, image.width)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # convert() would clip at 255
    mode = "RGB" if channels == 3 else "L"
    pixels = np.array(image if image.mode == mode else image.convert(mode))  # a copy: PIL's is read-only
    return pixels.reshape(*pixels.shape[:2], channels)


class TrainImages(Dataset):
    """Map-style: from global cursors to a finished micro-batch, a pure function."""

    def __init__(self, config: ImageData, index: ShardIndex, seed: int, img_size: int, channels: int) -> None:
        self.config, self.index, self.seed = config, index, seed
        self.img_size, self.channels = img_size, channels
        self.reader = ShardReader(index)

    def batch(self, cursors: Int64[np.ndarray, "b"]) -> ImageBatch:
        """The micro-batch at int64 (b,) cursors; images uint8 (b, c, img_size, img_size).

        Raises ValueError naming shard and key for a sample that cannot be read or decoded.
        """
        epoch, position = np.divmod(cursors, len(self.index))
        rows = sample_order(self.seed, epoch, position, len(self.index), self.config.order)
        images = _decode_rows(self.index, self.reader, rows, self.channels)
        pixels = augment(self.config, self.seed, epoch, position, images, self.img_size)
        return ImageBatch(
            images=torch.from_numpy(pixels),
            seed=self.seed,
            epoch=torch.from_numpy(epoch),
            position=torch.from_numpy(position),
            index=torch.from_numpy(rows),
        )

    def __getitems__(self, cursors: Int64[np.ndarray, "b"]) -> ImageBatch | ValueError:
        """`batch`, its ValueError returned: the loader would bury the message in two tracebacks."""
        try:
            return self.batch(cursors)
        except ValueError as error:
            return error


def augment(
    config: ImageData,
    seed: int,
    epoch: Int64[np.ndarray, "b"],
    position: Int64[np.ndarray, "b"],
    images: list[UInt8[np.ndarray, "_ _ c"]],
    img_size: int,
    view: int = 0,
) -> UInt8[np.ndarray, "b c s s"]:
    """A random view of each image: uint8 (b, c, img_size, img_size). Training takes view 0."""
    shapes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    height, width = shapes[:, 0], shapes[:, 1]
    boxes = crop_boxes(seed, epoch, position, height, width, config.crop_scale, config.crop_ratio, view)
    return crop_and_resize(images, boxes, flips(seed, epoch, position, config.hflip, view), img_size)


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
            images.append(_decode(data, channels))
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
) -> Iterator[ImageBatch]:
    """This rank's micro-batches from `start_cursor` on, without end; `.close()` ends the workers.

    The same batches whatever the number of workers. Iterating raises ValueError, naming shard and
    key, for a sample that cannot be read or decoded: nothing is replaced in silence.
    """
    dataset = TrainImages(config, index, seed, img_size, channels)
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


def load(dataset: Dataset, batches: Iterable[np.ndarray] | None, workers: int, prefetch: int) -> Iterator:
    """What `dataset` makes of each of `batches` (None: it is an iterable one), by `workers` processes.

    A ValueError that the data set yields is raised. Closing the iterator ends the workers.
    """
    assert (batches is None) == isinstance(dataset, IterableDataset)
    on_linux = sys.platform == "linux"
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        batch_size=1 if batches is not None else None,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="fork" if workers and on_linux else None,
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from the global generator, which is training's
    )
    iterator = iter(loader)
    if workers:
        # At exit multiprocessing sends SIGTERM to what is left and waits; our workers ignore it, so a
        # run that died of an error, its traceback still holding this frame, would never end.
        atexit.register(iterator._shutdown_workers)
    try:
        for batch in iterator:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a loader process died ({error}); go on with selfsup train --resume") from error
    finally:
        if workers:
            iterator._shutdown_workers()  # now, not when the garbage collector comes by
            atexit.unregister(iterator._shutdown_workers)


def _as_is(batch: object) -> object:
    return batch


def _init_worker(worker: int) -> None:
    """A signal goes to the whole process group: the loop answers it, the workers serve on until closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
