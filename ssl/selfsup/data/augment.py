"""Random resized crop and flip, every draw keyed: a pure function of (seed, epoch, position, view).

Two routes to the pixels, chosen for each image by its own size and never by what else is in the
batch. Large images go one by one through torchvision. For small ones a call costs more than its
arithmetic, so they go together: resizing is linear and separable, one small matrix a side.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8

from selfsup.keyed import Purpose, uniform

SMALL = 64
"""Images no larger than this on either side are resized by matrices."""

_TOGETHER = 32
"""Small images in one matrix product: as many as stay in the cache (256 at once take twice as long)."""
_TRIES = 10
_WEIGHT_BITS = 15


def crop_boxes(
    seed: int,
    epoch: int | Int64[np.ndarray, "n"],
    position: Int64[np.ndarray, "n"],
    height: Int64[np.ndarray, "n"],
    width: Int64[np.ndarray, "n"],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    view: int = 0,
) -> Int64[np.ndarray, "n 4"]:
    """The box of each sample's random crop: int64 (n, 4) of top, left, height, width.

    torchvision's RandomResizedCrop: ten tries at an area in `scale` (share of the image) and an
    aspect ratio in `ratio` (log-uniform, width / height), the first that fits; else the largest
    central crop within `ratio`. 22 draws a sample, used or not, so that none moves another.
    """
    draws = uniform(seed, epoch, position, Purpose.CROP, 2 * _TRIES + 2, view)
    log_low, log_high = np.log(ratio)
    area = (height * width)[:, None] * (scale[0] + draws[:, :_TRIES] * (scale[1] - scale[0]))
    aspect = np.exp(log_low + draws[:, _TRIES : 2 * _TRIES] * (log_high - log_low))
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (0 < widths) & (widths <= width[:, None]) & (0 < heights) & (heights <= height[:, None])
    first = np.argmax(fits, axis=1)[:, None]
    found = fits.any(axis=1)

    # The fallback; at least one pixel, where torchvision would round a sliver away.
    shape = width / height
    narrow, wide = shape < ratio[0], shape > ratio[1]
    whole_height = np.where(narrow, np.maximum(np.rint(width / ratio[0]), 1), height).astype(np.int64)
    whole_width = np.where(wide, np.maximum(np.rint(height * ratio[1]), 1), width).astype(np.int64)

    h = np.where(found, np.take_along_axis(heights, first, 1)[:, 0], whole_height)
    w = np.where(found, np.take_along_axis(widths, first, 1)[:, 0], whole_width)
    top = np.floor(draws[:, -2] * (height - h + 1)).astype(np.int64)
    left = np.floor(draws[:, -1] * (width - w + 1)).astype(np.int64)
    top = np.where(found, top, (height - h) // 2)
    left = np.where(found, left, (width - w) // 2)
    return np.stack([top, left, h, w], axis=1)


def flips(
    seed: int,
    epoch: int | Int64[np.ndarray, "n"],
    position: Int64[np.ndarray, "n"],
    probability: float,
    view: int = 0,
) -> Bool[np.ndarray, "n"]:
    """Which samples are mirrored left to right: bool (n,)."""
    return uniform(seed, epoch, position, Purpose.FLIP, 1, view)[:, 0] < probability


def crop_and_resize(
    images: Sequence[UInt8[np.ndarray, "_ _ _"]],
    boxes: Int64[np.ndarray, "n 4"],
    mirrored: Bool[np.ndarray, "n"],
    size: int,
) -> UInt8[np.ndarray, "n c size size"]:
    """Each image's box, resized to size x size (bicubic, antialiased) and mirrored where asked.

    images: n uint8 arrays (h, w, c), shapes free but for c. Returns uint8 (n, c, size, size).
    """
    out = np.empty((len(images), images[0].shape[2], size, size), dtype=np.uint8)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(images):
        height, width = image.shape[:2]
        if max(height, width) <= SMALL:
            groups.setdefault((height, width), []).append(i)
        else:
            out[i] = _crop_large(image, boxes[i], bool(mirrored[i]), size)
    for group in groups.values():
        for start in range(0, len(group), _TOGETHER):
            members = group[start : start + _TOGETHER]
            stack = np.stack([images[i] for i in members])
            out[members] = _crop_small(stack, boxes[members], mirrored[members], size)
    return out


def _crop_large(image: np.ndarray, box: np.ndarray, mirrored: bool, size: int) -> np.ndarray:
    from torchvision.transforms.v2 import InterpolationMode, functional  # seconds to import: only where used

    top, left, height, width = box.tolist()
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    pixels = functional.resized_crop(
        pixels, top, left, height, width, [size, size], InterpolationMode.BICUBIC, antialias=True
    )
    return (pixels.flip(-1) if mirrored else pixels).numpy()


def _crop_small(images: np.ndarray, boxes: np.ndarray, mirrored: np.ndarray, size: int) -> np.ndarray:
    """(n, h, w, c) images of one shape, columns first and rounded between the passes, as Pillow does.

    Products of 8-bit pixels and 15-bit weights add up below 2**24, so float32 holds every sum
    exactly and the result does not depend on the order in which BLAS adds. NumPy, because torch's
    float32_matmul_precision must not reach these sums.
    """
    n, h, w, c = images.shape
    rows = np.zeros((n, 1, size, h), dtype=np.float32)
    columns = np.zeros((n, size, w), dtype=np.float32)
    for i, ((top, left, height, width), mirror) in enumerate(zip(boxes.tolist(), mirrored.tolist())):
        rows[i, 0, :, top : top + height] = resize_weights(height, size)
        across = resize_weights(width, size)
        columns[i, :, left : left + width] = across[::-1] if mirror else across
    pixels = images.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    pixels = _round(np.matmul(pixels.reshape(n, c * h, w), columns.transpose(0, 2, 1)))
    return _round(np.matmul(rows, pixels.reshape(n, c, h, size))).astype(np.uint8)


def _round(sums: np.ndarray) -> np.ndarray:
    """Sums in units of 2**-15 to whole numbers of 0..255, in place; exact."""
    sums *= 2.0**-_WEIGHT_BITS
    sums += 0.5
    np.floor(sums, out=sums)
    return np.clip(sums, 0, 255, out=sums)


@lru_cache(maxsize=4 * SMALL)
def resize_weights(length: int, size: int) -> Float32[np.ndarray, "size length"]:
    """The matrix that resizes `length` pixels to `size`: float32 (size, length), whole numbers.

    Pillow's antialiased bicubic (a = -0.5, the kernel stretched when shrinking, cut off at the
    border and normalised), in units of 2**-15. Read-only: it is shared.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    centre = (np.arange(size)[:, None] + 0.5) * scale
    pixel = np.arange(length)[None, :]
    first = np.floor(np.maximum(centre - 2 * stretch + 0.5, 0))
    last = np.floor(np.minimum(centre + 2 * stretch + 0.5, length))
    x = np.abs((pixel - centre + 0.5) / stretch)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * ((pixel >= first) & (pixel < last))
    weights /= weights.sum(axis=1, keepdims=True)
    quantised = np.rint(weights * 2**_WEIGHT_BITS).astype(np.float32)
    assert 255 * np.abs(quantised).sum(axis=1).max() < 2**24, (length, size)
    quantised.flags.writeable = False
    return quantised
