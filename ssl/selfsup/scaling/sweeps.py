"""Learning-rate sweeps inside a table: the best of each cell is kept, and unequal sweeps are told.

At small scale the learning rate moves the loss as much as four times the compute does. The best of an incomplete sweep is
biased, and differently in each cell. Rules of one's own come from `optimal_setting` and `fit_rule`.
"""

import numpy as np
from jaxtyping import Float

from selfsup.scaling.finding import Finding
from selfsup.scaling.table import Runs, same_cell


def best_learning_rates(runs: Runs) -> tuple[Runs, list[Finding]]:
    """Of each cell (N, D, unique, each within 1%) the runs at its best learning rate (by the mean over repeats);
    without a column the runs as they are."""
    if runs.lr is None:
        return runs, []
    cell = same_cell(runs.params, runs.samples, runs.unique)
    rate = same_cell(runs.lr)
    keep, counts, edges, gains = np.zeros(len(runs), dtype=bool), [], [], []
    for code in range(int(cell.max()) + 1):
        rows = cell == code
        rates = np.unique(rate[rows])  # codes ascend with the rate
        mean = np.array([runs.loss[rows & (rate == one)].mean() for one in rates])
        best = int(mean.argmin())
        keep |= rows & (rate == rates[best])
        counts.append(len(rates))
        if len(rates) > 1:
            edges.append(best in (0, len(rates) - 1))
            gains.append(float(mean.max() - mean.min()))
    found = _unswept(runs, int(rate.max()) + 1) if max(counts) == 1 else []
    if min(counts) < max(counts):
        text = (
            f"cells were tried with {min(counts)} to {max(counts)} learning rates: the best of "
            "more tries is lower, so unequal sweeps bend the law; give every cell the same sweep or none"
        )
        found.append(Finding("unequal sweeps", max(counts) / min(counts), 1, text))
    if any(edges):
        share = float(np.mean(edges))
        text = (
            f"in {sum(edges)} of {len(edges)} swept cells the best learning rate is the lowest or "
            f"highest tried (the sweeps move the loss by up to {max(gains):.3g}): the optimum lies outside; widen them"
        )
        found.append(Finding("sweep edge", share, 0, text))
    return runs.take(keep, "not at the best learning rate of their cell"), found


def _unswept(runs: Runs, rates: int) -> list[Finding]:
    """Where no cell was tried at two rates: one rate for all sizes, or rates that nothing compares."""
    low, high = float(runs.lr.min()), float(runs.lr.max())
    if rates > 1:
        text = (
            f"{rates} learning rates ({low:.3g} to {high:.3g}), and no cell (N, D) was tried at two: nothing says that "
            "each is the best of its cell; try a smaller and a larger one at the smallest and the largest size"
        )
        return [Finding("no sweep", 1, 2, text)]
    if len(np.unique(same_cell(runs.params))) == 1:
        return []
    text = f"one learning rate ({low:.3g}) for all sizes: what is optimal for one is not for another"
    return [Finding("one learning rate", 1, 2, text)]


def optimal_setting(
    lr: Float[np.ndarray, " n"],
    batch: Float[np.ndarray, " n"],
    loss: Float[np.ndarray, " n"],
    within: float = 0.01,
) -> tuple[float, float]:
    """Learning rate and batch of least loss in one cell: the minimum of a quadratic in their logarithms.

    Through the settings whose loss is within 1% of the best, and not outside of them. Raises ValueError where
    fewer than seven are, or where the quadratic has no minimum.
    """
    near = loss <= (1 + within) * loss.min()
    if near.sum() < 7:
        raise ValueError(
            f"{int(near.sum())} settings within {within:.0%} of the best: a quadratic in two variables wants 7"
        )
    u, v = np.log(lr[near]), np.log(batch[near])
    basis = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=1)
    z = np.linalg.lstsq(basis, loss[near], rcond=None)[0]
    bend = np.array([[2 * z[3], z[4]], [z[4], 2 * z[5]]])
    if np.linalg.eigvalsh(bend).min() <= 0:
        raise ValueError("the loss has no minimum inside these settings")
    least = np.linalg.solve(bend, -z[1:3])
    best = np.clip(least, [u.min(), v.min()], [u.max(), v.max()])
    return float(np.exp(best[0])), float(np.exp(best[1]))


def fit_rule(setting: Float[np.ndarray, " n"], *sizes: Float[np.ndarray, " n"]) -> tuple[float, list[float]]:
    """setting = factor times the product of sizes to powers: (factor, powers), by least squares of logarithms."""
    columns = np.stack([np.ones(len(setting)), *(np.log(size) for size in sizes)], axis=1)
    height, *powers = np.linalg.lstsq(columns, np.log(setting), rcond=None)[0]
    return float(np.exp(height)), [float(power) for power in powers]
