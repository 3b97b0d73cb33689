"""Scaled dot-product attention by hand: what models train with, and the text to read first.

softmax(q k^T * scale) v (Vaswani et al. 2017, eq. 1), in plain matrix products. On a CPU in bf16
this is also the fastest form for short rows; see docs/attention.md.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from selfsup.attention.rules import CausalAlign, DocumentIds, Mask, Rules, read_rules


def reference_attention(
    q: Float[Tensor, "*b h l d"],
    k: Float[Tensor, "*b hk s d"],
    v: Float[Tensor, "*b hk s dv"],
    attn_mask: Mask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_align: CausalAlign = "top_left",
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Float[Tensor, "..."] | None = None,
    document_ids: DocumentIds | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "*b h l dv"] | tuple[Float[Tensor, "*b h l dv"], Float[Tensor, "*b h l"]]:
    """Attention with the arguments and meaning of torch's scaled_dot_product_attention, and a few more.

    attn_mask: bool, True = may attend, or float added to the scores; broadcast to (*b, h, l, s).
    is_causal: query i sees keys 0..i, or with causal_align="bottom_right" keys 0..i + s - l.
    scale: default d ** -0.5. enable_gqa: query head i uses key head i // (h / hk).
    window: (left, right), both ends inclusive, -1 = no bound, counted from the query's position.
    softcap: scores become softcap * tanh(scores / softcap) before anything is added (Gemma 2, sec. 2).
    alibi_slopes: (h,) or (*b, h); slope * distance is taken off the scores (Press et al. 2022).
    document_ids: (*b, s); a query sees the keys of its own document.
    return_lse: also the natural log of the softmax's denominator, -inf for a row without a key.
    A row that may attend nowhere gives zeros, in value and gradient. Raises ValueError by name.
    """
    rules = read_rules(
        q, k, v, attn_mask, is_causal, causal_align, window, softcap, alibi_slopes, document_ids, enable_gqa
    )
    weights, lse = weights_and_lse(q, repeat_heads(k, q.shape[-3]), scale, rules, return_lse)
    if dropout_p != 0:
        weights = torch.dropout(weights, dropout_p, train=True)
    out = weights @ repeat_heads(v, q.shape[-3])
    return out if lse is None else (out, lse)


def weights_and_lse(
    q: Float[Tensor, "*b h l d"],
    k: Float[Tensor, "*b h s d"],
    scale: float | None,
    rules: Rules,
    return_lse: bool = False,
) -> tuple[Float[Tensor, "*b h l s"], Float[Tensor, "*b h l"] | None]:
    """The attention weights, and on request the log of each row's denominator."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)  # (*b, h, l, s)
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    wide = torch.promote_types(scores.dtype, torch.float32)
    if rules.is_plain and k.shape[-2] > 0:
        lse = scores.to(wide).logsumexp(dim=-1) if return_lse else None
        return scores.softmax(dim=-1).to(q.dtype), lse
    bias, allowed = rules.everything(q, k)
    if bias is not None:
        scores = scores + bias
    if rules.always_sees(q.shape[-2], k.shape[-2]) and k.shape[-2] > 0:
        scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
        lse = scores.to(wide).logsumexp(dim=-1) if return_lse else None
        return scores.softmax(dim=-1).to(q.dtype), lse
    if allowed is None:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    # Rows without a key get finite scores before the softmax and zero weights after it: no NaN
    # arises in either direction, so none has to be cleaned up.
    scores = scores.masked_fill(~allowed, -torch.inf)
    empty = ~allowed.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    weights = scores.softmax(dim=-1).masked_fill(~allowed, 0.0).to(q.dtype)
    if not return_lse:
        return weights, None
    lse = scores.to(wide).logsumexp(dim=-1) if scores.shape[-1] else scores[..., :0].to(wide).sum(dim=-1)
    return weights, lse.masked_fill(empty.squeeze(-1), -torch.inf)


def attention_weights(
    q: Float[Tensor, "*b h l d"],
    k: Float[Tensor, "*b hk s d"],
    attn_mask: Mask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_align: CausalAlign = "top_left",
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Float[Tensor, "..."] | None = None,
    document_ids: DocumentIds | None = None,
) -> Float[Tensor, "*b h l s"]:
    """The weights of `reference_attention`, for attention maps; a row sums to one, or to zero without a key."""
    rules = read_rules(
        q, k, k, attn_mask, is_causal, causal_align, window, softcap, alibi_slopes, document_ids, enable_gqa
    )
    return weights_and_lse(q, repeat_heads(k, q.shape[-3]), scale, rules)[0]


def repeat_heads(x: Float[Tensor, "*b hk s d"], num_heads: int) -> Float[Tensor, "*b h s d"]:
    """Repeats each key or value head for its group of query heads (grouped-query attention)."""
    return x if x.shape[-3] == num_heads else x.repeat_interleave(num_heads // x.shape[-3], dim=-3)
