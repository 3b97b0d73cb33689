"""The pre-norm transformer block and its parts, with timm's parameter names."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfsup.attention.dispatch import AttentionName
from selfsup.layers.attention import Attention
from selfsup.layers.rope import Rotation

LAYER_NORM_EPS = 1e-6  # timm's and MAE's; Hugging Face's ViT must be told so

ActivationName = Literal["gelu", "quick_gelu"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that CLIP was trained with (Hendrycks & Gimpel 2016)."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU, or CLIP's quick one, between them."""

    def __init__(self, dim: int, hidden_dim: int, activation: ActivationName):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU() if activation == "gelu" else QuickGELU()
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
        # Not in x's dtype: bfloat16 has 256 random numbers in [0, 1), which rounds a drop of 0.009 to 0.0078.
        return x * (torch.rand(len(x), 1, 1, device=x.device) < keep) / keep


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return x * self.gamma


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
        activation: ActivationName = "gelu",
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias, attention)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)
        self.checkpoint = False
        """Keep only the input for the backward pass and compute the rest again there (Chen et al. 2016), with
        the same random numbers: the same gradients, less memory, one more forward pass."""

    def forward(self, x: Float[Tensor, "b n d"], rotation: Rotation | None = None) -> Float[Tensor, "b n d"]:
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(self.residuals, x, rotation, use_reentrant=False, preserve_rng_state=True)
        return self.residuals(x, rotation)

    def residuals(self, x: Float[Tensor, "b n d"], rotation: Rotation | None) -> Float[Tensor, "b n d"]:
        """The block itself, without checkpointing."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rotation)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
