"""Broken power law of one axis, with one break (Caballero et al. 2022, 2210.14891): six parameters."""

import numpy as np

from selfsup.scaling import law
from selfsup.scaling.fit import Problem, Values
from selfsup.scaling.start import project
from selfsup.scaling.table import Runs

MIN_RUNS = 12


def broken_problem(runs: Runs) -> Problem:
    """The law of the runs' `samples` column (the one axis), for the solver.

    Raises ValueError below 12 runs: six parameters go through fewer whatever they are.
    """
    if len(np.unique(runs.samples)) < MIN_RUNS:
        raise ValueError(
            f"--form bnsl has 6 parameters: expected at least {MIN_RUNS} different values of its axis, "
            f"got {len(np.unique(runs.samples))}; fewer points are fitted by it whatever they are"
        )
    x = np.log(runs.samples)
    mean = float(x.mean())
    x = x - mean
    cells = np.array([
        (c0, c1, place, np.log(width))
        for c0 in (0.02, 0.1, 0.25, 0.5, 1.0)
        for c1 in (-0.3, -0.1, 0.1, 0.3, 0.8)
        for place in np.quantile(x, (0.15, 0.3, 0.5, 0.7, 0.85))
        for width in (0.1, 0.3, 1.0)
    ])  # fmt: skip
    c0, c1, place, width = (cells[:, k, None] for k in range(4))
    bend = np.logaddexp(0.0, (x - place) / np.exp(width))
    curve = np.exp(-c0 * x - c1 * np.exp(width) * bend)
    bases = np.stack([np.ones_like(curve), curve, np.zeros_like(curve)], axis=1)
    # The transition is kept between a twentieth and three times e of the axis, the break inside the data:
    # outside of them the break is a power law by another name.
    bounds = np.array([
        [0.0, 0.0, 0.0, -2.0, float(x.min()), np.log(0.05)],
        [np.inf, np.inf, 4.0, 4.0, float(x.max()), np.log(3.0)],
    ])  # fmt: skip

    def begin(log_loss: np.ndarray, weights: np.ndarray, keep: int) -> np.ndarray:
        linear, value = project(bases, log_loss[None], weights)
        best = np.argsort(value, axis=1)[:, :keep]
        amplitudes = np.take_along_axis(linear, best[:, :, None], axis=1)[..., :2]
        return np.concatenate([amplitudes, cells[best]], axis=2)

    def coefficients(theta: np.ndarray) -> Values:
        a, b, first, second, log_d, log_f = theta.T
        d1 = np.exp(log_d + mean)
        return {
            "a": a,
            "b": b * np.exp(first * mean),
            "c0": first,
            "c1": second,
            "d1": d1,
            "f1": np.exp(log_f),
        }

    return Problem("bnsl", law.broken_model(x), bounds, begin, coefficients)
