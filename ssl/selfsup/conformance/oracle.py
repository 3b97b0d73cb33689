"""What is right: a slow float64 loop, one query at a time, gradients written out by hand.

It shares no code with any kernel. Beside it `plain`: the same precision as the kernel under test, in
explicit operations, which says how large an error is to be expected.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfsup.conformance.inputs import Inputs


class Answer(NamedTuple):
    """Outputs and gradients; None where not asked for."""

    out: Tensor
    lse: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dmask: Tensor | None = None
    terms: dict[str, Tensor] = {}
    """For gradients that are small differences of large terms: the sum of the terms' sizes, by name."""
    by_logits: dict[str, Tensor] = {}
    """What one rounding of every logit and log-sum-exp would change, over the rounding's relative size."""


def _seen(options: dict[str, Any], b: int, i: int, length: int, keys: int) -> np.ndarray:
    """Which keys query i of batch entry b may see, from causality, window and documents."""
    j = np.arange(keys)
    p = i + (keys - length if options.get("causal_align") == "bottom_right" else 0)
    seen = np.ones(keys, dtype=bool)
    if options.get("is_causal"):
        seen &= j <= p
    left, right = options.get("window") or (-1, -1)
    if left >= 0:
        seen &= j >= p - left
    if right >= 0:
        seen &= j <= p + right
    if (ids := options.get("document_ids")) is not None:
        ids = ids.cpu().numpy()
        seen &= ids[b] == ids[b, i]
    return seen


def truth(inputs: Inputs, gradients: bool = True) -> Answer:
    """The right answer in float64, on the CPU."""
    q, k, v = (x.detach().cpu().double().numpy() for x in (inputs.q, inputs.k, inputs.v))
    options, (batch, heads, length, d), keys = inputs.options, q.shape, k.shape[2]
    group = heads // max(1, k.shape[1])
    scale = d**-0.5 if options.get("scale") is None else options["scale"]
    cap, slopes, mask = options.get("softcap"), options.get("alibi_slopes"), options.get("attn_mask")
    whole = (batch, heads, length, keys)
    mask = None if mask is None else mask.detach().cpu().expand(whole)
    is_bool = mask is not None and mask.dtype == torch.bool
    mask = None if mask is None else mask.numpy() if is_bool else mask.double().numpy()
    slopes = None if slopes is None else slopes.detach().cpu().double().expand(batch, heads).numpy()
    offset = keys - length if options.get("causal_align") == "bottom_right" else 0
    grad_out = inputs.grad_out.detach().cpu().double().numpy()
    grad_lse = None if inputs.grad_lse is None else inputs.grad_lse.detach().cpu().double().numpy()

    out, lse = np.zeros((batch, heads, length, v.shape[3])), np.full((batch, heads, length), -np.inf)
    dq, dk, dv, dmask = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(whole if gradients else 0)
    terms = [np.zeros_like(x) for x in (dq, dk, dmask)]
    by_logits = [np.zeros_like(x) for x in (out, dq, dk, dv, dmask)]
    for b in range(batch):
        for h in range(heads):
            hk = h // group
            for i in range(length):
                seen = _seen(options, b, i, length, keys)
                raw = scale * (k[b, hk] @ q[b, h, i])
                sizes = abs(scale) * (np.abs(k[b, hk]) @ np.abs(q[b, h, i]))  # of what a score is a sum of
                score = raw if cap is None else cap * np.tanh(raw / cap)
                if slopes is not None:
                    score = score - slopes[b, h] * np.abs(i + offset - np.arange(keys))
                if mask is not None:
                    seen &= mask[b, h, i] if is_bool else ~np.isneginf(mask[b, h, i])
                    score = score if is_bool else score + mask[b, h, i]
                if not seen.any():
                    continue
                score = np.where(seen, score, -np.inf)
                top = score.max()
                weight = np.exp(score - top)
                lse[b, h, i] = top + np.log(weight.sum())
                weight /= weight.sum()
                out[b, h, i] = weight @ np.where(seen[:, None], v[b, hk], 0.0)
                logits = np.where(seen, sizes + np.abs(score), 0.0) + abs(lse[b, h, i])
                by_logits[0][b, h, i] = (weight * logits) @ np.where(seen[:, None], np.abs(v[b, hk]), 0.0)
                if not gradients:
                    continue
                go = grad_out[b, h, i]
                by_logits[3][b, hk] += np.outer(weight * logits, np.abs(go))
                dv[b, hk] += np.outer(weight, go)
                dweight = np.where(seen, v[b, hk] @ go, 0.0)
                dscore = weight * (dweight - weight @ dweight)
                size = weight * (np.abs(dweight) + np.abs(go) @ np.abs(out[b, h, i]))
                if grad_lse is not None:
                    dscore = dscore + weight * grad_lse[b, h, i]
                    size = size + weight * np.abs(grad_lse[b, h, i])
                dmask[b, h, i], terms[2][b, h, i], by_logits[4][b, h, i] = dscore, size, size * logits
                if cap is not None:
                    dscore, size = (x * (1 - np.tanh(raw / cap) ** 2) for x in (dscore, size))
                dq[b, h, i] = scale * (dscore @ k[b, hk])
                dk[b, hk] += scale * np.outer(dscore, q[b, h, i])
                terms[0][b, h, i] = abs(scale) * (size @ np.abs(k[b, hk]))
                terms[1][b, hk] += abs(scale) * np.outer(size, np.abs(q[b, h, i]))
                by_logits[1][b, h, i] = abs(scale) * ((size * logits) @ np.abs(k[b, hk]))
                by_logits[2][b, hk] += abs(scale) * np.outer(size * logits, np.abs(q[b, h, i]))
    wanted = [torch.from_numpy(x) for x in (dq, dk, dv)] if gradients else [None] * 3
    attn_mask = options.get("attn_mask")
    if gradients and attn_mask is not None and attn_mask.requires_grad:
        sums = [torch.from_numpy(x).sum_to_size(attn_mask.shape) for x in (dmask, terms[2], by_logits[4])]
        wanted.append(sums[0])
        terms[2], by_logits[4] = (x.numpy() for x in sums[1:])
    else:
        wanted.append(None)
    logs = torch.from_numpy(lse) if options.get("return_lse") else None
    by_terms = {name: torch.from_numpy(x) for name, x in zip(("dq", "dk", "dmask"), terms)}
    changes = {name: torch.from_numpy(x) for name, x in zip(("out", "dq", "dk", "dv", "dmask"), by_logits)}
    return Answer(torch.from_numpy(out), logs, *wanted, by_terms, changes)


