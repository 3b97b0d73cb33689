"""Attention by tiles: online softmax, a backward pass by recomputation, O(L) memory, in plain PyTorch.

Forward: Milakov & Gimelshein 2018 (online softmax), Rabe & Staats 2021 (over key blocks). Backward: Dao et
al. 2022, algorithm 4. On a CPU this buys memory, not time: see docs/attention.md for when it is worth it.

Both passes are operators of torch.library, so that torch.compile sees one call and not a loop unrolled.
"""

from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from jaxtyping import Float
from torch import Tensor

from selfsup.attention.rules import CausalAlign, DocumentIds, Mask, Rules, cut, read_rules, refuse

MAX_TILE = 256
"""Rows and columns of a tile, at most."""
TILE_ELEMENTS = 1 << 22
"""Scores of a tile over all batch entries and heads, where tiles of 64 rows allow it: 16 MiB in fp32."""


def tiled_attention(
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
    """`reference_attention` without the (l, s) matrix; the same arguments and meaning.

    Refuses dropout, and slopes that want a gradient. Its gradients have no gradient of their own.
    """
    refuse("tiled", "reference or torch", dropout_p=dropout_p)
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError(
            "alibi_slopes: the attention kernel 'tiled' has no gradient for them; detach them, or take reference"
        )
    if not torch.compiler.is_compiling() and any(fwAD.unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise NotImplementedError("attention kernel 'tiled': no forward-mode derivative; take reference")
    rules = read_rules(
        q, k, v, attn_mask, is_causal, causal_align, window, softcap, alibi_slopes, document_ids, enable_gqa
    )
    if torch.is_autocast_enabled(q.device.type):  # as torch's own: matrix products in the autocast type
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch = q.shape[:-3]
    q, k, v = (x.reshape(batch.numel(), *x.shape[-3:]) for x in (q, k, v))  # (b, h, l, d)
    out, lse = _forward(q, k, v, *_flat(rules, batch), scale)
    out, lse = out.reshape(*batch, *out.shape[1:]), lse.reshape(*batch, *lse.shape[1:])
    return (out, lse) if return_lse else out


def _flat(rules: Rules, batch: torch.Size) -> Rules:
    """The same rules with one batch dimension: tensors of (b or 1, ...)."""

    def flat(x: Tensor | None, own: int) -> Tensor | None:
        """x with its last `own` dimensions kept and the ones before, expanded to the batch where it has any."""
        if x is None or x.dim() <= own:
            return x
        return x.expand(*batch, *x.shape[-own:]).reshape(batch.numel(), *x.shape[-own:])

    return rules._replace(
        attn_mask=flat(rules.attn_mask, 3),
        alibi_slopes=flat(rules.alibi_slopes, 1),
        document_ids=flat(rules.document_ids, 1),
    )


@torch.library.custom_op("selfsup::tiled_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    document_ids: Tensor | None,
    left: int | None,
    right: int | None,
    offset: int,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(b, h, l, dv) in q's dtype and the log of the denominators (b, h, l) in fp32, or fp64 for fp64."""
    rules = Rules(attn_mask, alibi_slopes, document_ids, left, right, offset, softcap)
    (b, heads, length, _), keys, wide = q.shape, k.shape[-2], _wide(q)
    out, lse = q.new_empty(b, heads, length, v.shape[-1]), q.new_empty(b, heads, length, dtype=wide)
    side = tile_side(b * heads)
    for rows in _tiles(length, side):
        top = q.new_full((b, heads, rows.stop - rows.start, 1), -torch.inf, dtype=wide)
        total, acc = torch.zeros_like(top), q.new_zeros((*top.shape[:-1], v.shape[-1]), dtype=wide)
        for cols in _tiles(keys, side):
            if rules.skips(rows, cols):
                continue
            scores, _ = _scores(q, k, rules, scale, rows, cols)
            new_top = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
            shift = new_top.masked_fill(new_top == -torch.inf, 0.0)  # a row without a key so far
            weights = scores.sub_(shift).exp_()
            rescale = (top - shift).exp()
            total = total * rescale + weights.sum(dim=-1, keepdim=True)
            acc = acc * rescale + _per_group(weights.to(v.dtype), v[:, :, cols])
            top = new_top
        out[:, :, rows] = (acc / total.masked_fill(total == 0, 1.0)).to(q.dtype)
        lse[:, :, rows] = (top + total.log()).squeeze(-1)  # a row without a key: -inf
    return out, lse


@torch.library.custom_op("selfsup::tiled_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    document_ids: Tensor | None,
    left: int | None,
    right: int | None,
    offset: int,
    softcap: float | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, and of a float mask (empty where not asked for)."""
    rules, wide = Rules(attn_mask, alibi_slopes, document_ids, left, right, offset, softcap), _wide(q)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
    dmask = torch.zeros(attn_mask.shape if mask_grad else (0,), dtype=wide, device=q.device)
    # d(out)/d(score) needs the row's mean of dP; a gradient of the log-sum-exp adds to every score alike.
    delta = (grad_out.to(wide) * out).sum(dim=-1) - grad_lse  # (b, h, l)
    finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)  # a row without a key: exp(-inf - 0) = 0
    side = tile_side(q.shape[0] * q.shape[1])
    for rows in _tiles(q.shape[-2], side):
        grad_rows = grad_out[:, :, rows]
        for cols in _tiles(k.shape[-2], side):
            if rules.skips(rows, cols):
                continue
            scores, tanh = _scores(q, k, rules, scale, rows, cols)
            weights = scores.sub_(finite_lse[:, :, rows, None]).exp_()
            dv[:, :, cols] += _over_group(weights.to(q.dtype), grad_rows, k.shape[1])
            dweights = _per_group(grad_rows, v[:, :, cols].transpose(-2, -1)).to(wide)
            dscores = weights * (dweights - delta[:, :, rows, None])
            if mask_grad:
                tile = cut(dmask, rows, cols)
                tile += dscores.sum_to_size(_as_4d(tile).shape).view_as(tile)
            if tanh is not None:
                dscores *= 1 - tanh.square()
            dscores = (dscores * scale).to(q.dtype)
            dq[:, :, rows] += _per_group(dscores, k[:, :, cols])
            dk[:, :, cols] += _over_group(dscores, q[:, :, rows], k.shape[1])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dmask


def _scores(
    q: Tensor, k: Tensor, rules: Rules, scale: float, rows: slice, cols: slice
) -> tuple[Tensor, Tensor | None]:
    """A tile's scores (b, h, rows, cols), -inf where a query may not see a key; and tanh of a soft cap."""
    scores = _per_group(q[:, :, rows] * scale, k[:, :, cols].transpose(-2, -1)).to(_wide(q))
    tanh = None
    if rules.softcap is not None:
        tanh = torch.tanh(scores / rules.softcap)
        scores = rules.softcap * tanh
    bias, allowed = rules.bias(rows, cols, q.device), rules.allowed(rows, cols, q.device)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores, tanh


def _per_group(x: Tensor, y: Tensor) -> Tensor:
    """x @ y for x (b, h, m, n), y (b, hk, n, e): each head of a group with the group's one y."""
    b, heads, m, n = x.shape
    product = x.reshape(b, y.shape[1], heads // y.shape[1] * m, n) @ y  # the group's heads as more rows
    return product.view(b, heads, m, y.shape[-1])


def _over_group(x: Tensor, y: Tensor, groups: int) -> Tensor:
    """Sum over a group's heads of x^T y, for x (b, h, m, n), y (b, h, m, e): (b, hk, n, e)."""
    rows = x.shape[1] // groups * x.shape[2]
    x, y = (t.reshape(t.shape[0], groups, rows, t.shape[-1]) for t in (x, y))  # (b, hk, heads * m, .)
    return x.transpose(-2, -1) @ y


def _wide(x: Tensor) -> torch.dtype:
    """What sums are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


def _as_4d(x: Tensor) -> Tensor:
    return x.view(*(1,) * (4 - x.dim()), *x.shape)


def tile_side(batch_heads: int) -> int:
    """Rows and columns of a tile: a power of two from 64 to MAX_TILE, by TILE_ELEMENTS."""
    side = MAX_TILE
    while side > 64 and side * side * batch_heads > TILE_ELEMENTS:
        side //= 2
    return side


def _tiles(length: int, side: int) -> list[slice]:
    """Tiles of at most `side`, of one size but for the last: 257 are 129 and 128, not 256 and 1."""
    step = -(-length // -(-length // side)) if length else side
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_wide(q))


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    shape = attn_mask.shape if rest[-1] else (0,)
    mask = torch.empty(shape, dtype=_wide(q), device=q.device)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), mask


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.numbers = inputs[6:]


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    mask_grad = ctx.needs_input_grad[3]
    *grads, dmask = _backward(*inputs, *ctx.numbers, out, lse, grad_out, grad_lse, mask_grad)
    return *grads, dmask.to(inputs[3].dtype) if mask_grad else None, *(None,) * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)
