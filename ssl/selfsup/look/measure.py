"""What a folder of shards holds: counted from the index, and measured on a keyed sample of its images."""

import io
from collections import Counter
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from selfsup.data.decode import decode_image
from selfsup.data.index import ShardIndex
from selfsup.data.order import sample_order
from selfsup.data.reader import ShardReader


class Seen(NamedTuple):
    """One sample, read and decoded as far as it goes."""

    row: int
    size: tuple[int, int]
    """Height and width; zeros where it cannot be decoded."""
    rgb: UInt8[np.ndarray, "h w 3"] | None
    """As training reads it with encoder.in_chans 3; None where it cannot be decoded."""
    grey: UInt8[np.ndarray, "h w 1"] | None
    """As training reads it with encoder.in_chans 1."""
    kind: str
    """How it is stored: `JPEG`, `PNG`, `WEBP`; empty where it cannot be decoded."""
    mode: str
    """PIL's name of its channels: `RGB`, `L` (grey), `RGBA`, `P` (palette), `CMYK`, `I;16`, ..."""
    fault: str
    """Why it cannot be decoded, or an empty string."""


class ChannelStatistics(NamedTuple):
    """Of pixels in [0, 1], a value a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Measured(NamedTuple):
    """What the sampled images are like."""

    images: int
    """Read and decoded."""
    undecodable: int
    kinds: dict[str, int]
    modes: dict[str, int]
    heights: tuple[int, float, int]
    """Least, median, largest."""
    widths: tuple[int, float, int]
    channels: dict[int, ChannelStatistics]
    """As read with encoder.in_chans 3 (RGB) and 1 (grey)."""


def keyed_rows(n: int, count: int, seed: int) -> Int64[np.ndarray, " k"]:
    """`count` different numbers below n, the same for the same seed; a larger count begins with the
    smaller one's. All n, shuffled, where count exceeds them."""
    places = np.arange(min(n, count), dtype=np.int64)
    return sample_order(seed, 0, places, n, "shuffled")


def look_at(index: ShardIndex, reader: ShardReader, row: int) -> Seen:
    """Reads and decodes one sample; what is wrong with a bad one is told, not raised."""
    try:
        data = reader.read(np.array([row], dtype=np.int64))[0]
        rgb, grey = (decode_image(data, channels, index.name(row)) for channels in (3, 1))
    except ValueError as error:
        return Seen(row, (0, 0), None, None, "", "", str(error))
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:  # reads the header only
        return Seen(row, rgb.shape[:2], rgb, grey, image.format or "", image.mode, "")


class Tally:
    """Statistics of images, one after another: none has to be kept."""

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._modes: Counter[str] = Counter()
        self._sizes: list[tuple[int, int]] = []
        self._moments: dict[int, list[np.ndarray]] = {3: [], 1: []}
        self._undecodable = 0

    def add(self, seen: Seen) -> None:
        """Counts one sample in."""
        if seen.rgb is None or seen.grey is None:
            self._undecodable += 1
            return
        self._kinds[seen.kind] += 1
        self._modes[seen.mode] += 1
        self._sizes.append(seen.size)
        self._moments[3].append(moments(seen.rgb))
        self._moments[1].append(moments(seen.grey))

    def result(self) -> Measured | None:
        """All that was counted; None where not one image could be decoded."""
        if not self._sizes:
            return None
        heights, widths = zip(*self._sizes)
        return Measured(
            images=len(self._sizes),
            undecodable=self._undecodable,
            kinds=dict(self._kinds.most_common()),
            modes=dict(self._modes.most_common()),
            heights=(min(heights), float(np.median(heights)), max(heights)),
            widths=(min(widths), float(np.median(widths)), max(widths)),
            channels={c: channel_statistics(np.stack(rows)) for c, rows in self._moments.items()},
        )


def moments(pixels: UInt8[np.ndarray, "h w c"]) -> np.ndarray:
    """Mean and mean square of each channel in [0, 1]: float64 (2, c); sums of whole numbers, exact."""
    values = pixels.reshape(-1, pixels.shape[2]).astype(np.int64)  # (h w, c)
    return np.stack([values.mean(axis=0) / 255, (values**2).mean(axis=0) / 255**2])


def channel_statistics(each: np.ndarray) -> ChannelStatistics:
    """Mean and standard deviation over all pixels, from each image's moments (n, 2, c).

    Each image weighs the same whatever its size, as in training, which resizes all to one.
    """
    mean, square = each.mean(axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return ChannelStatistics(tuple(mean.tolist()), tuple(std.tolist()))
