"""Where a fit of E + A / N^alpha + B / D^beta starts: for given exponents the rest is linear.

Variable projection: on a grid of (alpha, beta) the best E, A, B >= 0 in relative least squares are found in closed
form, for every resample at once. The best cells of the grid are the starts.
"""

import numpy as np
from jaxtyping import Float

GRID = np.geomspace(0.03, 2.0, 12)
_SUPPORTS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


def nonnegative(
    gram: Float[np.ndarray, "r 3 3"], right: Float[np.ndarray, "r 3"]
) -> tuple[Float[np.ndarray, "r 3"], Float[np.ndarray, " r"]]:
    """min z^T G z - 2 z^T q over z >= 0, and its value, by trying each of the seven supports."""
    best, value = np.zeros_like(right), np.zeros(len(right))
    for support in _SUPPORTS:
        index = np.array(support)
        G = gram[:, index[:, None], index]
        q = right[:, index]
        ridge = np.eye(len(index)) * (1e-12 * np.einsum("rpp->r", G))[:, None, None]
        z = np.linalg.solve(G + ridge + 1e-300 * np.eye(len(index)), q[:, :, None])[:, :, 0]
        trial = -(z * q).sum(1)
        take = (z >= 0).all(1) & (trial < value)
        value[take] = trial[take]
        best[take] = 0.0
        best[np.ix_(take.nonzero()[0], index)] = z[take]
    return best, value


def starts(
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    log_loss: Float[np.ndarray, "#r n"],
    weights: Float[np.ndarray, "#r n"],
    keep: int,
    tied: bool = False,
) -> Float[np.ndarray, "t k 5"]:
    """The `keep` best (E, A', B', alpha, beta) of the grid for each resample. `log_loss` and `weights` may have
    one row for all."""
    cells, bases = [], []
    for alpha in GRID:
        for beta in GRID if not tied else [alpha]:
            cells.append((alpha, beta))
            bases.append(np.stack([np.ones_like(x), np.exp(-alpha * x), np.exp(-beta * y)]))
    linear, value = project(np.stack(bases), log_loss[None], weights)
    return _best(np.array(cells), linear, value, keep)


def kaplan_starts(
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    log_loss: Float[np.ndarray, "#r n"],
    weights: Float[np.ndarray, "#r n"],
    keep: int,
) -> Float[np.ndarray, "t k 4"]:
    """The `keep` best (A', B', ratio, alpha_D): L^(1 / alpha_D) is linear in A' and B'."""
    cells = np.array(
        [(ratio, power) for ratio in np.geomspace(0.1, 8.0, 12) for power in np.geomspace(0.03, 1.0, 12)]
    )
    bases = np.stack([[np.zeros_like(x), np.exp(-ratio * x), np.exp(-y)] for ratio, _ in cells])
    linear, value = project(bases, log_loss[None] / cells[:, 1, None, None], weights)
    value = value * cells[:, 1] ** 2  # from the error of log L^(1 / alpha_D) to that of log L
    return _best(cells, np.maximum(linear[..., 1:], 1e-9), value, keep)


def project(
    bases: Float[np.ndarray, "c 3 n"],
    log_target: Float[np.ndarray, "d r n"],
    weights: Float[np.ndarray, "s n"],
) -> tuple[Float[np.ndarray, "t c 3"], Float[np.ndarray, "t c"]]:
    """For each cell of a grid, whose law is linear in three functions of the runs, the best amplitudes >= 0 for
    each of R resamples, and sum_i w_i (1 - Lhat_i / L_i)^2. `log_target` may have one block for all cells."""
    count = max(log_target.shape[1], len(weights))
    linear, value = np.empty((count, len(bases), 3)), np.empty((count, len(bases)))
    firsts = squares = np.empty(0)
    for k, basis in enumerate(bases):
        if k == 0 or len(log_target) > 1:
            target = log_target[min(k, len(log_target) - 1)]
            firsts = np.ascontiguousarray(np.broadcast_to(weights * np.exp(-target), (count, basis.shape[1])))
            squares = firsts * np.exp(-target)
        products = (basis[:, None] * basis[None]).reshape(9, -1)
        gram = (squares @ products.T).reshape(count, 3, 3)
        linear[:, k], value[:, k] = nonnegative(gram, firsts @ basis.T)
    total = np.broadcast_to(weights.sum(1), (count,))
    return linear, value + total[:, None]


def _best(cells: np.ndarray, linear: np.ndarray, value: np.ndarray, keep: int) -> np.ndarray:
    """The best cells of each resample, neighbours of a chosen one last."""
    count, rows = len(value), np.arange(len(value))
    grids = [np.unique(column) for column in cells.T]
    place = np.stack([np.searchsorted(grid, column) for grid, column in zip(grids, cells.T)], axis=1)
    left, chosen = value.copy(), []
    for _ in range(keep):
        best = np.where(np.isfinite(left).any(1), left.argmin(1), value.argmin(1))
        chosen.append(
            np.concatenate([linear[rows, best], np.broadcast_to(cells[best], (count, cells.shape[1]))], 1)
        )
        left[(np.abs(place[None] - place[best][:, None]) <= 1).all(2)] = np.inf
    return np.stack(chosen, axis=1)
