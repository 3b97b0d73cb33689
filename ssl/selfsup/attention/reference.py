"""Scaled dot-product attention by hand: what models train with, and the text to read first.

softmax(q k^T * scale) v (Vaswani et al. 2017, eq. 1), in plain matrix products. On a CPU in bf16
this is also the fastest form for short rows; see the README's speed table.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Mask = Bool[Tensor, "... l s"] | Float[Tensor, "... l s"]


def reference_attention(
    q: Float[Tensor, "*b h l d"],
    k: Float[Tensor, "*b hk s d"],
    v: Float[Tensor, "*b hk s dv"],
    attn_mask: Mask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*b h l dv"]:
    """Attention with the arguments and meaning of torch's scaled_dot_product_attention.

    attn_mask: bool, True = may attend, or float added to the scores; broadcast to (*b, h, l, s).
    is_causal: query i sees keys 0..i (aligned at the top left where l != s).
    scale: default d ** -0.5. enable_gqa: query head i uses key head i // (h / hk).
    A row that may attend nowhere gives zeros, in value and gradient.
    Raises ValueError for attn_mask together with is_causal and for head counts that do not fit.
    """
    weights = attention_weights(q, k, attn_mask, is_causal, scale, enable_gqa)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, train=True)
    return weights @ repeat_heads(v, q.shape[-3], enable_gqa)


def attention_weights(
    q: Float[Tensor, "*b h l d"],
    k: Float[Tensor, "*b hk s d"],
    attn_mask: Mask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*b h l s"]:
    """The attention weights; each row sums to one, or to zero where it may attend nowhere."""
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal: give one of them; write the causal part into attn_mask")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k = repeat_heads(k, q.shape[-3], enable_gqa)
    scores = (q * scale) @ k.transpose(-2, -1)  # (*b, h, l, s)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is None:
        return scores.softmax(dim=-1).to(q.dtype)
    if attn_mask.dtype == torch.bool:
        allowed = attn_mask
    else:
        scores = scores + attn_mask.to(scores.dtype)
        allowed = attn_mask != -torch.inf
    # Rows without a key get finite scores before the softmax and zero weights after it: no NaN
    # arises in either direction, so none has to be cleaned up.
    scores = scores.masked_fill(~allowed, -torch.inf)
    scores = scores.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
    return scores.softmax(dim=-1).masked_fill(~allowed, 0.0).to(q.dtype)


def repeat_heads(
    x: Float[Tensor, "*b hk s d"], num_heads: int, enable_gqa: bool
) -> Float[Tensor, "*b h s d"]:
    """Repeats each key or value head for its group of query heads (grouped-query attention).

    Raises ValueError where the head counts differ without `enable_gqa`, or do not divide.
    """
    if x.shape[-3] == num_heads:
        return x
    if not enable_gqa or num_heads % x.shape[-3]:
        raise ValueError(
            f"attention heads: {num_heads} query heads with {x.shape[-3]} key or value heads need "
            f"enable_gqa=True and a whole ratio, got enable_gqa={enable_gqa}"
        )
    return x.repeat_interleave(num_heads // x.shape[-3], dim=-3)
