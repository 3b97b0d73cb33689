"""The pre-norm transformer block and its parts, with timm's parameter names."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.attention.dispatch import AttentionName
from selfsup.layers.attention import Attention

LAYER_NORM_EPS = 1e-6  # timm's and MAE's; Hugging Face's ViT must be told so


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Drops a sample's residual branch with probability `drop`, rescales the rest (Huang et al. 2016)."""

    def __init__(self, drop: float):
        super().__init__()
        self.drop = drop

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if self.drop == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop
        return x * (torch.rand(len(x), 1, 1, device=x.device, dtype=x.dtype) < keep) / keep


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        attention: AttentionName,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias, attention)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
