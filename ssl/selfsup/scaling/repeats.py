"""Repeated data: what the second reading of a sample is worth (Muennighoff et al. 2023, 2305.16264).

To the base law E + A / N^alpha + B / D^beta come two half-lives: R_D of repeats of the data, R_N of parameters beyond
what the unique data are optimal for. They are often not identified: their profiles say so. The base law is another
table's, or fitted with them: runs of one epoch whose size is beyond the optimum follow R_N too, so that a base law of
all runs of one epoch would be biased.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from selfsup.scaling import law
from selfsup.scaling.fit import Fitted, Problem, Values, fit, fit_runs
from selfsup.scaling.profile import Profile, profile
from selfsup.scaling.solve import DELTA, Solved, huber, solve
from selfsup.scaling.table import Runs

PUBLISHED_DECAY = (15.387756, 5.309743)
"""R_D, R_N of 2305.16264 on C4: a point in a valley (our interval of R_D reaches from 6 to infinity)."""
LIMITS = (0.05, 1e4)
"""Where half-lives are looked for; at the upper end repeats are as good as fresh data."""

FRESH = 1.001
"""Runs that read so many times their unique samples or less are of one epoch."""


def repeats_problem(runs: Runs, base: Mapping[str, float], delta: float = DELTA) -> Problem:
    """The law of repeats on these runs, for the solver; theta = (log R_D, log R_N); starts are ranked at `delta`."""
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
            value[:, cell] = (weights * huber(log_loss - f, delta)).sum(1)
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
    found = fit(task, log_loss[None], np.ones((1, len(log_loss))), delta, keep=24)
    return _lowest(task, log_loss, found, curves, delta), curves


def _lowest(
    task: Problem, log_loss: np.ndarray, found: Fitted, curves: tuple[Profile, Profile], delta: float
) -> Fitted:
    """The best end of a fit and of both its profiles."""
    begin = np.concatenate([found.solved.theta, *(curve.theta for curve in curves)])
    ends = solve(
        task.model, begin, log_loss[None], np.ones((1, len(log_loss))), task.bounds, delta, widest=delta
    )
    best = int(ends.objective.argmin())
    reached = ends.objective <= ends.objective[best] * (1 + 1e-6) + 1e-9 * delta**2 * len(log_loss)
    return Fitted(
        Solved(*(column[best : best + 1] for column in ends)), np.array([reached.sum()]), len(begin)
    )


def joint_problem(
    runs: Runs, bases: Sequence[Mapping[str, float]], delta: float = DELTA
) -> Problem:
    """Base law and half-lives together; theta = (E, A', B', alpha, beta, log R_D, log R_N).

    Starts are the best, at `delta`, of each of `bases` with half-lives on a grid. `joint_theta` and `coefficients`
    translate.
    """
    assert runs.unique is not None
    x, y = np.log(runs.params), np.log(runs.samples)
    model = law.joint_repeats_model(x - x.mean(), y - y.mean(), np.log(runs.unique) - y.mean())
    grid = np.geomspace(LIMITS[0], LIMITS[1], 9)
    cells = np.array([joint_theta(runs, base, d, n) for base in bases for d in grid for n in grid])
    cells = cells.reshape(-1, 7)

    def coefficients(theta: np.ndarray) -> Values:
        E, A, B, alpha, beta, log_d, log_n = theta.T
        return {
            "E": E, "A": A * np.exp(alpha * x.mean()), "B": B * np.exp(beta * y.mean()), "alpha": alpha, "beta": beta,
            "R_D": np.exp(log_d), "R_N": np.exp(log_n),
        }  # fmt: skip

    low, high = law.EXPONENT_RANGE
    ends = np.log(LIMITS)
    bounds = np.array(
        [[0.0, 0.0, 0.0, low, low, *ends[[0, 0]]], [np.inf, np.inf, np.inf, high, high, *ends[[1, 1]]]]
    )
    return Problem("repeats", model, bounds, _begin_at(model, cells, delta), coefficients)


def _begin_at(model: law.Model, cells: Float[np.ndarray, "c p"], delta: float) -> Callable[..., np.ndarray]:
    """Starts where of these points the objective is least."""

    def begin(log_loss: np.ndarray, weights: np.ndarray, keep: int) -> np.ndarray:
        predicted = model(cells)[0]
        value = np.stack([(weights * huber(log_loss - f, delta)).sum(1) for f in predicted], axis=1)
        return cells[np.argsort(value, axis=1)[:, :keep]]

    return begin


def joint_theta(
    runs: Runs, base: Mapping[str, float | np.ndarray], R_D: float | np.ndarray, R_N: float | np.ndarray
) -> Float[np.ndarray, "... 7"]:
    """The solver's parameters of `joint_problem` on these runs."""
    x, y = np.log(runs.params).mean(), np.log(runs.samples).mean()
    E, A, B, alpha, beta = (np.asarray(base[name], dtype=np.float64) for name in law.CHINCHILLA)
    parts = (E, A * np.exp(-alpha * x), B * np.exp(-beta * y), alpha, beta, np.log(R_D), np.log(R_N))
    return np.stack(np.broadcast_arrays(*parts), axis=-1)


