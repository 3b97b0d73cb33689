"""Many robust fits at once: the sum of Huber losses of log residuals, by damped Gauss-Newton within bounds.

Huber's threshold (1e-3 in log loss) makes the objective nearly a sum of absolute values: ordinary optimisers
crawl or stop early on it (Hoffmann et al.'s published coefficients are such a stop). Here the threshold
starts wide and narrows to its value, and each step takes the curvature of the residuals within it, damped by
that of reweighted least squares, which bounds the objective from above. Tested against SciPy's BFGS.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from selfsup.scaling.law import Model

DELTA = 1e-3
_BLOCK = 1_500_000  # numbers in a gradient at once: a few megabytes stay in the cache


class Solved(NamedTuple):
    """R fits: parameters, the sum of Huber losses, whether the gradient vanished, and steps taken."""

    theta: Float[np.ndarray, "r p"]
    objective: Float[np.ndarray, " r"]
    converged: Bool[np.ndarray, " r"]
    steps: Int[np.ndarray, " r"]


def huber(residual: Float[np.ndarray, "..."], delta: float) -> Float[np.ndarray, "..."]:
    """r^2 / 2 within delta, delta (|r| - delta / 2) beyond."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta))


def solve(
    model: Model,
    theta: Float[np.ndarray, "r p"],
    log_loss: Float[np.ndarray, "#r n"],
    weights: Float[np.ndarray, "#r n"],
    bounds: Float[np.ndarray, "2 ... p"],
    delta: float = DELTA,
    max_steps: int = 500,
    widest: float | None = None,
) -> Solved:
    """Minimises sum_i w_i Huber(log L_i - log Lhat_i) for each of R starts, within bounds.

    `log_loss` and `weights` may have one row for all; `bounds` are one pair for all or a pair for each fit.
    The threshold narrows to `delta` from the median residual, or from `widest`: from `delta` itself, a fit stays
    in the valley where it starts. A fit has converged where no step within the bounds promises to lower the
    objective by more than 1e-9 of it (or the residuals are rounding).
    """
    rows = max(1, _BLOCK // (log_loss.shape[1] * theta.shape[1]))
    parts = []
    for start in range(0, len(theta), rows):
        block = slice(start, start + rows)
        y = log_loss if len(log_loss) == 1 else log_loss[block]
        w = weights if len(weights) == 1 else weights[block]
        limits = bounds if bounds.ndim == 2 else bounds[:, block]
        parts.append(_solve_block(model, theta[block], y, w, limits, delta, max_steps, widest))
    return Solved(*(np.concatenate(column) for column in zip(*parts)))


def _solve_block(
    model: Model, theta: np.ndarray, y: np.ndarray, w: np.ndarray, bounds: np.ndarray, delta: float,
    max_steps: int, widest: float | None,
) -> Solved:  # fmt: skip
    count = len(theta)
    bounds = np.broadcast_to(bounds if bounds.ndim == 3 else bounds[:, None], (2, *theta.shape))
    theta = np.clip(theta, *bounds)
    y, w = np.broadcast_to(y, (count, y.shape[1])), np.broadcast_to(w, (count, w.shape[1]))
    steps = np.zeros(count, dtype=np.int64)
    if widest is None:
        spread = np.abs(y - model(theta)[0])
        widest = float(np.median(spread[w > 0])) if (w > 0).any() else delta
    for threshold in _narrowing(widest, delta):
        limit = 8 if threshold > delta else max_steps
        theta, objective, converged, taken = _descend(model, theta, y, w, bounds, threshold, limit)
        steps += taken
    return Solved(theta, objective, converged, steps)


def _narrowing(wide: float, delta: float) -> list[float]:
    """Thresholds from the size of the residuals down to delta, by factors of about four."""
    count = int(np.ceil(np.log(max(min(wide, 1.0) / delta, 1.0)) / np.log(4.0)))
    return [delta * 4.0**k for k in range(count, 0, -1)] + [delta]


def _descend(
    model: Model, theta: np.ndarray, y: np.ndarray, w: np.ndarray, bounds: np.ndarray, delta: float,
    max_steps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Damped Gauss-Newton at one threshold; fits that are done are taken out of the batch."""
    count = len(theta)
    theta = theta.copy()
    damping = np.full(count, 0.1)
    done, steps = np.zeros(count, dtype=bool), np.zeros(count, dtype=np.int64)
    total = w.sum(1)
    f, J = model(theta)
    objective = (w * huber(y - f, delta)).sum(1)
    left = np.arange(count)
    for _ in range(max_steps):
        g, H, M = _curvature(y[left] - f, J, w[left], delta)
        at, (low, high) = theta[left], bounds[:, left]
        fixed = ((at <= low) & (g > 0)) | ((at >= high) & (g < 0))
        step = _bounded_step(H + damping[left, None, None] * M, g, at, fixed, low, high)
        downhill = np.where(fixed, 0.0, g)
        promise = 0.5 * (downhill * _solved(H + 1e-3 * M, downhill, fixed)).sum(1)
        ended = promise <= 1e-9 * objective[left] + 1e-22 * total[left]
        done[left[ended]] = True
        if ended.all():
            break
        keep = ~ended
        left, f, J = left[keep], f[keep], J[keep]
        trial = np.clip(at + step, low, high)[keep]
        new_f, new_J = model(trial)
        value = (w[left] * huber(y[left] - new_f, delta)).sum(1)
        better = value < objective[left]
        steps[left] += 1
        theta[left[better]], objective[left[better]] = trial[better], value[better]
        f[better], J[better] = new_f[better], new_J[better]
        damping[left] = np.clip(np.where(better, damping[left] * 0.2, damping[left] * 5.0), 1e-6, 1e12)
    return theta, objective, done, steps


def _curvature(
    r: np.ndarray, J: np.ndarray, w: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradient, curvature of the residuals within delta, curvature of the majoriser, of each fit."""
    size = np.abs(r)
    inside = size <= delta
    pull = np.where(inside, 1.0, delta / np.maximum(size, delta)) * w
    g = -np.einsum("rpn,rn->rp", J, pull * r)
    H = (J * (w * inside)[:, None]) @ J.transpose(0, 2, 1)
    M = (J * pull[:, None]) @ J.transpose(0, 2, 1)
    return g, H, M


def _bounded_step(
    K: np.ndarray, g: np.ndarray, at: np.ndarray, fixed: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The step -K^-1 g within the bounds: a parameter that would cross its bound goes onto it, and the others take
    their step given that (clipping alone need not lower the objective)."""
    target = np.zeros_like(g)
    for _ in range(at.shape[1]):
        step = _solved(K, -g - (K @ target[:, :, None])[:, :, 0], fixed) + target
        crossing = ~fixed & ((at + step < low) | (at + step > high))
        if not crossing.any():
            break
        target = np.where(crossing, np.clip(at + step, low, high) - at, target)
        fixed = fixed | crossing
    return step


def _solved(matrix: np.ndarray, right: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Solves each p x p system in its free parameters, the diagonal scaled to one; 0 for the fixed ones."""
    free = ~fixed
    root = np.sqrt(np.maximum(np.einsum("rpp->rp", matrix), 1e-300))
    scaled = np.where(
        free[:, :, None] & free[:, None, :], matrix / (root[:, :, None] * root[:, None, :]), 0.0
    )
    scaled += np.eye(right.shape[1]) * np.where(fixed, 1.0, 1e-12)[:, :, None]
    return np.linalg.solve(scaled, np.where(fixed, 0.0, right / root)[:, :, None])[:, :, 0] / root
