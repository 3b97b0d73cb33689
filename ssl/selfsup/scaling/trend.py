"""Do the residuals still depend on D/N or on compute? Then the form is wrong there, or those runs are trained less well.

A law of five coefficients bends its way through most of a dozen runs: what a wrong form leaves over is small against
the scatter, and ranks of thirds do not see it. The score test does: would another term of the law, a step between
thirds or a bend, lower the squares by more than chance? For normal noise its level is nearly that of
chance: the law is linearised, and outliers are clipped.
"""

import numpy as np
from jaxtyping import Float
from scipy import stats

from selfsup.scaling.finding import Finding
from selfsup.scaling.table import Runs

MIN_RUNS = 12
FEW = 30
"""Below as many runs the limit of chance is 1%, from there on 0.1%. Of sound tables of 12, 15
and 16 runs, 1,000 each, under 0.8% are accused (tests/scaling/test_trend.py)."""
REACH = 2e-3
"""Medians of thirds that differ by less are not told, however certain."""


def check_trends(
    runs: Runs, gradient: Float[np.ndarray, "n p"], residual: Float[np.ndarray, " n"]
) -> list[Finding]:
    """`gradient` is the law's at its optimum, of log loss. Rows of one cluster are taken as their mean: they are no
    independent witnesses."""
    found, count = [], np.bincount(runs.cluster)

    def of_run(value: np.ndarray) -> np.ndarray:
        return np.bincount(runs.cluster, value) / count

    w = of_run(runs.weights)[:, None]
    J = np.stack([of_run(column) for column in gradient.T], axis=1) * w
    r, limit = of_run(residual), 1e-2 if len(count) < FEW else 1e-3
    weighted = r * w[:, 0]
    farthest = clip_at(weighted, J.shape[1])
    for name, axis in (("D/N", runs.samples / runs.params), ("compute", runs.flops)):
        x = np.round(of_run(np.log(axis)), 6)  # budgets differ by rounding
        low, high = np.quantile(x, [1 / 3, 2 / 3])
        thirds = np.stack([x <= low, (x > low) & (x <= high), x > high], axis=1)
        if len(x) < MIN_RUNS or not thirds.any(0).all():
            continue
        steps, bend = w * thirds[:, :2], w * ((x - x.mean()) ** 2)[:, None]
        clipped = np.clip(weighted, -farthest, farthest)  # outliers are another check's
        chance = min(1.0, 2 * min(chance_of(J, clipped, steps), chance_of(J, clipped, bend)))
        medians = [float(np.median(r[third])) for third in thirds.T]
        if chance < limit and max(medians) - min(medians) > REACH:
            shown = ", ".join(f"{median:+.2%}" for median in medians)
            text = (
                f"residuals depend on {name}: median {shown} in its lower, middle and upper third (by chance "
                f"{chance:.1g}): the form is wrong there, or those runs are trained less well"
            )
            found.append(Finding(f"trend with {name}", chance, limit, text))
    return found


def clip_at(residual: Float[np.ndarray, " n"], p: int) -> float:
    """Four robust standard deviations. A fit of least absolute values goes through some p of the runs: the p least
    residuals are no scatter."""
    size = np.sort(np.abs(residual))
    return 4 * 1.4826 * float(np.median(size[min(p, len(size) - 1) :]))


def chance_of(
    gradient: Float[np.ndarray, "n p"], residual: Float[np.ndarray, " n"], terms: Float[np.ndarray, "n q"]
) -> float:
    """How likely further terms lower the sum of squares by as much, were the law right (F test of the law's
    linearisation at its optimum). 1 where the terms are the law's own, or no freedom is left to judge."""
    fitted = _basis(gradient)
    left = residual - fitted @ (fitted.T @ residual)
    own = terms / np.maximum(np.linalg.norm(terms, axis=0), 1e-300)
    own = own - fitted @ (fitted.T @ own)
    own = own[:, np.linalg.norm(own, axis=0) > 1e-6]
    if not own.shape[1]:
        return 1.0
    new = _basis(own)
    freedom = len(residual) - fitted.shape[1] - new.shape[1]
    if freedom < 3:
        return 1.0
    gained = float(((new.T @ left) ** 2).sum())
    rest = max(float((left**2).sum()) - gained, 1e-300)
    return float(stats.f.sf(gained / new.shape[1] / (rest / freedom), new.shape[1], freedom))


def _basis(columns: np.ndarray) -> np.ndarray:
    """Orthonormal columns of the same span."""
    scaled = columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    u, s, _ = np.linalg.svd(scaled, full_matrices=False)
    return u[:, s > 1e-8 * s[0]]