def base_laws(runs: Runs, delta: float = DELTA) -> list[dict[str, float]]:
    """Starts of a joint fit: laws of the runs of one epoch, then of those among them that are no larger than the
    law before says is optimal for their data."""
    assert runs.unique is not None
    fresh = runs.samples <= FRESH * runs.unique
    rows, laws = fresh, []
    for _ in range(4):
        if rows.sum() < 6:
            break
        laws.append(fit_runs("chinchilla", runs.take(rows), delta)[0])
        with np.errstate(all="ignore"):
            rows = fresh & (runs.params <= law.optimal_params(**laws[-1], samples=runs.unique))
    return laws


def fit_jointly(runs: Runs, delta: float = DELTA) -> tuple[Problem, Fitted, tuple[Profile, Profile]]:
    """Base law and half-lives on all runs, and the profiles of R_D and R_N over all others.

    The problem returned starts from the profiles' points: its fits of resamples look along the valley.
    """
    task, log_loss = joint_problem(runs, base_laws(runs, delta), delta), np.log(runs.loss)
    ones = np.ones((1, len(runs)))
    found = fit(task, log_loss[None], ones, delta, keep=12)
    others = np.concatenate([found.solved.theta, task.begin(log_loss[None], ones, 3)[0]])
    grid = np.linspace(*np.log(LIMITS), 40)
    curves = (
        profile(task, log_loss, 5, grid, others, delta),
        profile(task, log_loss, 6, grid, others, delta),
    )
    found = _lowest(task, log_loss, found, curves, delta)
    begin = _begin_at(task.model, np.concatenate([curve.theta for curve in curves]), delta)
    return task._replace(begin=begin), found, curves


def draws_over_base(
    runs: Runs, base: Mapping[str, np.ndarray], at: Mapping[str, float], weights: Float[np.ndarray, "r n"],
    delta: float = DELTA,
) -> tuple[Values, int]:  # fmt: skip
    """Half-lives `at` refitted in each resample over a draw of the base law (R values by name, held): all seven
    coefficients, and how many fits did not converge."""
    count = len(weights)
    task = joint_problem(runs, [], delta)
    theta = joint_theta(runs, base, at["R_D"], at["R_N"])
    begins = [theta] + [joint_theta(runs, base, d, n) for d in (2.0, 100.0) for n in (1.0, 50.0)]
    begin = np.concatenate(begins)
    bounds = np.repeat(task.bounds[:, None], len(begin), axis=1)
    bounds[:, :, :5] = begin[:, :5]
    every = np.tile(weights, (len(begins), 1))
    ends = solve(task.model, begin, np.log(runs.loss)[None], every, bounds, delta)
    best = ends.objective.reshape(len(begins), count).argmin(0) * count + np.arange(count)
    return task.coefficients(ends.theta[best]), int((~ends.converged[best]).sum())
