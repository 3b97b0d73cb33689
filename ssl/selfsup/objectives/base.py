"""The one protocol between the loop and an objective."""

from typing import NamedTuple

from torch import Tensor, nn

from selfsup import dist
from selfsup.batch import ImageBatch, TextBatch
from selfsup.data.tokenizer import TextTokenizer
from selfsup.data.views import ViewBatch


class Output(NamedTuple):
    """What `forward` returns."""

    loss: Tensor
    """Scalar: the local sum of loss terms times world / total. Averaged over ranks (DDP does so to
    gradients) and summed over micro-batches it is the mean over the global batch."""
    metrics: dict[str, Tensor]
    """Detached scalars on the same scale as `loss`: the loop logs their mean over the global batch."""


class Objective(nn.Module):
    """A pretraining objective: an encoder, and a loss inside `forward`."""

    encoder: nn.Module
    projector: nn.Module | None
    """Features -> the embeddings that the loss compares; none: it compares something else."""

    @property
    def readouts(self) -> tuple[nn.Module, ...]:
        """What muP scales as output (`mup.py`): layers from the width to what does not widen; of a head that is tied to
        the embeddings, the norm before it. Only of objectives that muP is for."""
        raise NotImplementedError

    def forward(self, batch: ImageBatch | ViewBatch | TextBatch, total: float) -> Output:
        """`total`: the number of targets in the global batch, over ranks and micro-batches."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step with the share of training done before it, in [0, 1)."""

    def flops_per_sample(self) -> float:
        """FLOPs of one forward and backward pass for one sample."""
        raise NotImplementedError

    def pictures(
        self, batch: ImageBatch | ViewBatch, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """Pictures for TensorBoard, name -> float (3, h, w) in [0, 1]; default none."""
        return {}

    def shown(self, batch: TextBatch, tokenizer: TextTokenizer) -> str:
        """Predictions on a batch of text as a table for people; default none."""
        return ""


def global_mean(local_sum: Tensor, total: float) -> Tensor:
    """A local sum of loss terms as this rank's share of the global mean, for averaging over ranks."""
    return local_sum * (dist.world_size() / total)
