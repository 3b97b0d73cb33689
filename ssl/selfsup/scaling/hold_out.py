"""Holding out the largest runs, for the forms that are no law of N and D alone."""

from typing import Any

import numpy as np
from jaxtyping import Float

from selfsup.scaling.extrapolate import Extrapolation
from selfsup.scaling.fit import Fitted, Problem, fit
from selfsup.scaling.table import Runs


def fit_one(task: Problem, runs: Runs, delta: float, keep: int) -> tuple[dict[str, float], Fitted]:
    """Coefficients of one law on one table, from the `keep` best starts."""
    found = fit(task, np.log(runs.loss)[None], np.ones((1, len(runs))), delta, keep=keep)
    values = {name: float(value[0]) for name, value in task.coefficients(found.solved.theta).items()}
    return values, found


def errors_on(
    fitted: Runs, target: Runs, predicted: Float[np.ndarray, " n"], naive: Float[np.ndarray, " n"], axis: str
) -> Extrapolation:
    """Errors of a law and of a naive baseline on the runs held out; `axis` is what they are larger in."""
    error, baseline = np.abs(predicted / target.loss - 1), np.abs(naive / target.loss - 1)
    reach = float(getattr(target, axis).max() / getattr(fitted, axis).max())
    return Extrapolation(
        len(fitted), len(target), float(fitted.flops.max()), reach, float(error.mean()), float(error.max()),
        float(baseline.mean()), float(baseline.max()),
    )  # fmt: skip


def held_out_json(found: Extrapolation | None, baseline: str) -> dict[str, Any] | None:
    """For the file."""
    return None if found is None else {**found._asdict(), "error_of": "loss", "baseline": baseline}
