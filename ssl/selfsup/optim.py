"""The optimizers, their weight-decay groups, the learning rate of a global batch, and when a run is lost."""

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from selfsup.config import Section
from selfsup.lars import Lars
from selfsup.mup import lr_scales
from selfsup.schedule import warmup_cosine, warmup_linear, warmup_stable_decay

RESCUE = "Lower optim.base_lr, set optim.clip_grad_norm, or use precision.mixed: bf16"
"""What to try where a loss or weights are no longer finite."""


class OptimConfig(Section):
    """What every optimizer has: a schedule with linear warm-up, an average of the weights."""

    moments: ClassVar[int]
    """Tensors of a weight's size that the optimizer keeps for it."""

    name: str
    steps: Annotated[int, Field(ge=1)] = 1000
    """Optimizer steps of the whole run."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Samples per optimizer step, over all processes and micro-batches."""
    base_lr: Annotated[float, Field(gt=0)]
    """Peak learning rate for a global batch of 256 samples."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the peak grows with the global batch B: base_lr * B/256, base_lr * sqrt(B/256), or not at all."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Learning rate after warm-up: half a cosine, a straight line, or wsd: constant, then 1 - sqrt."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the schedule."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps spent warming up."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the steps, at the end, in which wsd decays; the other schedules have no such phase."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Decay of weights with two or more dimensions; none for biases and norms."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the whole gradient; none: no clipping."""
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay per step of an average of the weights kept beside them for evaluation; none: no average.
    0.999 averages over about the last 1,000 steps."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.min_lr > self.peak_lr:
            raise ValueError(f"min_lr: expected at most the peak {self.peak_lr:g}, got {self.min_lr:g}")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1 + 1e-9:
            raise ValueError(
                f"decay_fraction: expected at most {1 - self.warmup_fraction:g}, what warmup_fraction leaves, "
                f"got {self.decay_fraction:g}"
            )
        if (
            self.schedule != "wsd"
            and self.decay_fraction != OptimConfig.model_fields["decay_fraction"].default
        ):
            raise ValueError(
                f"decay_fraction: schedule {self.schedule} has no such phase; set optim.schedule: wsd, or leave "
                f"it out"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up: linear in the global batch (Goyal et al. 2017), with its root
        (Krizhevsky 2014; SimCLR's 0.075 * sqrt(B) is a base_lr of 1.2), or base_lr as it stands."""
        match self.lr_scaling:
            case "linear":
                return self.base_lr * self.batch_size / 256
            case "sqrt":
                return self.base_lr * math.sqrt(self.batch_size / 256)
            case "none":
                return self.base_lr

    def lr(self, step: int) -> float:
        """Learning rate of step 0 .. steps - 1."""
        course = (step, self.steps, self.peak_lr, self.warmup_fraction, self.min_lr)
        match self.schedule:
            case "cosine":
                return warmup_cosine(*course)
            case "linear":
                return warmup_linear(*course)
            case "wsd":
                return warmup_stable_decay(*course, self.decay_fraction)


class AdamWConfig(OptimConfig):
    """AdamW (Loshchilov & Hutter 2019), defaults of He et al. 2022, table 8."""

    moments: ClassVar[int] = 2

    name: Literal["adamw"] = "adamw"
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    """Peak learning rate for a global batch of 256 samples."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled decay of weights with two or more dimensions; none for biases and norms."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's averaging factors."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    mup_base_width: Annotated[int, Field(ge=1)] | None = None
    """encoder.embed_dim at which base_lr was found: muP (`mup.py`) keeps it best at other widths with the same channels
    a head, of clm, mlm and mae. At that width all else (decoder, MLP) is taken to be narrower in the same proportion.
    None: the same learning rate and init for all weights, whatever the width."""


class LarsConfig(OptimConfig):
    """LARS (You et al. 2017), defaults of Chen et al. 2020, SimCLR, appendix B.6."""

    moments: ClassVar[int] = 1

    name: Literal["lars"] = "lars"
    base_lr: Annotated[float, Field(gt=0)] = 0.3
    """Peak learning rate for a global batch of 256 samples."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-6
    """Decay of weights with two or more dimensions, added to the gradient; none for biases and norms."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """LARS's share of the last update that the next one keeps."""
    trust_coefficient: Annotated[float, Field(gt=0)] = 0.001
    """LARS's step over the norm of a weight, at a learning rate of 1 and without momentum."""


AnyOptimConfig = Annotated[AdamWConfig | LarsConfig, Field(discriminator="name")]


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two named groups: decayed, and (1-D or bias) not decayed.

    As in facebookresearch/mae: class and mask tokens have three dimensions and are decayed.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [(name, p) for name, p in trainable if p.ndim > 1 and not name.endswith(".bias")]
    names = {name for name, _ in decayed}
    rest = [(name, p) for name, p in trainable if name not in names]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def split_by_rate(groups: list[dict[str, Any]], scales: dict[str, float]) -> list[dict[str, Any]]:
    """The groups parted by `lr_scale`, what the learning rate of their parameters is multiplied by.

    Weight decay is divided by it. AdamW takes lr * decay of a weight off at a step: that stays the same at every width,
    as in microsoft/mup; the memory of the weights would else grow as the width. Where all scales are 1 the groups are
    returned as they are.
    """
    if set(scales.values()) == {1.0}:
        return groups
    found = []
    for group in groups:
        for scale in sorted({scales[name] for name, _ in group["params"]}, reverse=True):
            params = [(name, p) for name, p in group["params"] if scales[name] == scale]
            found.append({"params": params, "weight_decay": group["weight_decay"] / scale, "lr_scale": scale})
    return found


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Every group's learning rate: lr times its `lr_scale`, which is 1 where it has none."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def build_optimizer(config: AdamWConfig | LarsConfig, module: nn.Module) -> torch.optim.AdamW | Lars:
    """The optimizer over the module's parameters.

    AdamW is fused where there is a fused kernel (CPU and CUDA); with mup_base_width its groups have learning rates of
    their own, and `set_lr` sets them. LARS adapts what is decayed, also where
    weight_decay is 0; biases and norms get plain momentum, as in SimCLR, BYOL and MoCo-v3.
    """
    decayed, rest = param_groups(module, config.weight_decay)
    match config:
        case AdamWConfig():
            device, groups = next(module.parameters()).device, [decayed, rest]
            if config.mup_base_width is not None:
                groups = split_by_rate(groups, lr_scales(module, config.mup_base_width))
            optimizer = torch.optim.AdamW(
                groups,
                lr=config.peak_lr,
                betas=config.betas,
                eps=config.eps,
                fused=device.type in ("cpu", "cuda"),
            )
            set_lr(optimizer, config.peak_lr)
            return optimizer
        case LarsConfig():
            return Lars(
                [decayed, {**rest, "adapt": False}],
                lr=config.peak_lr,
                momentum=config.momentum,
                trust_coefficient=config.trust_coefficient,
            )


def require_finite(loss: float, step: int) -> None:
    """Raises ValueError for a NaN or infinite loss: such a run is over, and must not be saved."""
    if not math.isfinite(loss):
        raise ValueError(
            f"loss is {loss} at step {step}: stopped without saving; the last checkpoint is intact. {RESCUE}"
        )
