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
GAP, WIDEST = 0.02, 0.1
"""Without a budget column, runs of one budget follow each other in log C by no more than GAP; WIDEST in all."""
PART, CROWDED = 0.4, 1.5
"""Such budgets are believed where they hold this part of the runs, and where so many times as many pairs of runs are
within 3% in C as those within 30% would give if C varied continuously (1, give or take; 10 for exact budgets)."""


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
    """Profiles in ascending order, the rows (indices) of each, what was left out (how many, by what), and the power
    laws of either method as `power_laws` gives them, (6,)."""

    profiles: list[Profile]
    rows: list[np.ndarray]
    skipped: dict[str, int]
    parabola: np.ndarray
    akima: np.ndarray


def budgets(runs: Runs) -> tuple[Float[np.ndarray, " k"], Int[np.ndarray, " n"], dict[str, int]]:
    """The budgets and each run's, -1 where it has none, and how many have none by reason: by the budget column, else by
    gaps in log C.

    Without the column a budget is a narrow group of at least four sizes (GAP, WIDEST), and the table as a whole must
    look like budgets (PART, CROWDED): there are none where compute varies continuously.
    """
    if runs.budget is not None:
        values, codes = np.unique(runs.budget, return_inverse=True)
        return values, codes.astype(np.int64), {}
    groups, left = _groups(runs)
    codes = np.full(len(runs), -1, dtype=np.int64)
    for code, rows in enumerate(groups):
        codes[rows] = code
    return np.array([np.exp(np.log(runs.flops[rows]).mean()) for rows in groups]), codes, left


def _groups(runs: Runs) -> tuple[list[np.ndarray], dict[str, int]]:
    """Rows of each budget that `budgets` finds by gaps, and how many rows are in none, by the reason."""
    order = np.argsort(runs.flops, kind="stable")
    log_c, rank = np.log(runs.flops[order]), np.arange(len(runs)) + 1
    near, far = (int((np.searchsorted(log_c, log_c + h, "right") - rank).sum()) for h in (0.03, 0.3))
    if 10 * near < CROWDED * far:
        return [], {"runs: their FLOPs vary continuously, and no --budget groups them": len(runs)}
    groups, left = [], {}
    for rows in np.split(order, np.flatnonzero(np.diff(log_c) > GAP) + 1):
        if len(np.unique(runs.params[rows])) < MIN_SIZES:
            reason = f"runs of no budget (fewer than {MIN_SIZES} sizes within {GAP:.0%} of each other in FLOPs)"
        elif np.ptp(np.log(runs.flops[rows])) > WIDEST:
            reason = f"runs of no budget (by steps of up to {GAP:.0%} their FLOPs drift by over {WIDEST:.0%})"
        else:
            groups.append(rows)
            continue
        left[reason] = left.get(reason, 0) + len(rows)
    held = sum(map(len, groups))
    if len(groups) == 1:
        return [], {**left, "runs of the one group of like FLOPs: two budgets are needed": held}
    if held < PART * len(runs):
        if held:
            left[f"runs in groups of like FLOPs that hold under {PART:.0%} of the runs: give --budget"] = held
        return [], left
    return groups, left


def isoflop(runs: Runs, within: float = np.inf) -> Isoflop:
    """Profiles of every budget with at least four sizes, and the power laws through their optima.

    `within` keeps of each budget the sizes within that factor of the lowest one.
    """
    values, codes, skipped = budgets(runs)
    found, used = [], []
    for code, budget in enumerate(values):
        rows = np.flatnonzero(codes == code)
        if np.isfinite(within):
            lowest = runs.params[rows][runs.loss[rows].argmin()]
            rows = rows[np.abs(np.log(runs.params[rows] / lowest)) <= np.log(within)]
        if len(np.unique(runs.params[rows])) < MIN_SIZES:
            reason = f"budgets with fewer than {MIN_SIZES} sizes"
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        found.append(_profile(float(budget), runs, rows))
        used.append(rows)
    bottomless = sum(not np.isfinite(profile.parabola) for profile in found)
    if bottomless:
        skipped["budgets whose parabola has no minimum near the sizes"] = bottomless
    return Isoflop(found, used, skipped, _law(found, "parabola"), _law(found, "akima"))


def vertex(
    x: Float[np.ndarray, " n"], loss: Float[np.ndarray, "n r"]
) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, " r"]]:
    """log N and loss of the minimum of a parabola through (x = log N, loss), for R losses; nan where there is none."""
    centre = x.mean()
    bend, slope, height = np.polyfit(x - centre, loss, 2)
    curved = bend * np.ptp(x) ** 2 > 1e-10 * np.abs(height)  # not the rounding of equal losses
    bend = np.where(curved, bend, np.nan)
    log_n, least = centre - slope / (2 * bend), height - slope**2 / (4 * bend)
    near = (log_n >= x.min() - FAR) & (log_n <= x.max() + FAR) & (least > 0)
    return np.where(near, log_n, np.nan), np.where(near, least, np.nan)


