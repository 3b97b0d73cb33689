"""PyTorch's own kernels behind the same arguments: alternatives to ours, and yardsticks for them."""

import functools
from collections.abc import Callable
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from selfsup.attention.rules import CausalAlign, DocumentIds, Mask, Rules, read_rules, refuse

WORTH_COMPILING = 1 << 20
"""Scores a head from which on a CPU flex_attention is compiled (6 to 15 s, once a shape); below, it is not."""


def torch_attention(
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
) -> Float[Tensor, "*b h l dv"]:
    """torch.nn.functional.scaled_dot_product_attention; arguments as in `reference_attention`.

    What it has no argument for (window, ALiBi, documents, causal at the bottom right) becomes a dense
    mask of (l, s). Refuses softcap and return_lse.
    """
    refuse("torch", "reference or tiled", softcap=softcap, return_lse=return_lse)
    rules = read_rules(
        q, k, v, attn_mask, is_causal, causal_align, window, softcap, alibi_slopes, document_ids, enable_gqa
    )
    extras = window is not None or alibi_slopes is not None or document_ids is not None
    if extras or (is_causal and rules.offset):
        is_causal, (bias, attn_mask) = False, rules.everything(q, k)
        if bias is not None:
            attn_mask = bias if attn_mask is None else bias.masked_fill(~attn_mask, -torch.inf)
    if attn_mask is not None:
        while attn_mask.dim() < 2:
            attn_mask = attn_mask.unsqueeze(0)
        if attn_mask.dtype not in (torch.bool, q.dtype):
            # A finite lowest number stays finite: a row of nothing else is a mean, not a row without a key.
            forbidden, attn_mask = attn_mask == -torch.inf, attn_mask.to(q.dtype)
            attn_mask = attn_mask.clamp(min=torch.finfo(q.dtype).min).masked_fill(forbidden, -torch.inf)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def flex_attention_adapter(
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
    """torch's flex_attention; arguments as in `reference_attention`. Compiled on CUDA, and for long rows on a CPU.

    Refuses dropout, other than (b, h, l, d) tensors, and on a CPU gradients, which it does not have there.
    """
    refuse("flex", "reference or torch", dropout_p=dropout_p)
    on_cpu = q.device.type == "cpu"
    tensors = [x for x in (q, k, v, attn_mask, alibi_slopes) if x is not None]
    if on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("attention kernel 'flex': torch has no backward pass for it on a CPU; take reference")
    if on_cpu:
        q, k, v = q.detach(), k.detach(), v.detach()  # flex looks at requires_grad, not at no_grad
    if q.dim() != 4:
        raise ValueError(f"attention kernel 'flex': expected q of (b, h, l, d), got {tuple(q.shape)}")
    rules = read_rules(
        q, k, v, attn_mask, is_causal, causal_align, window, softcap, alibi_slopes, document_ids, enable_gqa
    )
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention  # 0.6 s: here, not for all

    short = q.shape[-2] * k.shape[-2] < WORTH_COMPILING
    call = flex_attention if (on_cpu and short) or torch.compiler.is_compiling() else _compiled_flex()
    out = call(
        q, k, v,
        score_mod=_score_mod(rules, q, k),
        block_mask=_block_mask(rules, q, k),
        scale=scale, enable_gqa=enable_gqa,
        return_aux=AuxRequest(lse=True) if return_lse else None,
    )  # fmt: skip
    return (out[0], out[1].lse) if return_lse else out


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _score_mod(rules: Rules, q: Tensor, k: Tensor) -> Callable[..., Tensor] | None:
    """Soft cap and bias as flex_attention's function of one score."""
    softcap, slopes, offset, bias = rules.softcap, rules.alibi_slopes, rules.offset, rules.attn_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = None
    if softcap is None and slopes is None and bias is None:
        return None
    if softcap is not None:
        softcap = torch.tensor(softcap, device=q.device)  # a number that changes would be compiled as a symbol
    if slopes is not None:
        slopes = slopes.expand(q.shape[:2])
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[-2])

    @no_type_check  # flex_attention looks at the signature, and a type checker's wrapper has none
    def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[b, h] * (i + offset - j).abs()
        return score if bias is None else score + bias[b, h, i, j]

    return modify


def _block_mask(rules: Rules, q: Tensor, k: Tensor):
    """The band, bool masks and documents as flex_attention's block mask; None where all is allowed."""
    left, right, offset, ids, mask = rules.left, rules.right, rules.offset, rules.document_ids, None
    if rules.attn_mask is not None:
        mask = rules.attn_mask
        mask = (mask if mask.dtype == torch.bool else mask != -torch.inf).expand(*q.shape[:3], k.shape[-2])
    if left is None and right is None and ids is None and mask is None:
        return None

    @no_type_check
    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        keep = i >= 0  # a tensor of the right shape
        if right is not None:
            keep = keep & (j <= i + offset + right)
        if left is not None:
            keep = keep & (j >= i + offset - left)
        if ids is not None:
            keep = keep & (ids[b, i] == ids[b, j])
        return keep if mask is None else keep & mask[b, h, i, j]

    from torch.nn.attention.flex_attention import create_block_mask

    b, h = (q.shape[0], q.shape[1]) if mask is not None else (q.shape[0] if ids is not None else None, None)
    return create_block_mask(allowed, b, h, q.shape[-2], k.shape[-2], device=q.device)
