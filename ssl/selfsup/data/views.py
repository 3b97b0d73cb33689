"""Several random views of each image: their config, their parameters, the batch that carries them."""

from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from pydantic import Discriminator, Field, Tag, field_validator
from torch import Tensor
from tyro.constructors import PrimitiveConstructorSpec

from selfsup.batch import normalise, pixels
from selfsup.config import Section
from selfsup.data.augment import crop_and_resize, crop_boxes, flips
from selfsup.data.colour import OPERATIONS, Colours, apply_colours, kernel_size, parts
from selfsup.keyed import Purpose, uniform

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class View(Section):
    """One kind of view. The defaults are SimCLR's for ImageNet."""

    size: Annotated[int, Field(ge=2)] | None = None
    """Pixels across; none: encoder.img_size."""
    count: Annotated[int, Field(ge=1, le=100)] = 1
    """Views of this kind of each image."""
    crop_scale: tuple[Positive, Share] = (0.08, 1.0)
    """Random resized crop: least and largest share of the image's area."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Random resized crop: least and largest width / height."""
    hflip: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring left to right."""
    jitter: float = Field(0.8, ge=0, le=1)
    """Probability of the colour jitter: the next four, in random order."""
    brightness: float = Field(0.8, ge=0)
    """Pixels times a factor of 1 - brightness (at least 0) to 1 + brightness."""
    contrast: float = Field(0.8, ge=0)
    """Distances from the image's mean grey times a factor of 1 - contrast (at least 0) to 1 + contrast."""
    saturation: float = Field(0.8, ge=0)
    """Distances from each pixel's grey times a factor of 1 - saturation (at least 0) to 1 + saturation."""
    hue: float = Field(0.2, ge=0, le=0.5)
    """The hue turned by -hue to hue of the colour circle."""
    grey: float = Field(0.2, ge=0, le=1)
    """Probability of a grey image."""
    blur: float = Field(0.5, ge=0, le=1)
    """Probability of a Gaussian blur, a tenth of the view across."""
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Least and largest deviation of the blur, in pixels."""
    solarise: float = Field(0.0, ge=0, le=1)
    """Probability of inverting the pixels from 0.5 on."""

    @field_validator("crop_scale", "crop_ratio", "blur_sigma")
    @classmethod
    def _low_before_high(cls, value: tuple[float, float]) -> tuple[float, float]:
        return low_before_high(value)


def low_before_high(value: tuple[float, float]) -> tuple[float, float]:
    """The value. Raises ValueError where a range begins above its end."""
    if value[0] > value[1]:
        raise ValueError(f"expected low <= high, got {value[0]} and {value[1]}")
    return value


_BYOL = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
PRESETS: dict[str, tuple[View, ...]] = {
    "none": (),
    "simclr": (View(count=2),),
    "simclr-32": (View(count=2, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0),),
    "byol": (View(**_BYOL, blur=1.0), View(**_BYOL, blur=0.1, solarise=0.2)),
}
"""SimCLR (appendix A) for ImageNet, and with half the strength and no blur for 32 pixels (its appendix
B.9); BYOL's unequal pair (its appendix B), which MoCo-v3 takes too (for ResNet-50 with crops from 0.2 on).

