"""Kernels for tests of the suite: right ones, wrong ones, and some that end their process."""

import os
import time

import torch
import torch.nn.functional as F

from selfsup.attention.reference import reference_attention
from selfsup.conformance.claims import attention_kernel


def plain(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Undeclared, with SDPA's arguments, and right."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def only_square(q, k, v):
    """Undeclared, takes nothing but q, k, v, and lengths that are multiples of 16."""
    if q.shape[-2] % 16 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError("lengths must be multiples of 16")
    return F.scaled_dot_product_attention(q, k, v)


def half_only(q, k, v, is_causal=False):
    """As kernels for GPUs are: fp16 and bf16."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError("fp16 or bf16")
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def of_width_64(q, k, v, is_causal=False):
    """As kernels for GPUs are: one head dim. And its backward pass is wrong."""
    if q.shape[-1] != 64 or v.shape[-1] != 64 or q.shape[-2] != k.shape[-2]:
        raise ValueError("head dim 64 only")
    return _Gradient.apply(q, k, v, 2.0) if not is_causal else F.scaled_dot_product_attention(q, k, v, is_causal=True)


@attention_kernel("fp32", "backward", "causal", head_dims=(64,))
def of_width_64_declared(q, k, v, is_causal=False):
    return of_width_64(q, k, v, is_causal)


def bottom_right(q, k, v, is_causal=False):
    """is_causal at the bottom right by nature, as in flash-attention."""
    mask = None
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, mask)


@attention_kernel("fp32", "cross")
def ignores_what_it_does_not_know(q, k, v, **options):
    """Declares little, takes everything, and answers whatever it is asked."""
    return F.scaled_dot_product_attention(q, k, v)


@attention_kernel("fp32", "backward", "cross", "value_dim", head_dims=range(8, 65, 8))
def declared(q, k, v):
    """Declares what it is."""
    if q.shape[-1] % 8 or q.shape[-1] > 64 or v.shape[-1] % 8 or v.shape[-1] > 64:
        raise ValueError("head dims 8, 16, ... 64")
    return F.scaled_dot_product_attention(q, k, v)


@attention_kernel("fp32", "backward", "cross")
def claims_too_much(q, k, v):
    """Claims other numbers of keys, and refuses them."""
    if q.shape[-2] != k.shape[-2]:
        raise ValueError("as many keys as queries")
    return F.scaled_dot_product_attention(q, k, v)


def mean_of_v(q, k, v):
    """No attention at all."""
    return v.mean(2, keepdim=True).expand(*q.shape[:-1], v.shape[-1]) + 0 * q[..., :1]


def wrong_tail(q, k, v):
    """Right but for the last key where there are 33 or more."""
    if k.shape[-2] > 32:
        k, v = k[:, :, :-1], v[:, :, :-1]
    return F.scaled_dot_product_attention(q, k, v)


class _Gradient(torch.autograd.Function):
    """Right forward, and a gradient of q times `factor`."""

    @staticmethod
    def forward(ctx, q, k, v, factor):
        ctx.save_for_backward(q, k, v)
        ctx.factor = factor
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            dq, dk, dv = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad)
        return dq * ctx.factor, dk, dv, None


def zero_dq(q, k, v):
    return _Gradient.apply(q, k, v, 0.0)


def negated_dq(q, k, v):
    return _Gradient.apply(q, k, v, -1.0)


def doubled_dq(q, k, v):
    return _Gradient.apply(q, k, v, 2.0)


def aborts(q, k, v):
    """Dies in one case."""
    if (q.shape[-2], k.shape[-2]) == (1, 197):
        os.abort()
    return F.scaled_dot_product_attention(q, k, v)


def hangs(q, k, v):
    """Never comes back in one case."""
    if (q.shape[-2], k.shape[-2]) == (1, 197):
        time.sleep(3600)
    return F.scaled_dot_product_attention(q, k, v)


def exits(q, k, v):
    """Ends its process in one case, as if all were well."""
    if (q.shape[-2], k.shape[-2]) == (1, 197):
        os._exit(0)
    return F.scaled_dot_product_attention(q, k, v)


def calls_sys_exit(q, k, v):
    """Leaves politely in one case."""
    if (q.shape[-2], k.shape[-2]) == (1, 197):
        raise SystemExit(0)
    return F.scaled_dot_product_attention(q, k, v)


def dies_often(q, k, v):
    """Dies in two cases, one after the other."""
    if k.shape[-2] in (63, 64):
        os.abort()
    return F.scaled_dot_product_attention(q, k, v)


def no_dk(q, k, v):
    """Cut off from k."""
    return F.scaled_dot_product_attention(q, k.detach(), v)


def writes_to_the_mask(q, k, v, attn_mask=None):
    """A finite number for -inf, in the caller's own mask."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        with torch.no_grad():
            attn_mask.clamp_(min=-1e4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask)


def multiples_of_64(q, k, v, scale=None):
    """For lengths that are multiples of 64; the scale is forgotten in the backward pass."""
    if q.shape[-2] % 64 or k.shape[-2] % 64:
        raise ValueError("multiples of 64")
    right = F.scaled_dot_product_attention(q, k, v, scale=scale)
    wrong = F.scaled_dot_product_attention(q, k, v)
    return right.detach() + wrong - wrong.detach()


def returns_more(q, k, v, return_lse=False):
    """A tuple, whether the rest is asked for or not."""
    lse = (q @ k.mT * q.shape[-1] ** -0.5).float().logsumexp(-1) if k.shape[-2] else q.new_full(q.shape[:-1], -torch.inf)
    return F.scaled_dot_product_attention(q, k, v), lse.detach(), None


def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, is_causal=False, return_lse=False):
    """(tokens, heads, width), one segment after another."""
    assert cu_seqlens_q.dtype == torch.int32 and max_seqlen_q == cu_seqlens_q.diff().max()
    outs, logs = [], []
    ends = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:])
    for a, b, c, d in ends:
        one, keys, values = (x[i:j].transpose(0, 1) for x, i, j in ((q, a, b), (k, c, d), (v, c, d)))
        out, lse = reference_attention(one, keys, values, is_causal=is_causal, enable_gqa=True, return_lse=True)
        outs.append(out.transpose(0, 1))
        logs.append(lse)
    out = torch.cat(outs)
    return (out, torch.cat(logs, dim=-1)) if return_lse else out


def returns_a_string(q, k, v):
    return "attention"


def always_raises(q, k, v):
    raise RuntimeError("no kernel image is available")


def writes_to_q(q, k, v):
    q.detach().mul_(1.0000001)
    return F.scaled_dot_product_attention(q, k, v)


not_a_function = 3
