"""Few-shot probes: logistic regression and kNN on a few frozen features a class, over several draws."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Int64
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from selfsup.data.order import sample_order
from selfsup.export.frozen import FrozenEncoder
from selfsup.probe import knn
from selfsup.probe.features import Features, encoder_features
from selfsup.probe.fit import FORWARD
from selfsup.probe.report import publish
from selfsup.probe.sources import Labelled, Setup, expect, load_sources
from selfsup.probe.supervised import Trial, supervised

MAX_ITERATIONS = 1000
FIVE_DRAWS = Setup(seeds=(0, 1, 2, 3, 4))
"""A single draw of a few images says little."""


@dataclass(frozen=True)
class FewshotRecipe:
    """A few labelled images a class, drawn anew for each seed."""

    per_class: tuple[int, ...] = (1, 5, 10)
    """Training images of each class. With one seed the smaller sets are parts of the larger."""
    c: float = 1.0
    """Inverse L2 strength of the logistic regression (scikit-learn's default): there is too little
    data to choose it on. Features are standardised on the images drawn."""
    temperature: float = knn.TEMPERATURE
    """Of the kNN's vote (Caron et al. 2021); k is the number of images a class, or 20 if that is less."""

    def __post_init__(self) -> None:
        shots = self.per_class
        several = bool(shots) and min(shots) >= 1 and len(set(shots)) == len(shots)
        expect(several, "--per-class", "different numbers >= 1", " ".join(map(str, shots)) or "none")
        expect(self.c > 0, "--c", "> 0", self.c)
        expect(self.temperature > 0, "--temperature", "> 0", self.temperature)


def main_fewshot(
    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")],
    /,
    *,
    setup: Annotated[Setup, tyro.conf.arg(name="")] = FIVE_DRAWS,
    recipe: Annotated[FewshotRecipe, tyro.conf.arg(name="")],
    baselines: tuple[Literal["pixels", "random"], ...] = (),
) -> None:
    """Score frozen features with a few labelled images a class, drawn anew for each of --seeds.

    Args:
        runs: run or checkpoint folders of one recipe, or one model: a folder, timm:NAME, hf:NAME.
        setup: what to read and where to compute.
        recipe: settings of the probe.
        baselines: also score raw pixels, or the encoder as it was initialised.
    """
    encoders = load_sources(runs, setup.weights)
    measure = partial(probe_fewshot, setup=setup, recipe=recipe)
    result = supervised("fewshot", "fast", encoders, setup, recipe, measure, baselines)
    publish(result, encoders[0], setup.out, Console())


def draw(labels: Int64[np.ndarray, " n"], per_class: int, seed: int) -> Int64[np.ndarray, " m"]:
    """Rows of `per_class` samples of each class: the first of each in the seed's shuffled order.

    Raises ValueError for a class that has fewer.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < per_class:
        short = int(classes[counts.argmin()])
        raise ValueError(
            f"--per-class: expected at most the {counts.min()} training images of class {short}, got {per_class}"
        )
    order = sample_order(seed, 0, np.arange(len(labels)), len(labels), "shuffled")
    return np.concatenate([order[labels[order] == label][:per_class] for label in classes])


def probe_fewshot(
    encoder: FrozenEncoder, data: Labelled, device: torch.device, setup: Setup, recipe: FewshotRecipe
) -> list[Trial]:
    """Both probes at every number of images a class, for each seed; features are computed once.

    Raises ValueError for a class with too few images and for what reading the features refuses.
    """
    for per_class in recipe.per_class:
        draw(data.train.label, per_class, setup.seeds[0])  # refuses before the work begins
    how = (FORWARD, setup.workers, device, setup.bf16)
    train = encoder_features(encoder, data.train, *how, "training features")
    test = encoder_features(encoder, data.test, *how, "test features")
    trials = []
    for seed in setup.seeds:
        accuracies: dict[str, float] = {}
        details: dict[str, Any] = {"converged": True}
        for per_class in recipe.per_class:
            rows = draw(train.labels, per_class, seed)
            few = Features(train.values[rows], train.labels[rows])
            right, converged = _logreg(few, test, recipe.c)
            accuracies[f"logreg-{per_class}"] = right
            k = min(per_class, knn.NEIGHBOURS)
            accuracies[f"knn-{per_class}"] = knn.knn_accuracy(few, test, k, recipe.temperature)
            details["converged"] &= converged
        trials.append(Trial(accuracies, details))
    return trials


def _logreg(few: Features, test: Features, c: float) -> tuple[float, bool]:
    """Accuracy 0..1, and whether the fit converged."""
    scaler = StandardScaler().fit(few.values)
    with threadpool_limits(1, user_api="blas"):
        model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(scaler.transform(few.values), few.labels)
        right = float(model.score(scaler.transform(test.values), test.labels))
    return right, int(np.max(model.n_iter_)) < MAX_ITERATIONS
