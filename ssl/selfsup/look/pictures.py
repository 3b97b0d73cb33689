"""Images side by side in one picture, for TensorBoard and PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 2
"""White pixels between two tiles."""
_CAPTION = 12
"""Height of a line of text, in pixels."""


def grid(images: UInt8[Tensor, "b c h w"], columns: int) -> Float[Tensor, "3 H W"]:
    """Images in rows of `columns`, white between them: float32 (3, H, W) in [0, 1].

    Grey images come out as RGB; places without an image in the last row are white. Raises
    ValueError for no image, no column, or other than 1 or 3 channels.
    """
    count, channels, height, width = images.shape
    if channels not in (1, 3) or count == 0 or columns < 1:
        raise ValueError(
            f"grid: expected images (b, 1 or 3, h, w) and at least one column, got "
            f"{tuple(images.shape)} and {columns} columns"
        )
    rows = -(-count // columns)
    shape = (rows * columns, 3, height + GAP, width + GAP)
    tiles = torch.full(shape, 255, dtype=torch.uint8, device=images.device)
    tiles[:count, :, :height, :width] = images  # one grey channel broadcasts to three
    whole = rearrange(tiles, "(r q) c h w -> c (r h) (q w)", q=columns)
    return whole[:, : whole.shape[1] - GAP, : whole.shape[2] - GAP].float() / 255


def enlarged(images: UInt8[Tensor, "b c h w"], at_least: int) -> UInt8[Tensor, "b c H W"]:
    """Each pixel repeated a whole number of times, so that the shorter side has `at_least` pixels."""
    factor = max(1, -(-at_least // min(images.shape[-2:])))
    return images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def captioned(images: UInt8[Tensor, "b c h w"], captions: Sequence[str]) -> UInt8[Tensor, "b 3 H w"]:
    """Each image as RGB with a line of text below it, cut off at the image's width."""
    tiles = []
    for image, caption in zip(images, captions, strict=True):
        height, width = image.shape[1:]
        tile = Image.new("RGB", (width, height + _CAPTION), "white")
        tile.paste(Image.fromarray(rearrange(image.expand(3, -1, -1), "c h w -> h w c").cpu().numpy()))
        line = " ".join(caption.split())  # one line: PIL would draw several
        ImageDraw.Draw(tile).text((1, height), line, fill="black", font=ImageFont.load_default(_CAPTION - 2))
        tiles.append(torch.from_numpy(np.array(tile)).permute(2, 0, 1))  # (3, h + caption, w)
    return torch.stack(tiles)


def attention_picture(
    image: UInt8[Tensor, "c h w"], maps: Float[Tensor, "depth heads side side2"], tile: int = 96
) -> Float[Tensor, "3 H W"]:
    """A row for each block: the image, then the map of each head, in tiles of about `tile` pixels.

    Each map is scaled by its own largest weight: black is zero, white its largest.
    """
    depth, heads, side, _ = maps.shape
    scaled = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    shades = (
        (scaled * 255).round().to(torch.uint8).flatten(0, 1)[:, None].cpu()
    )  # (depth heads, 1, side, side)
    shades = enlarged(shades, tile).expand(-1, 3, -1, -1)
    whole = image[None].cpu().float()
    whole = torch.nn.functional.interpolate(whole, shades.shape[-2:], mode="bilinear", antialias=True)
    whole = whole.round().clamp(0, 255).to(torch.uint8).expand(depth, 3, -1, -1)
    rows = torch.cat(
        [whole[:, None], shades.unflatten(0, (depth, heads))], dim=1
    )  # (depth, 1 + heads, 3, h, w)
    return grid(rows.flatten(0, 1), 1 + heads)


def save_png(path: Path, picture: Float[Tensor, "3 h w"]) -> None:
    """A picture in [0, 1] as PNG."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy()).save(path, "PNG")
