"""Per-sample random masking by shuffling (He et al. 2022, sec. 3, "Simple implementation")."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor


class Masking(NamedTuple):
    """Which patches of each image stay."""

    ids_keep: Int[Tensor, "b k"]
    """int64: the visible patches, in shuffled order."""
    ids_restore: Int[Tensor, "b n"]
    """int64: place of each patch in the shuffled order, visible ones first."""
    mask: Float[Tensor, "b n"]
    """float32: 1 is removed, 0 is visible."""


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Patches that stay, rounded down as in facebookresearch/mae."""
    return int(num_patches * (1 - mask_ratio))


def random_masking(noise: Num[Tensor, "b n"], mask_ratio: float) -> Masking:
    """Keeps the patches with the least noise. Ties go to the lower patch, so bits decide, not the sort."""
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    visible = num_visible(noise.shape[1], mask_ratio)
    mask = (ids_restore >= visible).float()
    return Masking(ids_shuffle[:, :visible], ids_restore, mask)