def _profile(budget: float, runs: Runs, rows: np.ndarray) -> Profile:
    x, y = np.log(runs.params[rows]), runs.loss[rows]
    sizes, place = np.unique(runs.params[rows], return_inverse=True)
    count = np.bincount(place)
    mean = np.bincount(place, y) / count
    data = np.exp(np.bincount(place, np.log(runs.samples[rows])) / count)
    log_n, least = vertex(x, y[:, None])
    parabola = float(np.exp(log_n[0]))
    akima = akima_loss = np.nan
    if len(sizes) >= MIN_AKIMA:
        grid = np.linspace(np.log(sizes[0]), np.log(sizes[-1]), 1001)
        curve = Akima1DInterpolator(np.log(sizes), mean)(grid)
        akima, akima_loss = float(np.exp(grid[curve.argmin()])), float(curve.min())
    return Profile(
        budget, sizes, mean, data, parabola, float(least[0]), akima, akima_loss,
        at_edge=bool(mean.argmin() in (0, len(mean) - 1)),
        outside=bool(not sizes[0] <= parabola <= sizes[-1]),
        depth=float(mean.max() - mean.min()),
    )  # fmt: skip


def _law(profiles: list[Profile], method: str) -> np.ndarray:
    optima = [[getattr(profile, name) for profile in profiles] for name in (method, f"{method}_loss")]
    log_n, loss = np.log(optima[0])[:, None], np.array(optima[1])[:, None]
    return power_laws(profiles, log_n, loss)[0]


def power_laws(
    profiles: list[Profile], log_n: Float[np.ndarray, "k r"], loss: Float[np.ndarray, "k r"]
) -> Float[np.ndarray, "r 6"]:
    """(log N0, a, log D0, b, log L0, c): least squares in logarithms of the optima of k budgets against C, R times.

    nan optima are left out; all nan where fewer than two are left.
    """
    weight = np.isfinite(log_n).astype(np.float64)
    lines = [power_law(profile.params, profile.samples) for profile in profiles]  # D against N along a budget
    x = np.log([profile.budget for profile in profiles])[:, None]
    slope, height = np.array(lines).reshape(-1, 2).T[:, :, None]
    parts = []
    with np.errstate(divide="ignore", invalid="ignore"):
        total = np.where(weight.sum(0) >= 2, weight.sum(0), np.nan)
        centre = (weight * x).sum(0) / total
        spread = (weight * (x - centre) ** 2).sum(0)
        for y in (log_n, height + slope * log_n, np.log(loss)):
            y = np.where(weight > 0, y, 0.0)
            power = (weight * (x - centre) * y).sum(0) / spread
            parts += [(weight * y).sum(0) / total - power * centre, power]
    return np.stack(parts, axis=1)


def resampled(
    runs: Runs, found: Isoflop, resamples: int, generator: np.random.Generator
) -> tuple[Float[np.ndarray, "r 6"], int]:
    """`power_laws` of R resamples by parabolas, and in how many of them a budget lost its minimum.

    A wild bootstrap (Wu 1986): residuals off each parabola, made as large as the errors are (leverage), return with a
    random sign for each run (cluster), and all budgets keep all their sizes. Resampling rows instead loses budgets:
    its intervals were two to three times too wide. Each resample's residuals are scaled by sqrt(f / chi2_f), f the
    degrees of freedom behind the variance of a: Student's t in place of the normal (Bell and McCaffrey 2002).
    """
    kept = [(p, rows) for p, rows in zip(found.profiles, found.rows) if np.isfinite(p.parabola)]
    x_c = np.log([p.budget for p, _ in kept])
    pull = (x_c - x_c.mean()) / ((x_c - x_c.mean()) ** 2).sum()  # of each optimum on the slope a
    signs = generator.choice([-1.0, 1.0], size=(int(runs.cluster.max()) + 1, resamples))
    parts, effect = [], np.zeros((len(signs), len(runs)))
    for k, (_, rows) in enumerate(kept):
        x, y, code = np.log(runs.params[rows]), runs.loss[rows], runs.cluster[rows]
        to_error, gradient = _errors(x, y, code)
        parts.append((x, y, code, to_error[0] @ y, to_error[1] @ y))
        np.add.at(effect, (code[:, None], rows[None]), pull[k] * gradient[:, None] * to_error[1])
    variance = effect @ effect.T
    free = np.trace(variance) ** 2 / (variance**2).sum()
    scale = np.sqrt(free / generator.chisquare(free, resamples))
    log_n, loss = np.empty((len(kept), resamples)), np.empty((len(kept), resamples))
    for k, (x, y, code, residual, error) in enumerate(parts):
        log_n[k], loss[k] = vertex(x, (y - residual)[:, None] + error[:, None] * signs[code] * scale)
    return power_laws([p for p, _ in kept], log_n, loss), int(np.isnan(log_n).any(0).sum())


def _errors(x: np.ndarray, y: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (2, n, n) that take losses to residuals off their parabola, I - H, and to these as large as the errors
    are: over sqrt(1 - h), of several rows of a cluster times (I - H)^(-1/2). And the vertex's gradient, (n,)."""
    z = x - x.mean()
    basis = np.linalg.qr(np.stack([np.ones_like(x), z, z**2], axis=1))[0]
    residual = np.eye(len(x)) - basis @ basis.T
    error = residual.copy()
    for code in np.unique(cluster):
        rows = np.flatnonzero(cluster == code)
        value, vector = np.linalg.eigh(residual[np.ix_(rows, rows)])
        root = np.where(value > 1e-8, 1 / np.sqrt(np.maximum(value, 1e-8)), 0.0)
        error[rows] = (vector * root) @ vector.T @ residual[rows]
    bend, slope, _ = np.polyfit(z, y, 2)
    to_bend, to_slope, _ = np.polyfit(z, np.eye(len(x)), 2)
    return np.stack([residual, error]), slope / (2 * bend**2) * to_bend - to_slope / (2 * bend)


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
