"""Cross-entropy of a linear layer's outputs that never holds all of them."""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_A_TIME = 1 << 22
"""Logits held at once where no number of rows is asked for: 16 MiB in float32, about what caches hold."""


@torch.compiler.disable  # traced, the loop is unrolled, and compiled again for every number of rows
def linear_cross_entropy(
    hidden: Float[Tensor, "t d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    labels: Int[Tensor, " t"],
    chunk: int | None = None,
    z_loss: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum over rows of cross_entropy(hidden @ weight^T + bias, labels) + z_loss * logsumexp^2.

    Returns that sum, and the sum of the cross-entropies alone without gradient, in nats, both in float32
    at least. labels: int64, each in [0, v). chunk: rows whose logits are held at a time; none: as many as
    LOGITS_AT_A_TIME allows. The gradient is worked out with the logits at hand, in the forward pass: no logits
    are kept, none computed twice. Matrix products in the autocast type, softmax in float32 at least.
    z_loss: PaLM's (Chowdhery et al. 2022, sec. 5), which keeps the denominator near one.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if len(hidden) == 0:
        # Of every tensor, so that each gets a gradient of zeros: DDP waits for those that get none.
        nothing = sum(x[:0].sum().to(wide) for x in (hidden, weight, bias) if x is not None)
        return nothing, nothing.detach()
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows = max(1, LOGITS_AT_A_TIME // len(weight)) if chunk is None else chunk
    arguments = (hidden, weight, bias, labels, rows, z_loss, dtype, torch.is_grad_enabled())
    return cast(tuple[Tensor, Tensor], _LinearCrossEntropy.apply(*arguments))


class _LinearCrossEntropy(torch.autograd.Function):
    """With p = softmax(logits): d/dlogits = p * (1 + 2 z_loss * logsumexp) - onehot(label)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: int,
        z_loss: float,
        dtype: torch.dtype,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss, nll = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        w, h = weight.to(dtype), hidden.to(dtype)
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if grad:
            grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
            grads = (torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide), grad_bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                logits = (h[part] @ w.T).to(wide)  # (rows, v)
                if bias is not None:
                    logits += bias
                lse = logits.logsumexp(dim=-1)
                picked = logits.gather(1, labels[part, None]).squeeze(1)
                nll += (lse - picked).sum()
                loss += z_loss * lse.square().sum()
                if grad:
                    dlogits = logits.sub_(lse[:, None]).exp_()
                    if z_loss:
                        dlogits *= (1 + 2 * z_loss * lse)[:, None]
                    dlogits.scatter_add_(1, labels[part, None], -torch.ones_like(lse)[:, None])
                    _accumulate(grads, dlogits, h[part], w, part)
        ctx.save_for_backward(*grads)
        ctx.types = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(nll)
        return loss + nll, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        g = upstream[0]
        bias = None if bias is None else (bias * g).to(ctx.types[1])
        return (hidden * g).to(hidden.dtype), (weight * g).to(ctx.types[0]), bias, *(None,) * 5


def _accumulate(grads: tuple[Tensor | None, ...], dlogits: Tensor, h: Tensor, w: Tensor, part: slice) -> None:
    """Adds a chunk's share to the gradients of hidden, weight and bias."""
    dhidden, dweight, dbias = grads
    assert dhidden is not None and dweight is not None
    narrow = dlogits.to(h.dtype)
    dhidden[part] = narrow @ w
    dweight += narrow.T @ h
    if dbias is not None:
        dbias += dlogits.sum(dim=0)
