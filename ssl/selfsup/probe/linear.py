"""MAE's linear probe (He et al. 2022, appendix A.1): batch norm without parameters, one linear layer, LARS."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from timm.optim import Lars
from torch import Tensor, nn

from selfsup.export.frozen import FrozenEncoder
from selfsup.probe.features import Features, encoder_features
from selfsup.probe.fit import (
    FORWARD,
    Batch,
    accuracy,
    cached_batches,
    fit,
    frozen_views,
    in_order,
    own_generators,
    seed_generators,
    steps_of,
)
from selfsup.probe.report import Mode, publish
from selfsup.probe.sources import Labelled, Setup, expect, expect_crop_scale, load_sources
from selfsup.probe.supervised import Trial, supervised
from selfsup.schedule import warmup_cosine

BATCH_NORM_EPS = 1e-6


@dataclass(frozen=True)
class LinearRecipe:
    """He et al. 2022, table 10, except for the batch size."""

    mode: Mode = "fast"
    """fast: features computed once, no augmentation; paper: random crops and flips at every step."""
    epochs: float = 90.0
    """Passes over the training data (table 10)."""
    batch_size: int = 1024
    """Samples a step; the paper's 16384 would be three steps an epoch on a set of 50,000."""
    base_lr: float = 0.1
    """Peak learning rate per 256 samples of a batch (table 10). LARS moves a matrix by a thousandth of
    its norm times the rate, so a set much smaller than ImageNet needs a larger one, or more epochs."""
    warmup_fraction: float = 1 / 9
    """Share of the steps spent warming up (table 10: 10 of 90 epochs); then a cosine to 0."""
    momentum: float = 0.9
    """Of LARS (table 10)."""
    trust_coefficient: float = 0.001
    """Of LARS (facebookresearch/mae, util/lars.py)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest area of a random crop, in mode paper (torchvision's default, as in MAE)."""

    def __post_init__(self) -> None:
        expect(self.epochs > 0, "--epochs", "> 0", self.epochs)
        expect(self.batch_size >= 2, "--batch-size", ">= 2, for batch norm", self.batch_size)
        expect(self.base_lr > 0, "--base-lr", "> 0", self.base_lr)
        expect(0 <= self.warmup_fraction <= 1, "--warmup-fraction", "0 to 1", self.warmup_fraction)
        expect(0 <= self.momentum < 1, "--momentum", "0 <= x < 1", self.momentum)
        expect(self.trust_coefficient > 0, "--trust-coefficient", "> 0", self.trust_coefficient)
        expect_crop_scale(self.crop_scale)

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up: linear in the batch."""
        return self.base_lr * self.batch_size / 256


def main_linear(
    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")],
    /,
    *,
    setup: Annotated[Setup, tyro.conf.arg(name="")],
    recipe: Annotated[LinearRecipe, tyro.conf.arg(name="")],
    baselines: tuple[Literal["pixels", "random"], ...] = (),
) -> None:
    """Train a linear classifier on the frozen encoder's features, as MAE does.

    Several runs that differ in their seed give means and standard deviations; so do several seeds.

    Args:
        runs: run or checkpoint folders of one recipe, or one model: a folder, timm:NAME, hf:NAME.
        setup: what to read and where to compute.
        recipe: settings of the probe.
        baselines: also probe raw pixels, or the encoder as it was initialised.
    """
    encoders = load_sources(runs, setup.weights)
    measure = partial(probe_linear, setup=setup, recipe=recipe)
    result = supervised("linear", recipe.mode, encoders, setup, recipe, measure, baselines)
    publish(result, encoders[0], setup.out, Console())


def linear_head(width: int, classes: int) -> nn.Sequential:
    """Batch norm without scale and shift, then a linear layer: weights N(0, 0.01), bias 0."""
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS), linear)


def lars(head: nn.Module, recipe: LinearRecipe) -> Lars:
    """LARS (You et al. 2017) as in MAE: no weight decay; the trust ratio for matrices, not for biases.

    Without `always_adapt` timm's takes no trust ratio where the weight decay is 0, and learns at
    the raw rate, thousands of times too fast.
    """
    matrices = [p for p in head.parameters() if p.ndim > 1]
    biases = [p for p in head.parameters() if p.ndim <= 1]
    return Lars(
        [{"params": matrices, "always_adapt": True}, {"params": biases, "always_adapt": False}],
        lr=recipe.peak_lr,
        momentum=recipe.momentum,
        weight_decay=0.0,
        trust_coeff=recipe.trust_coefficient,
    )


def probe_linear(
    encoder: FrozenEncoder, data: Labelled, device: torch.device, setup: Setup, recipe: LinearRecipe
) -> list[Trial]:
    """A linear probe of one encoder for each seed. The encoder is left as it was.

    Raises ValueError for a batch larger than the training set, for samples that cannot be read and
    for features or losses that are not finite.
    """
    size, batch_size = len(data.train), recipe.batch_size
    expect(batch_size <= size, "--batch-size", f"at most the {size} training images", batch_size)
    how = (FORWARD, setup.workers, device, setup.bf16)
    test = _tensors(encoder_features(encoder, data.test, *how, "test features"))
    cache = None
    if recipe.mode == "fast":
        train = _tensors(encoder_features(encoder, data.train, *how, "training features"))
        cache = [part.to(device) for part in train]
    trials = []
    for seed in setup.seeds:
        if cache is not None:
            batches = cached_batches(*cache, seed, batch_size, device)
        else:
            batches = frozen_views(
                encoder, encoder.features, data.train, recipe.crop_scale, seed, batch_size, setup.workers,
                device, setup.bf16,
            )  # fmt: skip
        with closing(batches), own_generators(device):
            head, loss = fit_linear(batches, test[0].shape[1], data.classes, size, device, recipe, seed)
            right = accuracy(head, in_order(*test, device), bf16=False)
        trials.append(Trial({"linear": right}, {"loss": loss}))
    return trials


def _tensors(features: Features) -> tuple[Tensor, Tensor]:
    """Values, not copied, and labels, copied: the index's own may be read-only."""
    return torch.from_numpy(features.values), torch.tensor(features.labels)


def fit_linear(
    batches: Iterator[Batch],
    width: int,
    classes: int,
    samples: int,
    device: torch.device,
    recipe: LinearRecipe,
    seed: int,
) -> tuple[nn.Module, float]:
    """A head fitted to batches of features (b, width) and labels; with it `fit`'s loss.

    samples: in an epoch. Seeds the global generators. In float32.
    """
    seed_generators(seed)
    head = linear_head(width, classes).to(device)
    steps = steps_of(recipe.epochs, samples, recipe.batch_size)

    def lr(step: int) -> float:
        return warmup_cosine(step, steps, recipe.peak_lr, recipe.warmup_fraction, 0.0)

    return head, fit(head, lars(head, recipe), batches, steps, lr, seed, False, f"linear, seed {seed}")
