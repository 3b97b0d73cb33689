"""Fitting a law of sizes and data to runs: one fit, or thousands at once."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from selfsup.scaling import law
from selfsup.scaling.solve import DELTA, Solved, solve
from selfsup.scaling.start import kaplan_starts, starts
from selfsup.scaling.table import Runs

STARTS = 8
FORMS = ("chinchilla", "tied", "kaplan")
Values = dict[str, np.ndarray]


class Problem(NamedTuple):
    """A law on given sizes and data, scaled for the solver.

    begin(log_loss, weights, k) -> (R, k, p) starts; coefficients(theta) -> the law's own parameters, (R,) each.
    """

    form: str
    model: law.Model
    bounds: Float[np.ndarray, "2 p"]
    begin: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    coefficients: Callable[[np.ndarray], Values]


class Fitted(NamedTuple):
    """The best of several starts, for each of R data sets; `agreed` starts of `tried` reached its objective."""

    solved: Solved
    agreed: np.ndarray
    tried: int


def problem(form: str, runs: Runs) -> Problem:
    """The law `form` on the sizes and data of these runs. Raises ValueError for an unknown form."""
    x, y = np.log(runs.params), np.log(runs.samples)
    x_mean, y_mean = float(x.mean()), float(y.mean())
    x, y = x - x_mean, y - y_mean
    low, high = law.EXPONENT_RANGE
    if form == "chinchilla":
        bounds = np.array([[0.0, 0.0, 0.0, low, low], [np.inf, np.inf, np.inf, high, high]])

        def values(theta: np.ndarray) -> Values:
            E, A, B, alpha, beta = theta.T
            return {
                "E": E, "A": A * np.exp(alpha * x_mean), "B": B * np.exp(beta * y_mean),
                "alpha": alpha, "beta": beta,
            }  # fmt: skip

        return Problem(
            form, law.chinchilla_model(x, y), bounds, lambda losses, w, k: starts(x, y, losses, w, k), values
        )
    if form == "tied":
        bounds = np.array([[0.0, 0.0, 0.0, low], [np.inf, np.inf, np.inf, high]])

        def tied_values(theta: np.ndarray) -> Values:
            E, A, B, alpha = theta.T
            scaled = A * np.exp(alpha * x_mean), B * np.exp(alpha * y_mean)
            return {"E": E, "A": scaled[0], "B": scaled[1], "alpha": alpha, "beta": alpha.copy()}

        def tied_starts(losses: np.ndarray, weights: np.ndarray, keep: int) -> np.ndarray:
            return starts(x, y, losses, weights, keep, tied=True)[..., :4]

        return Problem(form, law.tied_model(x, y), bounds, tied_starts, tied_values)
    if form == "kaplan":
        bounds = np.array([[1e-12, 1e-12, low, low], [np.inf, np.inf, 20.0, high]])

        def kaplan_values(theta: np.ndarray) -> Values:
            A, B, ratio, power = theta.T
            with np.errstate(over="ignore"):
                sizes = np.exp(np.log(A) / ratio + x_mean)
            return {"Nc": sizes, "Dc": B * np.exp(y_mean), "alpha_N": ratio * power, "alpha_D": power}

        return Problem(
            form,
            law.kaplan_model(x, y),
            bounds,
            lambda losses, w, k: kaplan_starts(x, y, losses, w, k),
            kaplan_values,
        )
    raise ValueError(f"--form {form}: expected one of {', '.join(FORMS)}")


def fit(
    task: Problem,
    log_loss: Float[np.ndarray, "#r n"],
    weights: Float[np.ndarray, "#r n"],
    delta: float = DELTA,
    keep: int = STARTS,
    also: Float[np.ndarray, "#r p"] | None = None,
) -> Fitted:
    """The best of `keep` starts of the grid, and of `also`, for each of R data sets.

    `log_loss` (the logarithms of the losses) and `weights` may have one row for all.
    """
    begin = task.begin(log_loss, weights, keep) if keep else np.empty((len(also), 0, len(task.bounds[0])))
    if also is not None:
        begin = np.concatenate([np.broadcast_to(also, (len(begin), also.shape[1]))[:, None], begin], axis=1)
    tables, tried, p = begin.shape
    if len(log_loss) > 1:
        log_loss = np.repeat(log_loss, tried, axis=0)
    if len(weights) > 1:
        weights = np.repeat(weights, tried, axis=0)
    ends = solve(task.model, begin.reshape(-1, p), log_loss, weights, task.bounds, delta)
    objective = ends.objective.reshape(tables, tried)
    best = objective.argmin(1)
    picked = Solved(*(column[np.arange(tables) * tried + best] for column in ends))
    rounding = 1e-9 * delta**2 * log_loss.shape[1]  # exact data: objectives that differ by rounding are one
    agreed = (objective <= picked.objective[:, None] * (1 + 1e-6) + rounding).sum(1)
    return Fitted(picked, agreed, tried)


def fit_runs(form: str, runs: Runs, delta: float = DELTA) -> tuple[dict[str, float], Fitted]:
    """Coefficients of one law on one table, and how the fit went.

    Raises ValueError where there are fewer rows than parameters.
    """
    task = problem(form, runs)
    needed = len(task.bounds[0])
    if len(runs) < needed:
        raise ValueError(
            f"--form {form} has {needed} parameters: expected at least {needed} rows, got {len(runs)}"
        )
    return fit_one(task, runs, delta)


def fit_one(task: Problem, runs: Runs, delta: float, keep: int = STARTS) -> tuple[dict[str, float], Fitted]:
    """Coefficients of one problem on its table, from the `keep` best starts, and how the fit went."""
    found = fit(task, np.log(runs.loss)[None], runs.weights[None], delta, keep)
    values = task.coefficients(found.solved.theta)
    return {name: float(value[0]) for name, value in values.items()}, found


def predict(
    form: str,
    values: Mapping[str, float | np.ndarray],
    params: np.ndarray | float,
    samples: np.ndarray | float,
) -> np.ndarray:
    """The loss that a law with these coefficients predicts; broadcasts."""
    function = law.kaplan if form == "kaplan" else law.chinchilla
    return function(**values, params=params, samples=samples)


def exponents(form: str, values: Mapping[str, float | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """a and b: compute-optimal N grows as C^a and D as C^b, for C proportional to N D (Hoffmann et al., equation 4)."""
    inner = inner_law(form, values)
    total = inner["alpha"] + inner["beta"]
    return np.asarray(inner["beta"] / total), np.asarray(inner["alpha"] / total)


def inner_law(form: str, values: Mapping[str, float | np.ndarray]) -> Values:
    """E, A, B, alpha, beta of the sum of powers that a law is, or (kaplan) is a monotone function of."""
    if form == "kaplan":
        ratio = np.asarray(values["alpha_N"]) / values["alpha_D"]
        return {
            "E": np.zeros_like(ratio), "A": np.exp(ratio * np.log(values["Nc"])), "B": np.asarray(values["Dc"]),
            "alpha": ratio, "beta": np.ones_like(ratio),
        }  # fmt: skip
    return {name: np.asarray(values[name]) for name in law.CHINCHILLA}
