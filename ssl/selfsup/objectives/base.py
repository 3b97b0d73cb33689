"""The one protocol between the loop and an objective."""

from typing import NamedTuple

from torch import Tensor, nn

from selfsup import dist
from selfsup.batch import ImageBatch


class Output(NamedTuple):
    """What `forward` returns."""

    loss: Tensor
    """Scalar: the local sum of loss terms times world / total. Averaged over ranks (DDP does so to
    gradients) and summed over micro-batches it is the mean over the global batch."""
    metrics: dict[str, Tensor]
    """Detached scalars on the same scale as `loss`."""


class Objective(nn.Module):
    """A pretraining objective: an encoder, and a loss inside `forward`."""

    encoder: nn.Module

    def forward(self, batch: ImageBatch, total: float) -> Output:
        """`total`: the number of targets in the global batch, over ranks and micro-batches."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step with the share of training done, in (0, 1]."""

    def flops_per_sample(self) -> float:
        """FLOPs of one forward and backward pass for one sample."""
        raise NotImplementedError

    def pictures(
        self, batch: ImageBatch, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """Pictures for TensorBoard, name -> float (3, h, w) in [0, 1]; default none."""
        return {}


def global_mean(local_sum: Tensor, total: float) -> Tensor:
    """A local sum of loss terms as this rank's share of the global mean, for averaging over ranks."""
    return local_sum * (dist.world_size() / total)
