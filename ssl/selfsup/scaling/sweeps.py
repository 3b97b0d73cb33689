"""Learning-rate sweeps inside a table: the best of each cell is kept, and unequal sweeps are told.

At small scale the learning rate moves the loss as much as four times the compute does. The best of an incomplete sweep is
biased, and differently in each cell.
"""

import numpy as np

from selfsup.scaling.finding import Finding
from selfsup.scaling.table import Runs


def best_learning_rates(runs: Runs) -> tuple[Runs, list[Finding]]:
    """Of each cell (N, D, unique) the runs at its best learning rate (by the mean over repeats); without a column the
    runs as they are."""
    if runs.lr is None:
        return runs, []
    keys = [runs.params, runs.samples] + ([runs.unique] if runs.unique is not None else [])
    cell = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)[1].ravel()
    keep, counts, edges, gains = np.zeros(len(runs), dtype=bool), [], [], []
    for code in range(int(cell.max()) + 1):
        rows = cell == code
        rates = np.unique(runs.lr[rows])
        mean = np.array([runs.loss[rows & (runs.lr == rate)].mean() for rate in rates])
        best = int(mean.argmin())
        keep |= rows & (runs.lr == rates[best])
        counts.append(len(rates))
        if len(rates) > 1:
            edges.append(best in (0, len(rates) - 1))
            gains.append(float(mean.max() - mean.min()))
    found = []
    if min(counts) < max(counts):
        text = (
            f"cells were tried with {min(counts)} to {max(counts)} learning rates: the best of more tries is lower, so unequal "
            "sweeps bend the law; give every cell the same sweep or none"
        )
        found.append(Finding("unequal sweeps", max(counts) / min(counts), 1, text))
    if any(edges):
        share = float(np.mean(edges))
        text = (
            f"in {sum(edges)} of {len(edges)} swept cells the best learning rate is the lowest or highest tried (the sweeps move "
            f"the loss by up to {max(gains):.3g}): the optimum lies outside; widen them"
        )
        found.append(Finding("sweep edge", share, 0, text))
    elif max(counts) == 1 and len(np.unique(runs.lr)) == 1 and len(np.unique(runs.params)) > 1:
        text = f"one learning rate ({runs.lr[0]:.3g}) for all sizes: what is optimal for one is not for another"
        found.append(Finding("one learning rate", 1, 2, text))
    return runs.take(keep, "not at the best learning rate of their cell"), found
