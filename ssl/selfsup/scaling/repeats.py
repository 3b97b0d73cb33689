"""Repeated data: what the second reading of a sample is worth (Muennighoff et al. 2023, 2305.16264).

The base law E + A / N^alpha + B / D^beta stays as it is; two half-lives are fitted: R_D of repeats of the data, R_N of
parameters beyond what the unique data are optimal for. They are often not identified: their profiles say so.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from selfsup.scaling import law
from selfsup.scaling.fit import Problem, Values
from selfsup.scaling.solve import DELTA, huber, solve
from selfsup.scaling.table import Runs

PUBLISHED_DECAY = (15.387756, 5.309743)
"""R_D, R_N of 2305.16264 on C4: a point in a valley (our interval of R_D reaches from 6 to infinity)."""
LIMITS = (0.05, 1e4)
"""Where half-lives are looked for; at the upper end repeats are as good as fresh data."""
PROFILE_RISE = 0.02
"""A half-life is not told apart from another where the objective is within this of its minimum."""


class Profile(NamedTuple):
    """The least objective for each value of one half-life, the other one free."""

    decay: np.ndarray
    objective: np.ndarray


def repeats_problem(runs: Runs, base: Mapping[str, float]) -> Problem:
    """The law of repeats on these runs, for the solver; theta = (log R_D, log R_N)."""
    assert runs.unique is not None
    model = law.repeats_model(base, runs.params, runs.samples, runs.unique)
    log_limits = np.log(LIMITS)
    grid = np.linspace(*log_limits, 24)
    theta = np.array([(d, n) for d in grid for n in grid])
    predicted = model(theta)[0]

    def begin(log_loss: np.ndarray, weights: np.ndarray, keep: int) -> np.ndarray:
        count = max(len(log_loss), len(weights))
        value = np.empty((count, len(theta)))
        for cell, f in enumerate(predicted):
            value[:, cell] = (weights * huber(log_loss - f, DELTA)).sum(1)
        # The valley runs along R_D and has many minima: one start for each R_D, the best first.
        table = value.reshape(count, len(grid), len(grid))
        order = np.argsort(table.min(2), axis=1)[:, :keep]
        return theta[order * len(grid) + np.take_along_axis(table.argmin(2), order, axis=1)]

    def coefficients(found: np.ndarray) -> Values:
        return {"R_D": np.exp(found[:, 0]), "R_N": np.exp(found[:, 1])}

    bounds = np.repeat(log_limits[:, None], 2, axis=1)
    return Problem("repeats", model, bounds, begin, coefficients)


def profile(task: Problem, log_loss: Float[np.ndarray, " n"], which: int, delta: float = DELTA) -> Profile:
    """Fixes one half-life at 40 values and fits the other."""
    values = np.linspace(*task.bounds[:, which], 40)
    best = np.empty(len(values))
    ones = np.ones((1, len(log_loss)))
    starts = np.linspace(*task.bounds[:, 1 - which], 10)
    for k, value in enumerate(values):
        theta = np.empty((len(starts), 2))
        theta[:, which], theta[:, 1 - which] = value, starts
        bounds = task.bounds.copy()
        bounds[:, which] = value
        best[k] = solve(task.model, theta, log_loss[None], ones, bounds, delta).objective.min()
    return Profile(np.exp(values), best)


def valley(found: Profile, objective: float) -> tuple[float, float]:
    """The range of half-lives whose objective is within 2% of the least; infinite where the upper end is."""
    low = found.decay[found.objective <= objective * (1 + PROFILE_RISE)]
    return float(low.min()), float("inf") if low.max() >= found.decay[-1] else float(low.max())
