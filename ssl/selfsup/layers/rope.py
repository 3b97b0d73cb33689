"""Rotary positions on a grid of patches (Su et al. 2021, in two dimensions as DINOv3 has them)."""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


class Rotation(NamedTuple):
    """By how much each token's pairs of channels are turned. Broadcasts over heads, and over images
    where they all have the same tokens."""

    cos: Float[Tensor, "*b n c"]
    sin: Float[Tensor, "*b n c"]


def rotation_2d(head_dim: int, grid_size: int, base: float = 100.0) -> Rotation:
    """Angles of a square grid's patches, float32 (grid_size**2, head_dim).

    A patch's centre is at (row, column) in [-1, 1]; angle = 2 pi * coordinate / base^(4 i / head_dim),
    first the row's quarter of the channels, then the column's, and both again for the second half.
    Raises ValueError where head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"rotary positions need a multiple of 4 channels a head, got {head_dim}")
    frequency = base ** -(torch.arange(0, head_dim, 4, dtype=torch.float64) / head_dim)  # (c/4,)
    centre = 2 * (torch.arange(grid_size, dtype=torch.float64) + 0.5) / grid_size - 1
    angle = 2 * math.pi * centre[:, None] * frequency  # (grid, c/4)
    row = angle[:, None, :].expand(-1, grid_size, -1)
    column = angle[None, :, :].expand(grid_size, -1, -1)
    angles = rearrange(torch.cat([row, column, row, column], dim=2), "h w c -> (h w) c")
    return Rotation(angles.cos().float(), angles.sin().float())


def rotate(x: Float[Tensor, "b h n c"], rotation: Rotation) -> Float[Tensor, "b h n c"]:
    """Turns channel pairs (i, i + c/2) of every token by the token's angles."""
    cos, sin = (part.to(x.dtype).unsqueeze(-3) for part in rotation)  # (*b, 1, n, c)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rotation_1d(head_dim: int, length: int, base: float = 10000.0) -> Rotation:
    """Angles of positions 0 .. length - 1, float32 (length, head_dim): position * base^(-2 i / head_dim)
    for channel pair (i, i + head_dim / 2) (Su et al. 2021, in the layout of transformers' Llama).

    Raises ValueError for an odd head_dim.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even number of channels a head, got {head_dim}")
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)  # (c/2,)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency  # (length, c/2)
    angles = torch.cat([angle, angle], dim=1)
    return Rotation(angles.cos().float(), angles.sin().float())


def alibi_slopes(num_heads: int) -> Float[Tensor, " h"]:
    """What a step of distance takes off each head's scores: 2^(-8 i / h) for i = 1 .. h where h is a power
    of two; else those of the next lower power, then every second one of the next higher (Press et al. 2022)."""
    lower = 1 << (num_heads.bit_length() - 1)

    def of(h: int) -> list[float]:
        return [2.0 ** (-8 * i / h) for i in range(1, h + 1)]

    return torch.tensor(of(lower) + of(2 * lower)[0::2][: num_heads - lower])
