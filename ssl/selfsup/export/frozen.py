"""An encoder in eval mode without gradients, and how to feed it: what probes and pictures work with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.checkpoint import Weights
from selfsup.encoders import Encoder
from selfsup.encoders.timm import TimmEncoder
from selfsup.export.card import POOLING
from selfsup.recipe import Recipe


@dataclass(frozen=True)
class FrozenEncoder:
    """A pretrained encoder in eval mode, without gradients, and how to feed it."""

    name: str
    """Where it came from, as asked for."""
    module: nn.Module
    img_size: int
    """Side of the square input in pixels."""
    in_chans: int
    mean: tuple[float, ...]
    """Of pixels in [0, 1], one per channel."""
    std: tuple[float, ...]
    describe: str
    """Architecture and what a feature is, one sentence."""
    pooled: Callable[[Tensor], Tensor]
    """Normalised images -> features, calling `module`."""
    patches: Callable[[Tensor], Tensor]
    """Normalised images -> patch tokens, calling `module`."""
    recipe: Recipe | None = None
    """Of our own checkpoints."""
    checkpoint: Path | None = None
    """The folder loaded, of our own checkpoints."""
    notes: tuple[str, ...] = ()
    """Damaged checkpoints that were passed over, a sentence each."""
    weights: Weights = "trained"
    """Which of our own checkpoint's."""

    @torch.inference_mode()
    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """One feature per image; images normalised by `mean` and `std`, on the module's device."""
        return self.pooled(images)

    @torch.inference_mode()
    def tokens(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """One token per patch after the last norm, no class or register tokens; of a convolutional
        network one per position of its last map. Images as for `features`."""
        return self.patches(images)

    def to(self, device: torch.device) -> "FrozenEncoder":
        """Moves the module in place; returns self."""
        self.module.to(device)
        return self


def from_encoder(encoder: Encoder, recipe: Recipe, name: str) -> FrozenEncoder:
    """The encoder of a run of ours, frozen in place, fed as its recipe says; of timm's the model itself."""
    data, config = recipe.data, encoder.config
    if isinstance(encoder, TimmEncoder):
        module: Any = encoder.model
        stem = " with the CIFAR stem" if encoder.config.stem == "cifar" else ""
        describe, pooled = f"timm {encoder.config.model}{stem}, {timm_pooling(module)}", module

        def patches(images: Tensor) -> Tensor:
            return timm_patches(module, images)

    else:
        vit = module = pooled = encoder
        size = f"{vit.config.embed_dim}/{vit.config.depth}/{vit.config.num_heads}"
        describe = f"{vit.config.name} {size}, {POOLING[vit.config.pool]}"

        def patches(images: Tensor) -> Tensor:
            return vit.forward_features(images)[:, vit.num_prefix_tokens :]

    return FrozenEncoder(
        name=name,
        module=freeze(module),
        img_size=config.img_size,
        in_chans=config.in_chans,
        mean=data.mean,
        std=data.std,
        describe=describe,
        pooled=pooled,
        patches=patches,
        recipe=recipe,
    )


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode, no gradients, in place."""
    return module.eval().requires_grad_(False)


def timm_pooling(module: Any) -> str:
    """How a model of timm's makes one feature of many, a phrase."""
    pool = getattr(module, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)  # a layer in convolutional networks
    return f"pooling {pool!r} of timm" if isinstance(pool, str) and pool else "its own pooling of timm"


def timm_patches(module: Any, images: Tensor) -> Tensor:
    """What timm's `forward_features` gives, (b, n, d) with prefix tokens or a map, as (b, n, d)."""
    tokens = module.forward_features(images)
    if tokens.ndim == 3:
        return tokens[:, getattr(module, "num_prefix_tokens", 0) :]
    if getattr(module, "output_fmt", "NCHW") == "NHWC":
        return tokens.flatten(1, 2)  # (b, h, w, d) -> (b, h*w, d)
    return as_tokens(tokens)


def as_tokens(tokens: Tensor) -> Tensor:
    """(b, n, d) as it is; a map (b, d, h, w) as (b, h*w, d)."""
    return tokens if tokens.ndim == 3 else tokens.flatten(2).transpose(1, 2)
