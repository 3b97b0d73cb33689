"""AdamW, its weight-decay groups, and the learning rate of a global batch."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from selfsup.config import Section
from selfsup.schedule import warmup_cosine


class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay (defaults: He et al. 2022, table 8)."""

    name: Literal["adamw"] = "adamw"
    steps: Annotated[int, Field(ge=1)] = 1000
    """Optimizer steps of the whole run."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Samples per optimizer step, over all processes and micro-batches."""
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    """Peak learning rate per 256 samples of the global batch."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the cosine."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps spent warming up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled decay of weights with two or more dimensions; none for biases and norms."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's averaging factors."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the whole gradient; none: no clipping."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.min_lr > self.peak_lr:
            raise ValueError(f"min_lr: expected at most the peak {self.peak_lr:g}, got {self.min_lr:g}")
        return self

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up: linear in the global batch (Goyal et al. 2017)."""
        return self.base_lr * self.batch_size / 256

    def lr(self, step: int) -> float:
        """Learning rate of step 0 .. steps - 1."""
        return warmup_cosine(step, self.steps, self.peak_lr, self.warmup_fraction, self.min_lr)


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two named groups: decayed, and (1-D or bias) not decayed.

    As in facebookresearch/mae: class and mask tokens have three dimensions and are decayed.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [(name, p) for name, p in trainable if p.ndim > 1 and not name.endswith(".bias")]
    names = {name for name, _ in decayed}
    rest = [(name, p) for name, p in trainable if name not in names]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.AdamW:
    """AdamW over the module's parameters, fused where there is a fused kernel (CPU and CUDA)."""
    device = next(module.parameters()).device
    return torch.optim.AdamW(
        param_groups(module, config.weight_decay),
        lr=config.peak_lr,
        betas=config.betas,
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )
