"""Repeated data: what the second reading of a sample is worth (Muennighoff et al. 2023, 2305.16264).

The base law E + A / N^alpha + B / D^beta stays as it is; two half-lives are fitted: R_D of repeats of the data, R_N of
parameters beyond what the unique data are optimal for. They are often not identified: their profiles say so.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from selfsup.scaling import law
from selfsup.scaling.fit import Fitted, Problem, Values, fit
from selfsup.scaling.profile import Profile, profile
from selfsup.scaling.solve import DELTA, Solved, huber, solve
from selfsup.scaling.table import Runs

PUBLISHED_DECAY = (15.387756, 5.309743)
"""R_D, R_N of 2305.16264 on C4: a point in a valley (our interval of R_D reaches from 6 to infinity)."""
LIMITS = (0.05, 1e4)
"""Where half-lives are looked for; at the upper end repeats are as good as fresh data."""


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


def fit_repeats(
    task: Problem, log_loss: Float[np.ndarray, " n"], delta: float = DELTA
) -> tuple[Fitted, tuple[Profile, Profile]]:
    """The best half-lives, and the profile of each. The objective has many minima along its valley: the fit
    starts from the grid and from every point of both profiles."""
    grid = np.linspace(*task.bounds[:, 0], 40)
    others = np.repeat(grid[::7, None], 2, axis=1)
    curves = (
        profile(task, log_loss, 0, grid, others, delta),
        profile(task, log_loss, 1, grid, others, delta),
    )
    ones = np.ones((1, len(log_loss)))
    found = fit(task, log_loss[None], ones, delta, keep=24)
    begin = np.concatenate([found.solved.theta, *(curve.theta for curve in curves)])
    ends = solve(task.model, begin, log_loss[None], ones, task.bounds, delta, widest=delta)
    best = ends.objective.argmin()
    return found._replace(solved=Solved(*(column[best : best + 1] for column in ends))), curves
