"""Multi-head self-attention with timm's parameter names."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.attention.dispatch import AttentionName, attention_function
from selfsup.layers.rope import Rotation, rotate


class Attention(nn.Module):
    """Self-attention over tokens: fused `qkv`, heads, `proj` (Vaswani et al. 2017, sec. 3.2.2)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attention: AttentionName):
        super().__init__()
        self.num_heads = num_heads
        self.attention: AttentionName = attention
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def heads(
        self, x: Float[Tensor, "b n d"], rotation: Rotation | None = None
    ) -> tuple[Float[Tensor, "b h n c"], Float[Tensor, "b h n c"], Float[Tensor, "b h n c"]]:
        """Queries, keys and values; the first two turned by `rotation` (rotary positions)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h c) -> three b h n c", three=3, h=self.num_heads)
        return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)

    def forward(self, x: Float[Tensor, "b n d"], rotation: Rotation | None = None) -> Float[Tensor, "b n d"]:
        q, k, v = self.heads(x, rotation)
        x = attention_function(self.attention)(q, k, v)  # (b, h, n, c)
        return self.proj(rearrange(x, "b h n c -> b n (h c)"))
