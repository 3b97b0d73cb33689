"""Intervals by resampling runs: rows of one run (checkpoints, branches) are drawn together or not at all."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from selfsup.scaling.finding import Finding
from selfsup.scaling.fit import Problem, fit
from selfsup.scaling.solve import DELTA

MIN_CLUSTERS = 5
"""Below as many clusters there are no intervals: of one cluster every resample is the table itself, of four one in
35 is one run alone."""


class Draws(NamedTuple):
    """Coefficients of R resamples of each of T tables, (T, R) each, and how many of the T R fits did not converge
    (they are kept: leaving them out would narrow the interval)."""

    values: dict[str, np.ndarray]
    unconverged: int


def resample_weights(
    cluster: Int[np.ndarray, " n"], resamples: int, generator: np.random.Generator
) -> Float[np.ndarray, "r n"]:
    """How often each row is drawn when as many clusters as there are are drawn with replacement."""
    count = int(cluster.max()) + 1
    drawn = generator.multinomial(count, np.full(count, 1.0 / count), size=resamples)
    return drawn[:, cluster].astype(np.float64)


def bootstrap(
    task: Problem, log_loss: Float[np.ndarray, "t n"], cluster: Int[np.ndarray, " n"],
    theta: Float[np.ndarray, "t p"], resamples: int, seed: int, delta: float = DELTA,
    row_weights: Float[np.ndarray, " n"] | None = None,
) -> Draws:  # fmt: skip
    """Refits every resample from the full fit's optimum `theta` and from the best cell of its own grid. A row counts
    by how often it is drawn, times its weight.

    T tables (one in use, many in a simulation) share sizes, data and clusters, and differ in their losses.
    """
    generator = np.random.default_rng(seed)
    tables = len(log_loss)
    weights = np.concatenate([resample_weights(cluster, resamples, generator) for _ in range(tables)])
    if row_weights is not None:
        weights *= row_weights
    losses = log_loss if tables == 1 else np.repeat(log_loss, resamples, axis=0)
    found = fit(task, losses, weights, delta, keep=1, also=np.repeat(theta, resamples, axis=0))
    values = task.coefficients(found.solved.theta)
    shaped = {name: value.reshape(tables, resamples) for name, value in values.items()}
    return Draws(shaped, int((~found.solved.converged).sum()))


def too_few_clusters(cluster: Int[np.ndarray, " n"]) -> list[Finding]:
    """A refusal where there are too few clusters to resample; then no form writes intervals or draws."""
    count = int(cluster.max()) + 1
    if count >= MIN_CLUSTERS:
        return []
    text = f"{count} runs (below {MIN_CLUSTERS}) cannot be resampled: there are no intervals"
    return [Finding("few clusters", count, MIN_CLUSTERS, text, refuses=True)]


def interval(draws: Float[np.ndarray, " r"], level: float) -> tuple[float, float]:
    """The percentile interval. Its coverage is measured in tests: see tests/scaling/test_coverage.py."""
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def intervals(draws: Mapping[str, np.ndarray], level: float) -> dict[str, list[float]]:
    """{name: [low, high, level]}."""
    return {name: [*interval(values, level), level] for name, values in draws.items()}