The strengths are the papers'. What they do to pixels is torchvision's, as in SimCLR's listing (appendix A)
and MoCo-v3's code. The TensorFlow code of SimCLR and the JAX code of BYOL do otherwise: contrast about the
mean of each channel, saturation in HSV, black beyond the border for the blur; BYOL adds to brightness."""

Views = Annotated[
    Annotated[Literal["none", "simclr", "simclr-32", "byol"], Tag("<preset>")]
    | Annotated[tuple[View, ...], Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, (list, tuple)) else "<preset>"),
    PrimitiveConstructorSpec(  # how --help shows it: tyro leaves out what may be a list of sections
        nargs=1,
        metavar="{none,simclr,simclr-32,byol}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [value if isinstance(value, str) else f"{len(value)} kinds of view"],
    ),
]


def view_kinds(views: str | tuple[View, ...]) -> tuple[View, ...]:
    """One `View`, its `count` 1, for each view of an image; none for `none`."""
    kinds = PRESETS[views] if isinstance(views, str) else views
    return tuple(kind.model_copy(update={"count": 1}) for kind in kinds for _ in range(kind.count))


class ViewBatch(NamedTuple):
    """A micro-batch of images in several views, keyed as an ImageBatch is."""

    views: tuple[Tensor, ...]
    """Each (b, c, s, s), s its own: uint8 as the loader yields them, float32 normalised after `to`."""
    seed: int
    epoch: Tensor
    """(b,) int64."""
    position: Tensor
    """(b,) int64: place in the epoch's order."""
    index: Tensor
    """(b,) int64: row of the sample in the shard index; -1 where there is no index."""
    colours: tuple[Colours, ...] = ()
    """Of each view, how its colours are still to be changed; empty where they were, and after `to`."""

    @property
    def targets(self) -> int:
        """The number of loss terms: one per image."""
        return len(self.images)

    @property
    def images(self) -> Tensor:
        """The first view."""
        return self.views[0]

    def to(self, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> "ViewBatch":
        """Moves to the device, changes colours that are still to be, and normalises as ImageBatch does."""
        views = [view.to(device, non_blocking=True) for view in self.views]
        for i, colours in enumerate(self.colours):
            kernel = kernel_size(views[i].shape[-1])
            changed = apply_colours(views[i].float().div_(255), colours, kernel)
            views[i] = changed.mul_(255)
        return ViewBatch(
            views=tuple(normalise(view, mean, std) for view in views),
            seed=self.seed,
            epoch=self.epoch.to(device, non_blocking=True),
            position=self.position.to(device, non_blocking=True),
            index=self.index,
        )

    def shown(
        self, mean: tuple[float, ...], std: tuple[float, ...], most: int = 64
    ) -> UInt8[Tensor, "n c s s"]:
        """For a picture, after `to`: of each image its first two views of one size, at most `most` in all."""
        alike = [view for view in self.views if view.shape == self.images.shape][:2]
        tiles = torch.stack([view[: -(-most // len(alike))] for view in alike], dim=1)
        return pixels(tiles.flatten(0, 1)[:most], mean, std)  # (b, 2, c, s, s) -> (2 b, c, s, s)


def draw_colours(
    view: View,
    seed: int,
    epoch: int | Int64[np.ndarray, "n"],
    position: Int64[np.ndarray, "n"],
    number: int,
) -> Colours:
    """The colours of n samples in view `number`, of the kind `view`: 13 draws a sample, used or not.

    Factors and shift are uniform, as in torchvision's ColorJitter; the order is that of four draws.
    """
    draws = uniform(seed, epoch, position, Purpose.COLOUR, 4 + 4 + 5, number)
    low = [max(0.0, 1 - getattr(view, name)) for name in OPERATIONS[:3]] + [-view.hue, view.blur_sigma[0]]
    high = [1 + getattr(view, name) for name in OPERATIONS[:3]] + [view.hue, view.blur_sigma[1]]
    values = np.array(low) + draws[:, 4:9] * (np.array(high) - np.array(low))
    brightness, contrast, saturation, hue, sigma = torch.from_numpy(values.astype(np.float32)).unbind(1)
    happens = draws[:, 9:13] < [view.jitter, view.grey, view.blur, view.solarise]
    jittered, grey, blurred, solarised = torch.from_numpy(happens).unbind(1)
    return Colours(
        order=torch.from_numpy(np.argsort(draws[:, :4], axis=1)),
        jittered=jittered,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        grey=grey,
        blurred=blurred,
        sigma=sigma,
        solarised=solarised,
    )


def crop(
    view: View,
    seed: int,
    epoch: Int64[np.ndarray, "b"],
    position: Int64[np.ndarray, "b"],
    images: list[UInt8[np.ndarray, "_ _ c"]],
    size: int,
    number: int,
) -> UInt8[Tensor, "b c s s"]:
    """The geometric half of `augment`."""
    shapes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    height, width = shapes[:, 0], shapes[:, 1]
    boxes = crop_boxes(seed, epoch, position, height, width, view.crop_scale, view.crop_ratio, number)
    mirrored = flips(seed, epoch, position, view.hflip, number)
    return torch.from_numpy(crop_and_resize(images, boxes, mirrored, size))


def augment(
    view: View,
    seed: int,
    epoch: Int64[np.ndarray, "b"],
    position: Int64[np.ndarray, "b"],
    images: list[UInt8[np.ndarray, "_ _ c"]],
    size: int,
    number: int = 0,
) -> UInt8[Tensor, "b c s s"]:
    """Random view `number` of each image, of the kind `view`, size x size: uint8 (b, c, size, size)."""
    cropped = crop(view, seed, epoch, position, images, size, number)
    if max(view.jitter, view.grey, view.blur, view.solarise) == 0:
        return cropped
    colours, kernel = draw_colours(view, seed, epoch, position, number), kernel_size(size)
    for part in parts(cropped):  # not all at once: as floats they are four times as large
        changed = apply_colours(cropped[part].float().div_(255), colours.part(part), kernel)
        # NumPy's cast takes a quarter of the time of torch's.
        cropped[part] = torch.from_numpy(changed.mul_(255).round_().numpy().astype(np.uint8))
    return cropped