def visible(inputs: Inputs) -> Tensor:
    """Bool (b, h, l, s): which query may see which key; in explicit operations, for `plain` and for zeros."""
    options, (batch, heads, length, _), keys = inputs.options, inputs.q.shape, inputs.k.shape[2]
    seen = np.zeros((batch, 1, length, keys), dtype=bool)
    for b in range(batch):
        for i in range(length):
            seen[b, 0, i] = _seen(options, b, i, length, keys)
    allowed = torch.from_numpy(seen).expand(batch, heads, length, keys)
    mask = options.get("attn_mask")
    if mask is not None:
        mask = mask.detach().cpu()
        allowed = allowed & (mask if mask.dtype == torch.bool else ~torch.isneginf(mask))
    return allowed


def plain(inputs: Inputs, gradients: bool = True) -> Answer:
    """The same attention in the inputs' own dtype: one matrix product, softmax, one matrix product."""
    leaves = [x.detach().clone().requires_grad_(gradients) for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = leaves
    options, heads = inputs.options, q.shape[1]
    if k.shape[1] != heads:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
    score = (q * scale) @ k.mT
    if (cap := options.get("softcap")) is not None:
        score = cap * torch.tanh(score / cap)
    if (slopes := options.get("alibi_slopes")) is not None:
        length, keys = score.shape[-2:]
        offset = keys - length if options.get("causal_align") == "bottom_right" else 0
        far = (torch.arange(length)[:, None] + offset - torch.arange(keys)).abs().to(score.device)
        score = score - slopes[..., None, None].to(score.dtype) * far
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.detach().clone().requires_grad_(mask.requires_grad and gradients)
        score = score + mask.to(score.dtype)
    seen = visible(inputs).to(score.device)
    empty = ~seen.any(dim=-1, keepdim=True)
    score = score.masked_fill(~seen, -torch.inf).masked_fill(empty, 0.0)
    out = score.softmax(dim=-1).masked_fill(~seen, 0.0) @ v
    outputs, grads = [out], [inputs.grad_out]
    lse = None
    if options.get("return_lse"):
        wide = score.to(torch.promote_types(score.dtype, torch.float32))
        lse = wide.logsumexp(dim=-1).masked_fill(empty.squeeze(-1), -torch.inf)
        outputs, grads = [out, lse], [inputs.grad_out, inputs.grad_lse]
    wanted: list[Tensor | None] = [None, None, None]
    if gradients:
        if mask is not None and mask.requires_grad:
            leaves = [*leaves, mask]
        wanted = list(torch.autograd.grad(outputs, leaves, grads))
    return Answer(out.detach(), None if lse is None else lse.detach(), *wanted)
