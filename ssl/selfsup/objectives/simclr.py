"""SimCLR (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations").

Two random views of every image are encoded and projected; each view must find the other among all
views of the batch, over all processes. Faithful to google-research/simclr, but for the scale of the
loss (the mean over anchors, where theirs adds the two directions and so is twice as large) and of the
projector's initial weights (torch's own, where theirs are N(0, 0.01); a batch norm follows each).
"""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfsup import dist, flops
from selfsup.config import Section
from selfsup.data.views import ViewBatch
from selfsup.encoders import EncoderConfig
from selfsup.objectives.base import Objective, Output, global_mean
from selfsup.objectives.heads import simclr_projector


class SimCLRConfig(Section):
    """Contrastive learning: find the other view of the same image among all others."""

    reads: ClassVar[str] = "images"
    views: ClassVar[int] = 2
    accumulates: ClassVar[bool] = False

    name: Literal["simclr"] = "simclr"
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Divides the cosines; 0.1 for ImageNet, 0.5 for CIFAR-10 (sec. B.9)."""
    hidden_dim: Annotated[int, Field(ge=1)] = 2048
    """Width of the projector's hidden layers."""
    out_dim: Annotated[int, Field(ge=1)] = 128
    """Width of what is compared."""
    num_layers: Annotated[int, Field(ge=1)] = 2
    """Layers of the projector: 2 in SimCLR, 3 in its second version."""
    chunk: Annotated[int, Field(ge=1)] | None = None
    """Views the encoder takes at once, recomputed in the backward pass: the memory of a small batch, the
    negatives and the gradient of the whole, one more forward pass. Not for encoders with BatchNorm."""

    def check(self, encoder: EncoderConfig) -> None:
        """Raises ValueError where the encoder does not fit."""
        if self.chunk is not None and encoder.has_batch_norm:
            raise ValueError(
                "objective.chunk: this encoder has BatchNorm, whose statistics would be those of a chunk; "
                "leave it out, or choose an encoder without (vit)"
            )

    def build(self, encoder: EncoderConfig) -> "SimCLR":
        """The objective around a fresh encoder."""
        self.check(encoder)
        return SimCLR(self, encoder)


def nt_xent(
    z_a: Float[Tensor, "b d"], z_b: Float[Tensor, "b d"], temperature: float
) -> Float[Tensor, "2*b"]:
    """The normalised temperature-scaled cross entropy of each anchor (eq. 1): views a, then views b.

    z_a, z_b: this process's projections; row i of both is image i. Every other view of every process
    is a negative, and gets its gradient; all processes must hold the same number. In float32 at
    least. With all projections equal it is ln(2N - 1), N images over all processes.
    """
    with torch.autocast(z_a.device.type, enabled=False):
        z = torch.cat([z_a, z_b])  # (2b, d)
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        everyone = dist.all_gather_with_grad(z)  # (world 2b, d)
        logits = z @ everyone.T / temperature  # (2b, world 2b)
        here = torch.arange(len(z), device=z.device)
        own, positive = slot(here), slot(here.roll(len(z_a)))
        logits = logits.scatter(1, own[:, None], -torch.inf)  # no view is its own negative
        return F.cross_entropy(logits, positive, reduction="none")


def slot(i: Tensor) -> Tensor:
    """Where row i of this process stands among those of all: process 0 first."""
    return dist.rank() * len(i) + i


def encode_in_chunks(
    encoder: nn.Module, images: Float[Tensor, "b c h w"], chunk: int | None
) -> Float[Tensor, "b d"]:
    """encoder(images), `chunk` at a time; each is computed again in the backward pass."""
    if chunk is None:
        return encoder(images)
    return torch.cat([checkpoint(encoder, part, use_reentrant=False) for part in images.split(chunk)])


class SimCLR(Objective):
    """Encoder, projector, NT-Xent over the views of all processes."""

    def __init__(self, config: SimCLRConfig, encoder: EncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder.build()
        width, layers = self.encoder.embed_dim, config.num_layers
        self.projector = simclr_projector(width, config.hidden_dim, config.out_dim, layers)

    def forward(self, batch: ViewBatch, total: float) -> Output:
        h = encode_in_chunks(self.encoder, torch.cat(batch.views), self.config.chunk)  # (2b, d)
        z_a, z_b = self.projector(h).chunk(2)  # one batch norm over both views, as published
        per_anchor = nt_xent(z_a, z_b, self.config.temperature)
        agreement = F.cosine_similarity(z_a.detach().float(), z_b.detach().float())
        metrics = {"positive_cos": global_mean(agreement.sum(), total)}
        return Output(global_mean(per_anchor.sum() / 2, total), metrics)

    def flops_per_sample(self) -> float:
        return 2 * (self.encoder.config.training_flops() + 3 * flops.linears(self.projector))
