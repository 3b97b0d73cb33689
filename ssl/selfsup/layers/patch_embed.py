"""Images to tokens, and fixed positions."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one convolution, rows first (timm's `patch_embed.proj`)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, bias: bool):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return rearrange(self.proj(images), "b d h w -> b (h w) d")


def sincos_2d(embed_dim: int, grid_size: int) -> Float[Tensor, "n d"]:
    """Fixed 2-D sine-cosine positions in facebookresearch/mae's layout (`util/pos_embed.py`).

    Row-major over the grid; the first half of the channels codes the column (w comes first), the
    second half the row; each half is [sin, cos] of position / 10000^(2i/(d/2)). MoCo-v3 and
    big_vision lay theirs out differently. Returns float32 (grid_size**2, embed_dim).
    Raises ValueError where embed_dim is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim: sine-cosine positions need a multiple of 4, got {embed_dim}")
    quarter = embed_dim // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega  # (grid, d/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, d/2)
    column = axis[None, :, :].expand(grid_size, -1, -1)
    row = axis[:, None, :].expand(-1, grid_size, -1)
    return rearrange(torch.cat([column, row], dim=2), "h w d -> (h w) d").float()
