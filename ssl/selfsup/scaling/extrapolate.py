"""How well a law foretells larger runs: fitted without the largest ones, it predicts them, beside a naive baseline."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from selfsup.scaling.fit import Problem, fit_runs, predict, problem
from selfsup.scaling.solve import DELTA
from selfsup.scaling.table import Runs

HELD_OUT = 0.2
"""Share of the runs that is held out where the table names no budgets: those of the largest compute."""


class Extrapolation(NamedTuple):
    """Relative errors of the loss, 0.01 is 1%, means by the rows' weights; `reach` is the largest compute over the
    largest fitted, `chance_error` what measured noise alone gives as the mean at most (3 standard deviations)."""

    fitted: int
    held_out: int
    fitted_flops: float
    reach: float
    mean_error: float
    max_error: float
    baseline_mean_error: float
    baseline_max_error: float
    chance_error: float = 0.0


BASELINE = "log loss linear in log N and log D (a power law without an irreducible part), least squares"


def held_out_runs(runs: Runs) -> Bool[np.ndarray, " n"]:
    """The runs of the largest budget, or without budgets the largest fifth by compute; whole runs (clusters) always:
    a checkpoint that stays in the fit knows the rest of its run."""
    if runs.budget is not None and len(np.unique(runs.budget)) >= 3:
        return np.isin(runs.cluster, runs.cluster[runs.budget == runs.budget.max()])
    end = np.zeros(int(runs.cluster.max()) + 1)
    np.maximum.at(end, runs.cluster, runs.flops)
    cut = np.quantile(end, 1 - HELD_OUT)
    return (end > cut if (end > cut).any() else end >= cut)[runs.cluster]


def extrapolation(
    form: str, runs: Runs, held_out: Bool[np.ndarray, " n"] | None = None, delta: float = DELTA
) -> Extrapolation | None:
    """Fits without the held-out runs and predicts them. None where too few runs would be left to fit."""
    largest = held_out_runs(runs) if held_out is None else held_out
    fitted = runs.take(~largest)
    if not largest.any() or len(fitted) < len(problem(form, runs).bounds[0]) + 1:
        return None
    values, _ = fit_runs(form, fitted, delta)
    target = runs.take(largest)
    return errors_on(
        fitted, target, predict(form, values, target.params, target.samples), _baseline(fitted, target)
    )


def errors_on(
    fitted: Runs, target: Runs, predicted: Float[np.ndarray, " n"], naive: Float[np.ndarray, " n"],
    axis: str = "flops",
) -> Extrapolation:  # fmt: skip
    """Errors of a law and of a naive baseline on the runs held out; `axis` is what they are larger in.

    Of normal noise of standard deviation sigma |error| is sqrt(2 / pi) sigma, give or take sqrt(1 - 2 / pi) sigma.
    """
    share, chance = target.weights / target.weights.sum(), 0.0
    if target.sigma is not None:
        noise = np.bincount(target.cluster, share * target.sigma)  # rows of one run are taken to miss together
        chance = float((2 / np.pi) ** 0.5 * noise.sum() + 3 * ((1 - 2 / np.pi) * (noise**2).sum()) ** 0.5)
    error, baseline = np.abs(predicted / target.loss - 1), np.abs(naive / target.loss - 1)
    reach = float(getattr(target, axis).max() / getattr(fitted, axis).max())
    return Extrapolation(
        len(fitted), len(target), float(fitted.flops.max()), reach, float(share @ error), float(error.max()),
        float(share @ baseline), float(baseline.max()), chance,
    )  # fmt: skip


def extrapolation_json(found: Extrapolation | None, baseline: str = BASELINE) -> dict[str, Any] | None:
    """For the file."""
    return None if found is None else {**found._asdict(), "error_of": "loss", "baseline": baseline}


def _baseline(fitted: Runs, target: Runs) -> Float[np.ndarray, " n"]:
    def columns(runs: Runs) -> np.ndarray:
        return np.stack([np.ones(len(runs)), np.log(runs.params), np.log(runs.samples)], axis=1)

    slopes = np.linalg.lstsq(columns(fitted), np.log(fitted.loss), rcond=None)[0]
    return np.exp(columns(target) @ slopes)


def condition_number(task: Problem, theta: Float[np.ndarray, " p"], weights: Float[np.ndarray, " n"]) -> float:
    """Of the law's weighted gradient on these runs, each parameter in units of its own effect (columns of length one).

    1e16 where a parameter has no effect. About 1e3 already means that some mixture of the parameters is
    known a thousand times worse than another.
    """
    J = task.model(theta[None])[1][0].T * weights[:, None]
    length = np.linalg.norm(J, axis=0)
    if (length <= 1e-12 * length.max()).any():
        return 1e16
    return min(float(np.linalg.cond(J / length)), 1e16)
