"""Profiles: one coefficient held at a value, the others fitted. Flat where the coefficient is not identified."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from selfsup.scaling.fit import Problem
from selfsup.scaling.solve import DELTA, solve

RISE = 0.02
"""Two values of a coefficient are not told apart where the objective is within this share of its least."""


class Profile(NamedTuple):
    """Values of one coefficient, ascending, the least objective at each, and where it is (theta, one row a value)."""

    value: np.ndarray
    objective: np.ndarray
    theta: np.ndarray


def profile(
    task: Problem, log_loss: Float[np.ndarray, " n"], which: int, values: Float[np.ndarray, " v"],
    others: Float[np.ndarray, "s p"], delta: float = DELTA, weights: Float[np.ndarray, "1 n"] | None = None,
) -> Profile:  # fmt: skip
    """Parameter `which` of the solver's theta at each of `values`, the rest fitted from each row of `others`."""
    count, starts = len(values), len(others)
    theta = np.tile(others, (count, 1))
    theta[:, which] = np.repeat(values, starts)
    bounds = np.repeat(task.bounds[:, None], len(theta), axis=1)
    bounds[:, :, which] = theta[:, which]
    weights = np.ones((1, len(log_loss))) if weights is None else weights
    found = solve(task.model, theta, log_loss[None], weights, bounds, delta, max_steps=60)
    objective = found.objective.reshape(count, starts)
    best = np.arange(count) * starts + objective.argmin(1)
    return Profile(values, objective.min(1), found.theta[best])


def valley(found: Profile, objective: float) -> tuple[float, float]:
    """The values whose objective is within 2% of the least; infinite where the last one is."""
    flat = found.value[found.objective <= objective * (1 + RISE)]
    if not len(flat):
        return float("nan"), float("nan")
    return float(flat.min()), float("inf") if flat.max() >= found.value[-1] else float(flat.max())
