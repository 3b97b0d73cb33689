"""IsoFLOP profiles: for each budget the size of least loss, by a parabola and by Akima interpolation.

Hoffmann et al. 2022, section 3.2 (approach 2). A parabola is biased where curves are wide or lopsided (2603.22339):
Akima's interpolation, which follows the points, stands beside it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.interpolate import Akima1DInterpolator

from selfsup.scaling.table import Runs

MIN_SIZES = 4
"""A budget needs as many sizes to be used: three points lie on a parabola whatever their noise."""
MIN_AKIMA = 5
FAR = float(np.log(100.0))
"""A parabola whose vertex is a hundredfold beyond the sizes has no minimum that the runs know of."""
SAME_BUDGET = 0.10
"""Without a budget column, runs whose FLOPs lie within this of each other are one budget."""


class Profile(NamedTuple):
    """One budget: C, sizes (ascending) with their mean losses and data, and the optima.

    `parabola` and `akima` are the N of least loss, nan where a method finds none. `at_edge`: the lowest point
    is the smallest or largest size. `outside`: the parabola's vertex lies beyond the sizes.
    """

    budget: float
    params: np.ndarray
    loss: np.ndarray
    samples: np.ndarray
    parabola: float
    parabola_loss: float
    akima: float
    akima_loss: float
    at_edge: bool
    outside: bool
    depth: float


class Isoflop(NamedTuple):
    """Profiles in ascending order, budgets left out by reason, and N* = n0 C^a, D* = d0 C^b by either method:
    (log n0, a, log d0, b), nan where fewer than two budgets have an optimum."""

    profiles: list[Profile]
    skipped: dict[str, int]
    parabola: np.ndarray
    akima: np.ndarray


def budgets(runs: Runs) -> tuple[Float[np.ndarray, " k"], Int[np.ndarray, " n"]]:
    """The budgets and each run's: by the budget column, or by FLOPs that lie within 10% of each other."""
    if runs.budget is not None:
        values, codes = np.unique(runs.budget, return_inverse=True)
        return values, codes.astype(np.int64)
    order = np.argsort(runs.flops)
    codes = np.empty(len(runs), dtype=np.int64)
    start, code, sums = runs.flops[order[0]], 0, []
    group: list[int] = []
    for index in order:
        if runs.flops[index] > start * (1 + SAME_BUDGET):
            sums.append(float(np.exp(np.log(runs.flops[group]).mean())))
            start, code, group = runs.flops[index], code + 1, []
        codes[index] = code
        group.append(int(index))
    sums.append(float(np.exp(np.log(runs.flops[group]).mean())))
    return np.array(sums), codes


def isoflop(runs: Runs, weights: Float[np.ndarray, " n"] | None = None, within: float = np.inf) -> Isoflop:
    """Profiles of every budget with at least four sizes, and the power laws through their optima.

    `weights` counts each run (a resample); runs of weight 0 are not there. `within` keeps of each budget the
    sizes within that factor of the lowest one.
    """
    values, codes = budgets(runs)
    weights = np.ones(len(runs)) if weights is None else weights
    found, skipped = [], {}
    for code, budget in enumerate(values):
        rows = (codes == code) & (weights > 0)
        if rows.any() and np.isfinite(within):
            lowest = runs.params[rows][runs.loss[rows].argmin()]
            rows &= np.abs(np.log(runs.params / lowest)) <= np.log(within)
        sizes = len(np.unique(runs.params[rows]))
        if sizes < MIN_SIZES:
            if sizes:
                reason = f"budgets with fewer than {MIN_SIZES} sizes"
                skipped[reason] = skipped.get(reason, 0) + 1
            continue
        found.append(_profile(float(budget), runs, rows, weights))
    return Isoflop(found, skipped, _law(found, "parabola"), _law(found, "akima"))


def _profile(budget: float, runs: Runs, rows: np.ndarray, weights: np.ndarray) -> Profile:
    x, y, w = np.log(runs.params[rows]), runs.loss[rows], weights[rows]
    sizes, place = np.unique(runs.params[rows], return_inverse=True)
    total = np.bincount(place, w)
    mean = np.bincount(place, w * y) / total
    data = np.exp(np.bincount(place, w * np.log(runs.samples[rows])) / total)
    centre, log_sizes = x.mean(), np.log(sizes)
    bend, slope, height = np.polyfit(x - centre, y, 2, w=np.sqrt(w))
    parabola = parabola_loss = np.nan
    vertex = -slope / (2 * bend) if bend > 0 else np.inf
    if log_sizes[0] - FAR <= vertex + centre <= log_sizes[-1] + FAR:
        parabola, parabola_loss = float(np.exp(vertex + centre)), float(height - slope**2 / (4 * bend))
    akima = akima_loss = np.nan
    if len(sizes) >= MIN_AKIMA:
        grid = np.linspace(log_sizes[0], log_sizes[-1], 1001)
        curve = Akima1DInterpolator(log_sizes, mean)(grid)
        akima, akima_loss = float(np.exp(grid[curve.argmin()])), float(curve.min())
    return Profile(
        budget, sizes, mean, data, parabola, parabola_loss, akima, akima_loss,
        at_edge=bool(mean.argmin() in (0, len(mean) - 1)),
        outside=bool(not sizes[0] <= parabola <= sizes[-1]),
        depth=float(mean.max() - mean.min()),
    )  # fmt: skip


def _law(profiles: list[Profile], method: str) -> np.ndarray:
    """(log n0, a, log d0, b) through the optima of one method."""
    optima = np.array([getattr(profile, method) for profile in profiles])
    fine = np.isfinite(optima)
    if fine.sum() < 2:
        return np.full(4, np.nan)
    log_c = np.log([profile.budget for profile in profiles])[fine]
    log_n = np.log(optima[fine])
    log_d = np.array([data_at(profile, n) for profile, n, good in zip(profiles, optima, fine) if good])
    a, n0 = np.polyfit(log_c, log_n, 1)
    b, d0 = np.polyfit(log_c, log_d, 1)
    return np.array([n0, a, d0, b])


def data_at(profile: Profile, params: float) -> float:
    """log D at a size of this budget: the straight line of log D against log N through its runs."""
    slope, at = np.polyfit(np.log(profile.params), np.log(profile.samples), 1)
    return float(at + slope * np.log(params))


def power_law(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """(exponent, log of the amplitude) of y = amplitude x^exponent, by least squares of logarithms."""
    exponent, amplitude = np.polyfit(np.log(x), np.log(y), 1)
    return float(exponent), float(amplitude)


def frontier(flops: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"]) -> Int[np.ndarray, " k"]:
    """Indices, in ascending compute, of the runs that no cheaper run equals or beats."""
    order = np.lexsort((loss, flops))
    best = np.minimum.accumulate(loss[order])
    first = np.concatenate([[True], best[1:] < best[:-1]])
    return order[first].astype(np.int64)
