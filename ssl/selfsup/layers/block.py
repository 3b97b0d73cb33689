"""The transformer block and its parts, with timm's parameter names: one for images and text."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfsup.attention.dispatch import AttentionName
from selfsup.layers.attention import Attention, LayerCache, Scope
from selfsup.layers.rope import Rotation

LAYER_NORM_EPS = 1e-6  # timm's and MAE's; Hugging Face's ViT must be told so

ActivationName = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu", "geglu"]
GATED: frozenset[ActivationName] = frozenset({"swiglu", "geglu"})
"""Activations that take twice the channels that they give."""
NormName = Literal["layer", "rms"]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that CLIP was trained with (Hendrycks & Gimpel 2016)."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return x * torch.sigmoid(1.702 * x)


class GatedUnit(nn.Module):
    """act(gate) * value of the two halves of the channels, gate first (Shazeer 2020)."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def forward(self, x: Float[Tensor, "*b d2"]) -> Float[Tensor, "*b d"]:
        gate, value = x.chunk(2, dim=-1)
        return self.act(gate) * value


def activation_module(name: ActivationName) -> nn.Module:
    """gelu: the exact (erf) one; gelu_tanh: BERT's and GPT-2's own approximation; geglu: gates by the exact."""
    match name:
        case "gelu":
            return nn.GELU()
        case "gelu_tanh":
            return nn.GELU(approximate="tanh")
        case "quick_gelu":
            return QuickGELU()
        case "swiglu":
            return GatedUnit(nn.SiLU())
        case "geglu":
            return GatedUnit(nn.GELU())


def norm_module(name: NormName, dim: int, eps: float, bias: bool) -> nn.Module:
    """LayerNorm, or RMSNorm (Zhang & Sennrich 2019), which has no bias."""
    return nn.RMSNorm(dim, eps=eps) if name == "rms" else nn.LayerNorm(dim, eps=eps, bias=bias)


class Mlp(nn.Module):
    """Two linear layers with an activation between them; a gated one takes twice the channels of the first."""

    def __init__(self, dim: int, hidden_dim: int, activation: ActivationName, bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden_dim if activation in GATED else hidden_dim, bias=bias)
        self.act = activation_module(activation)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

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


class BlockOptions(NamedTuple):
    """What a block is made of."""

    dim: int
    num_heads: int
    hidden_dim: int
    """Of the MLP."""
    num_kv_heads: int | None = None
    """None: as many as num_heads."""
    qkv_bias: bool = True
    bias: bool = True
    """In the attention's output, the MLP and the norms."""
    norm: NormName = "layer"
    eps: float = LAYER_NORM_EPS
    post_norm: bool = False
    """Norms behind the residual sums, as in the first transformer and BERT, not before the branches."""
    activation: ActivationName = "gelu"
    layer_scale: float | None = None
    drop_path: float = 0.0
    dropout: float = 0.0
    """Of attention weights and of each branch's output."""
    causal: bool = False
    attention: AttentionName = "reference"


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with post_norm norm(x + attention(x)), norm(x + mlp(x))."""

    def __init__(self, options: BlockOptions):
        super().__init__()
        o = options
        self.norm1 = norm_module(o.norm, o.dim, o.eps, o.bias)
        self.attn = Attention(
            o.dim,
            o.num_heads,
            o.num_heads if o.num_kv_heads is None else o.num_kv_heads,
            o.qkv_bias,
            o.bias,
            o.causal,
            o.dropout,
            o.attention,
        )
        self.ls1 = nn.Identity() if o.layer_scale is None else LayerScale(o.dim, o.layer_scale)
        self.norm2 = norm_module(o.norm, o.dim, o.eps, o.bias)
        self.mlp = Mlp(o.dim, o.hidden_dim, o.activation, o.bias)
        self.ls2 = nn.Identity() if o.layer_scale is None else LayerScale(o.dim, o.layer_scale)
        self.drop_path = DropPath(o.drop_path)
        self.dropout = nn.Dropout(o.dropout)
        self.post_norm = o.post_norm
        self.checkpoint = False
        """Keep only the input for the backward pass and compute the rest again there (Chen et al. 2016), with
        the same random numbers: the same gradients, less memory, one more forward pass."""

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rotation: Rotation | None = None,
        scope: Scope = Scope(),
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b n d"]:
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(
                self.residuals, x, rotation, scope, cache, use_reentrant=False, preserve_rng_state=True
            )
        return self.residuals(x, rotation, scope, cache)

    def residuals(
        self, x: Float[Tensor, "b n d"], rotation: Rotation | None, scope: Scope, cache: LayerCache | None
    ) -> Float[Tensor, "b n d"]:
        """The block itself, without checkpointing."""
        if self.post_norm:
            x = self.norm1(x + self.branch(self.ls1(self.attn(x, rotation, scope, cache))))
            return self.norm2(x + self.branch(self.ls2(self.mlp(x))))
        x = x + self.branch(self.ls1(self.attn(self.norm1(x), rotation, scope, cache)))
        return x + self.branch(self.ls2(self.mlp(self.norm2(x))))

    def branch(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """A residual branch's output, with what is dropped of it in training."""
        return self.drop_path(self.dropout(x))
