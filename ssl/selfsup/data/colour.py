"""Colour jitter, grey, blur and solarising: what SimCLR's and BYOL's views add to a crop.

Parameters are drawn apart from the pixels they change (`Colours`), so a loader worker and a GPU give
the same picture up to rounding. Each operation is torchvision's (transforms.v2.functional) on float
images, batched over samples that each have their own strength. None of them goes through a matrix
product or a convolution: float32_matmul_precision and cuDNN's TF32 must not reach pixels.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Int64, Num
from torch import Tensor

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
"""What the numbers in `Colours.order` stand for."""

_LUMA = (0.2989, 0.587, 0.114)
IN_CACHE = 2**20
"""Numbers that a CPU changes together: as many as stay in its cache."""
_LEAST_WEIGHT = 2.0**-26
"""A weight below this, times a pixel, is lost in float32 beside the middle one: it counts as zero."""


class Colours(NamedTuple):
    """What happens to the colours of n samples in one view: tensors on the CPU, drawn whether used or not."""

    order: Int64[Tensor, "n 4"]
    """A permutation of OPERATIONS: the one applied first, second, ..."""
    jittered: Bool[Tensor, "n"]
    brightness: Float32[Tensor, "n"]
    contrast: Float32[Tensor, "n"]
    saturation: Float32[Tensor, "n"]
    hue: Float32[Tensor, "n"]
    """A shift, in turns of the colour circle."""
    grey: Bool[Tensor, "n"]
    blurred: Bool[Tensor, "n"]
    sigma: Float32[Tensor, "n"]
    """Of the blur, in pixels."""
    solarised: Bool[Tensor, "n"]

    def part(self, rows: slice) -> "Colours":
        """Those of some samples."""
        return Colours(*(field[rows] for field in self))


def kernel_size(size: int) -> int:
    """Pixels across the blur of a size x size image: a tenth of it, odd (224: 23), and at least 3."""
    return max(3, size // 10 // 2 * 2 + 1)


def apply_colours(
    images: Float32[Tensor, "n c h w"], colours: Colours, kernel: int
) -> Float32[Tensor, "n c h w"]:
    """The images, in [0, 1], jittered, made grey, blurred and solarised, in this order, as `colours` says.

    A jittered sample goes through the four OPERATIONS in its own order. kernel: pixels across the
    blur, odd; the border is reflected. Grey images (c = 1) have no saturation, hue or grey to change.
    """
    assert kernel % 2 == 1 and kernel // 2 < min(images.shape[2:]), (kernel, images.shape)
    assert colours.order.device.type == "cpu", "index lists are made on the host: the device need not wait"
    out = images.clone()
    for part in parts(out):
        _apply(out[part], colours.part(part), kernel)
    return out


def parts(images: Num[Tensor, "n c h w"]) -> Iterator[slice]:
    """The images in parts that stay in a CPU's cache; elsewhere all at once."""
    together = max(1, IN_CACHE // images[0].numel()) if images.device.type == "cpu" else len(images)
    for start in range(0, len(images), together):
        yield slice(start, start + together)


class _Change(NamedTuple):
    """One operation on some of the samples."""

    change: Callable[[Tensor, Tensor], None]
    """Changes images (n, c, h, w) in place, by a strength (n, 1, 1, 1)."""
    rows: Tensor
    strength: Tensor


def _apply(images: Tensor, colours: Colours, kernel: int) -> None:
    """In place. The two small tensors that a device needs go there at once."""
    changes = _changes(colours, images.shape[1], kernel)
    if not changes:
        return
    sizes = [len(change.rows) for change in changes]
    rows = torch.cat([change.rows for change in changes]).to(images.device, non_blocking=True)
    strengths = torch.cat([change.strength for change in changes]).to(images.device, non_blocking=True)
    strengths = strengths.view(-1, 1, 1, 1)  # (rows of all changes) -> broadcasts over c, h, w
    for (change, _, _), members, strength in zip(changes, rows.split(sizes), strengths.split(sizes)):
        if len(members) == len(images):
            change(images, strength)
        else:
            chosen = images.index_select(0, members)
            change(chosen, strength)
            images.index_copy_(0, members, chosen)


def _changes(colours: Colours, channels: int, kernel: int) -> list[_Change]:
    """Every operation that some sample needs, in order. A factor of 1 and a shift of 0 need none."""
    found: list[_Change] = []

    def add(change: Callable[[Tensor, Tensor], None], needed: Tensor, strength: Tensor) -> None:
        rows = needed.nonzero()[:, 0]
        if len(rows):
            found.append(_Change(change, rows, strength[rows]))

    jitter = [(brighten, colours.brightness, 1.0), (contrast, colours.contrast, 1.0)]
    if channels == 3:
        jitter += [(saturate, colours.saturation, 1.0), (turn_hue, colours.hue, 0.0)]
    needed = [colours.jittered & (strength != neutral) for _, strength, neutral in jitter]
    for step in colours.order.unbind(1):
        for number, (change, strength, _) in enumerate(jitter):
            add(change, needed[number] & (step == number), strength)
    if channels == 3:
        add(make_grey, colours.grey, colours.sigma)
    add(lambda images, sigma: blur(images, sigma, kernel), colours.blurred, colours.sigma)
    add(solarise, colours.solarised, colours.sigma)
    return found


def brighten(images: Float32[Tensor, "n c h w"], factor: Float32[Tensor, "n 1 1 1"]) -> None:
    """In place: pixels times the factor."""
    images.mul_(factor).clamp_(0, 1)


def contrast(images: Float32[Tensor, "n c h w"], factor: Float32[Tensor, "n 1 1 1"]) -> None:
    """In place: away from (factor > 1) or towards the mean of the image's grey."""
    # Rows first: torch would share one long sum out among threads, and add in another order.
    mean = images.mean(3, keepdim=True).mean(2, keepdim=True)
    if images.shape[1] == 3:
        mean = _luma(mean)  # grey is linear, so its mean is the grey of the means
    images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturate(images: Float32[Tensor, "n 3 h w"], factor: Float32[Tensor, "n 1 1 1"]) -> None:
    """In place: away from (factor > 1) or towards each pixel's grey."""
    grey = _luma(images).mul_(1 - factor)
    images.mul_(factor).add_(grey).clamp_(0, 1)


def make_grey(images: Float32[Tensor, "n 3 h w"], unused: Float32[Tensor, "n 1 1 1"]) -> None:
    """In place: three equal channels."""
    images.copy_(_luma(images))


def _luma(images: Tensor) -> Tensor:
    """(n, 3, h, w) -> (n, 1, h, w), ITU-R 601."""
    red, green, blue = images.split(1, dim=1)
    return red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def turn_hue(images: Float32[Tensor, "n 3 h w"], shift: Float32[Tensor, "n 1 1 1"]) -> None:
    """In place: the hue of HSV turned by `shift` turns, value and saturation kept.

    Hue and back in sextants y of [-3, 3], red at 0, green at 2, blue at -2. With the largest channel v,
    the smallest w and the chroma c = v - w, |y| = 2 + (g + b - r - v) / c, its sign that of g - b; and
    back r = v - c t(y), g = w + c t(y + 1), b = w + c t(y - 1), with t(x) = |x| - 1 cut off at 0 and 1.
    No case is told apart: masks take longer than all of this.
    """
    red, green, blue = images.unbind(1)
    largest = torch.maximum(red, green)
    torch.maximum(largest, blue, out=largest)
    smallest = torch.minimum(red, green)
    torch.minimum(smallest, blue, out=smallest)
    chroma = largest - smallest
    scratch = chroma.clamp_min(1e-20)  # where it is 0, so is what it divides
    y = green + blue
    y.sub_(red).sub_(largest).div_(scratch).add_(2)
    torch.sub(green, blue, out=scratch)
    y.view(torch.int32).bitwise_or_(scratch.view(torch.int32).bitwise_and_(-(2**31)))  # the sign bit
    # Not alpha=6, which torch rounds otherwise within a vector than beside it: threads cut elsewhere.
    y.add_(6 * shift[:, 0])
    y.sub_(torch.mul(y, 1 / 6, out=scratch).round_(), alpha=6)
    torch.addcmul(largest, chroma, torch.abs(y, out=scratch).sub_(1).clamp_(0, 1), value=-1, out=red)
    torch.addcmul(smallest, chroma, torch.add(y, 1, out=scratch).abs_().sub_(1).clamp_(0, 1), out=green)
    torch.addcmul(smallest, chroma, y.sub_(1).abs_().sub_(1).clamp_(0, 1), out=blue)


def blur(images: Float32[Tensor, "n c h w"], sigma: Float32[Tensor, "n 1 1 1"], kernel: int) -> None:
    """In place: the Gaussian blur, cut off at `kernel` pixels, across and then down; borders reflected."""
    weights = gaussian(sigma[:, 0, 0, 0], kernel)[:, :, None, None, None]  # (n, k) -> (n, k, 1, 1, 1)
    reach, (height, width) = kernel // 2, images.shape[2:]
    if images.device.type == "cpu":  # elsewhere to ask would be to wait
        reach = int((weights != 0).any(dim=0).flatten().nonzero().max()) - kernel // 2
    middle = kernel // 2
    padded = torch.nn.functional.pad(images, (reach, reach, 0, 0), mode="reflect")
    torch.mul(images, weights[:, middle], out=images)
    for i in (i for i in range(-reach, reach + 1) if i):
        images.addcmul_(padded[..., reach + i : reach + i + width], weights[:, middle + i])
    padded = torch.nn.functional.pad(images, (0, 0, reach, reach), mode="reflect")
    torch.mul(images, weights[:, middle], out=images)
    for i in (i for i in range(-reach, reach + 1) if i):
        images.addcmul_(padded[..., reach + i : reach + i + height, :], weights[:, middle + i])


def gaussian(sigma: Float32[Tensor, "n"], kernel: int) -> Float32[Tensor, "n kernel"]:
    """The weights of a blur at whole pixels, adding up to 1; those below float32's resolution are 0."""
    x = torch.arange(-(kernel // 2), kernel // 2 + 1, device=sigma.device)
    wide = math.sqrt(2) * sigma[:, None].clamp_min(1e-3)  # below, the neighbours have nothing anyway
    weights = torch.softmax(-((x / wide) ** 2), dim=1)
    return weights * (weights > _LEAST_WEIGHT)


def solarise(images: Float32[Tensor, "n c h w"], unused: Float32[Tensor, "n 1 1 1"]) -> None:
    """In place: pixels from 0.5 on are inverted, which is the smaller of the two (`where` takes 20 times as long)."""
    torch.minimum(images, 1 - images, out=images)
