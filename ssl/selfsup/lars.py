"""LARS: stochastic gradient descent whose step is, for each weight, a fixed share of the weight's norm."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from selfsup import dist
from selfsup.sharding import local


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), as SimCLR, BYOL and MoCo-v3 train with it.

    For each parameter w with gradient g:

        g' = g + weight_decay * w
        v  = momentum * v + trust_coefficient * |w| / |g'| * g'      (v = 0 before the first step)
        w  = w - lr * v

    The ratio is 1 where |w| or |g'| is 0. Norms are over the whole tensor, in float32 or wider. The
    learning rate stands outside the momentum, as in BYOL and MoCo-v3; SimCLR's TensorFlow code takes it
    in, v = momentum * v + lr * ratio * g', w = w - v, the same while the rate is constant.

    A group with `adapt: False` (biases, norms, other 1-D tensors) is plain momentum: ratio 1, no decay,
    whatever its weight_decay says.

    Weights may be split over processes (run.parallel fsdp2); their norms are those of the whole tensors.

    Why our own: timm's and lightly's take |g| + weight_decay * |w| for |g'|, and skip the ratio where
    weight_decay is 0 (timm: unless always_adapt). There, at the learning rates that LARS is given, a
    first step is thousands of times too long. Here a weight is adapted whatever its decay.

    params: parameters, named parameters, or groups of either; one device. State: `momentum_buffer` only.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for w in weights:
            if "momentum_buffer" not in self.state[w]:
                self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        split = isinstance(weights[0], DTensor)
        updates: Sequence[Tensor] = [local(w.grad) for w in weights if w.grad is not None]
        buffers = [local(self.state[w]["momentum_buffer"]) for w in weights]
        weights = [local(w) for w in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        if group["adapt"]:
            if group["weight_decay"]:
                updates = torch._foreach_add(updates, weights, alpha=group["weight_decay"])
            ratios = trust_ratios(weights, updates, group["trust_coefficient"], split)
            torch._foreach_addcmul_(buffers, updates, ratios)  # ratios stay on the device: no waiting for it
        else:
            torch._foreach_add_(buffers, updates)
        torch._foreach_add_(weights, buffers, alpha=-group["lr"])


def trust_ratios(
    weights: Sequence[Tensor], updates: Sequence[Tensor], trust_coefficient: float, split: bool = False
) -> list[Tensor]:
    """trust_coefficient * |w| / |u| of each pair, scalars in float32 or wider; 1 where a norm is 0.

    split: the tensors are this process's parts, the norms those of all parts together (one collective).
    """
    wide = functools.reduce(torch.promote_types, (w.dtype for w in weights), torch.float32)
    norms = torch.stack([torch.stack(torch._foreach_norm(t, 2, dtype=wide)) for t in (weights, updates)])  # (2, n)
    w, u = dist.all_reduce(norms.square()).sqrt() if split else norms
    return list(torch.where((w > 0) & (u > 0), trust_coefficient * w / u, 1.0).unbind())
