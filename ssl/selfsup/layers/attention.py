"""Multi-head self-attention with timm's parameter names."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.attention.dispatch import AttentionName, attention_function


class Attention(nn.Module):
    """Self-attention over tokens: fused `qkv`, heads, `proj` (Vaswani et al. 2017, sec. 3.2.2)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attention: AttentionName):
        super().__init__()
        self.num_heads = num_heads
        self.attention: AttentionName = attention
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        x = attention_function(self.attention, x.device)(q, k, v)  # (b, h, n, d)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))
