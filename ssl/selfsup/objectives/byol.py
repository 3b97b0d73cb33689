"""BYOL (Grill et al. 2020, "Bootstrap Your Own Latent").

An online network predicts, from one view of an image, how a target network sees the other view; the
target is a moving average of the online one and gets no gradient. Faithful to deepmind-research/byol,
but for the initial weights of linear layers: torch's own.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from selfsup import flops
from selfsup.config import Section
from selfsup.data.views import ViewBatch
from selfsup.encoders import EncoderConfig
from selfsup.objectives.base import Objective, Output, global_mean
from selfsup.objectives.heads import byol_mlp


class BYOLConfig(Section):
    """Bootstrap: predict how a moving average of oneself sees another view of the image."""

    reads: ClassVar[str] = "images"
    views: ClassVar[int] = 2
    accumulates: ClassVar[bool] = True

    name: Literal["byol"] = "byol"
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Share of the target kept in the first step; rises to 1 in half a cosine. 0.97 for 40 epochs of
    ImageNet, 0.99 for 100 and 300, 0.996 for 1000."""
    hidden_dim: Annotated[int, Field(ge=1)] = 4096
    """Hidden width of projector and predictor."""
    out_dim: Annotated[int, Field(ge=1)] = 256
    """Width of a projection."""

    def check(self, encoder: EncoderConfig) -> None:
        """Every encoder fits."""

    def build(self, encoder: EncoderConfig) -> "BYOL":
        """The objective around a fresh encoder."""
        return BYOL(self, encoder)


def byol_loss(p: Float[Tensor, "b d"], z: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """|p / |p| - z / |z||^2 of each image (eq. 2), 0 to 4, in float32 at least; no gradient to z."""
    wide = torch.promote_types(p.dtype, torch.float32)
    return 2 - 2 * F.cosine_similarity(p.to(wide), z.detach().to(wide))


def target_momentum(progress: float, momentum: float) -> float:
    """Share of the target kept: `momentum` at progress 0, 1 at progress 1 (sec. 3.2)."""
    return 1 - (1 - momentum) * (math.cos(math.pi * progress) + 1) / 2


class BYOL(Objective):
    """Online encoder, projector, predictor; target encoder and projector."""

    def __init__(self, config: BYOLConfig, encoder: EncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder.build()
        self.projector = byol_mlp(self.encoder.embed_dim, config.hidden_dim, config.out_dim)
        self.predictor = byol_mlp(config.out_dim, config.hidden_dim, config.out_dim)
        # The published target starts from weights of its own, not from a copy.
        self.target_encoder = encoder.build().requires_grad_(False)
        self.target_projector = byol_mlp(self.encoder.embed_dim, config.hidden_dim, config.out_dim)
        self.target_projector.requires_grad_(False)

    def forward(self, batch: ViewBatch, total: float) -> Output:
        # View by view, each with batch statistics of its own; the target in training mode like the online one.
        (p_a, p_b), (z_a, z_b) = map(self.predict, batch.views), map(self.target, batch.views)
        per_image = byol_loss(p_a, z_b) + byol_loss(p_b, z_a)  # (b,)
        loss = global_mean(per_image.sum(), total)
        metrics = {"target_cos": global_mean((1 - per_image.detach() / 4).sum(), total)}
        return Output(loss, metrics)

    def predict(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The online network's prediction of the target's projection."""
        return self.predictor(self.projector(self.encoder(images)))

    @torch.no_grad()
    def target(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The target network's projection."""
        return self.target_projector(self.target_encoder(images))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The target takes in the new online weights. Only parameters are averaged: batch norm's running
        statistics are each network's own."""
        keep = target_momentum(progress, self.config.momentum)
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        target = [*self.target_encoder.parameters(), *self.target_projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - keep)

    def flops_per_sample(self) -> float:
        online = self.encoder.config.training_flops() + 3 * flops.linears(self.projector)
        target = self.encoder.config.flops_per_image() + flops.linears(self.projector)
        return 2 * (online + 3 * flops.linears(self.predictor) + target)
