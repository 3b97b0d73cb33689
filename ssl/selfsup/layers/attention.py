"""Multi-head self-attention with timm's parameter names."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfsup.attention.dispatch import AttentionName, attention_function
from selfsup.layers.rope import Rotation, rotate


class Scope(NamedTuple):
    """What a token may see beyond the rules of its layer, the same for every layer."""

    document_ids: Int[Tensor, "b n"] | None = None
    """int64: a token sees the tokens of its own number only."""
    alibi_slopes: Float[Tensor, " h"] | None = None
    """What a step of distance takes off a head's scores (Press et al. 2022)."""


class LayerCache:
    """Keys and values of the tokens a layer has seen, for generation token by token."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    def extend(
        self, k: Float[Tensor, "b h n c"], v: Float[Tensor, "b h n c"]
    ) -> tuple[Float[Tensor, "b h s c"], Float[Tensor, "b h s c"]]:
        """Takes in new tokens' keys and values; returns those of all tokens so far."""
        if self.keys is not None and self.values is not None:
            k, v = torch.cat([self.keys, k], dim=-2), torch.cat([self.values, v], dim=-2)
        self.keys, self.values = k, v
        return k, v


class Attention(nn.Module):
    """Self-attention over tokens: fused `qkv`, heads, `proj` (Vaswani et al. 2017, sec. 3.2.2).

    With fewer key and value heads than heads it is grouped-query attention (Ainslie et al. 2023).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        qkv_bias: bool,
        bias: bool,
        causal: bool,
        dropout: float,
        attention: AttentionName,
    ):
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.causal, self.dropout = causal, dropout
        self.attention: AttentionName = attention
        head_dim = dim // num_heads
        self.widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self.qkv = nn.Linear(dim, sum(self.widths), bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def heads(
        self, x: Float[Tensor, "b n d"], rotation: Rotation | None = None
    ) -> tuple[Float[Tensor, "b h n c"], Float[Tensor, "b hk n c"], Float[Tensor, "b hk n c"]]:
        """Queries, keys and values; the first two turned by `rotation` (rotary positions)."""
        q, k, v = self.qkv(x).split(self.widths, dim=-1)  # (b, n, h * c), twice (b, n, hk * c)
        q = rearrange(q, "b n (h c) -> b h n c", h=self.num_heads)
        k, v = (rearrange(t, "b n (h c) -> b h n c", h=self.num_kv_heads) for t in (k, v))
        return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        rotation: Rotation | None = None,
        scope: Scope = Scope(),
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b n d"]:
        q, k, v = self.heads(x, rotation)
        if cache is not None:
            k, v = cache.extend(k, v)
        x = attention_function(self.attention)(
            q,
            k,
            v,
            None,
            self.dropout if self.training else 0.0,
            self.causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
            causal_align="bottom_right",  # the last query is the last token, however many are cached
            alibi_slopes=scope.alibi_slopes,
            document_ids=scope.document_ids,
        )  # (b, h, n, c)
        return self.proj(rearrange(x, "b h n c -> b n (h c)"))
