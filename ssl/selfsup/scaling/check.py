"""Doubts about a fit: each a number, a limit, and a sentence. Some refuse the fit as a ground for plans.

The limits are ours; what stands behind them is in docs/scaling.md.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy import stats

from selfsup.scaling import law
from selfsup.scaling.bootstrap import interval
from selfsup.scaling.extrapolate import BASELINE, Extrapolation, condition_number
from selfsup.scaling.finding import Finding
from selfsup.scaling.fit import Fitted, Problem, exponents, fit, fit_runs, predict
from selfsup.scaling.solve import DELTA
from selfsup.scaling.table import Runs
from selfsup.scaling.trend import check_trends

LOOSE, LOOSE_REFUSED = 0.1, 0.4
"""Widths of the 95% interval of a: above the first it is told, above the second the law is refused."""


def check_fit(
    form: str, runs: Runs, task: Problem, values: Mapping[str, float], found: Fitted, delta: float = DELTA
) -> list[Finding]:
    """What the optimum itself shows: convergence, bounds, condition, residuals, sensitivity."""
    residual = np.log(runs.loss) - np.log(predict(form, values, runs.params, runs.samples))
    return [
        *check_convergence(found),
        *_bounds(form, runs, values),
        *_condition(task, found, runs.weights),
        *check_trends(runs, task.model(found.solved.theta)[1][0].T, residual),
        *_outliers(runs, residual),
        *_same_run(runs, residual),
        *_curves(runs, residual),
        *_sensitivity(form, runs, task, values, found, residual, delta),
    ]


def check_repeats(
    runs: Runs, task: Problem, values: Mapping[str, float], found: Fitted, predicted: np.ndarray
) -> list[Finding]:
    """The same of base law and half-lives fitted together; the condition is the base law's (profiles judge the rest)."""
    residual = np.log(runs.loss) - np.log(predicted)
    base = task._replace(model=lambda theta: (task.model(theta)[0], task.model(theta)[1][:, :5]))
    return [
        *check_convergence(found),
        *_bounds("chinchilla", runs, values),
        *_condition(base, found, np.ones(len(runs))),
        *check_trends(runs, task.model(found.solved.theta)[1][0].T, residual),
        *_outliers(runs, residual),
        *_same_run(runs, residual),
    ]


def check_convergence(found: Fitted) -> list[Finding]:
    """Did the optimiser arrive, and did more than one start arrive there?"""
    if not bool(found.solved.converged[0]):
        text = "the optimiser did not converge: its coefficients are a stop, not an optimum"
        return [Finding("not converged", float(found.solved.steps[0]), 0, text, refuses=True)]
    agreed = int(found.agreed[0])
    if agreed < 2 and found.tried > 2:
        text = f"{agreed} of {found.tried} starts reached the best objective: other starts may find a better one still"
        return [Finding("lonely optimum", agreed, 2, text)]
    return []


def _bounds(form: str, runs: Runs, values: Mapping[str, float]) -> list[Finding]:
    found = []
    low, high = law.EXPONENT_RANGE
    names = ("alpha_N", "alpha_D") if form == "kaplan" else ("alpha", "beta")
    for name in names[: 1 if form == "tied" else 2]:
        value = values[name]
        if value <= low * 1.01 or value >= high * 0.99:
            text = f"{name} = {value:.3g} lies at the end of the range searched ({low:g} to {high:g}): not identified"
            found.append(Finding("exponent at bound", value, low, text, refuses=True))
        elif not 0.05 <= value <= 1 and form != "kaplan":
            text = f"{name} = {value:.3g} is outside 0.05 to 1, where every published law of loss lies"
            found.append(Finding("odd exponent", value, 0.05 if value < 0.05 else 1, text))
    if form == "kaplan":
        return found
    E, least = values["E"], float(runs.loss.min())
    if least * 1e-3 >= E:
        text = f"E = {E:.3g} is zero: the irreducible loss is not identified (two powers of one size can stand for it)"
        found.append(Finding("E at zero", E, least * 1e-3, text))
    elif least < E * 1.02:
        text = f"E = {E:.4g} is within 2% of the least loss {least:.4g}: the data say that it cannot fall further"
        found.append(Finding("E above the losses", E, least / 1.02, text, refuses=least < E))
    for name, exponent, size in (("A", "alpha", runs.params), ("B", "beta", runs.samples)):
        reach = values[name] * (size.min() ** -values[exponent] - size.max() ** -values[exponent]) / least
        if reach < 1e-3:
            what = "parameters" if name == "A" else "data"
            text = (
                f"from the least to the most {what} the law falls by {reach:.2%}: it does not depend on them"
            )
            found.append(Finding("no dependence", float(reach), 1e-3, text, refuses=True))
    return found


def _condition(task: Problem, found: Fitted, weights: np.ndarray) -> list[Finding]:
    number = condition_number(task, found.solved.theta[0], weights)
    if number < 300:
        return []
    text = f"the law's gradient has condition number {number:.3g} (300 or more): some mixtures of coefficients are free"
    return [Finding("condition", number, 300, text, refuses=number > 3000)]


def _outliers(runs: Runs, residual: np.ndarray) -> list[Finding]:
    scale = 1.4826 * float(np.median(np.abs(residual) * runs.weights))
    size = np.abs(residual)
    far = (size * runs.weights > 10 * scale) & (size > 0.02)  # standard deviations: of a row of weight one
    if not far.any():
        return []
    lines = ", ".join(str(line) for line in runs.line[far][:6])
    text = (
        f"{int(far.sum())} rows lie more than 10 robust standard deviations ({scale:.2%}) off the "
        f"law, up to {size[far].max():.1%} "
        f"(lines {lines}): diverged, or of another setting?"
    )
    return [Finding("outliers", float((size * runs.weights)[far].max() / max(scale, 1e-12)), 10, text)]


def _same_run(runs: Runs, residual: np.ndarray) -> list[Finding]:
    """Without clusters: are residuals of one size alike, as those of checkpoints of one run are?"""
    if runs.clustered:
        return []
    group = np.unique(np.round(np.log(runs.params), 3), return_inverse=True)[1]
    count = np.bincount(group)
    many = count[group] > 2
    if many.sum() < 10 or len(np.unique(group[many])) < 3:
        return []
    g, r = np.unique(group[many], return_inverse=True)[1], stats.rankdata(residual[many])
    r = r - r.mean()
    n, k = len(r), int(g.max()) + 1
    mean = np.bincount(g, r) / np.bincount(g)
    within = float(((r - mean[g]) ** 2).sum() / (n - k))
    between = float((np.bincount(g) * mean**2).sum() / (k - 1))
    size = (n - float((np.bincount(g) ** 2).sum()) / n) / (k - 1)
    alike = (between - within) / (between + (size - 1) * within)
    if alike <= 0.5:
        return []
    text = (
        f"residuals of runs of one size are alike (correlation {alike:.2f} of their ranks): if "
        "they are checkpoints of one run, "
        "name it with --cluster, else the intervals are too narrow"
    )
    return [Finding("correlated rows", float(alike), 0.5, text)]


def _curves(runs: Runs, residual: np.ndarray) -> list[Finding]:
    """Rows of one run: do its early points lie off the law, as those taken before a decaying schedule ends do?

    The same asked as Qiu et al. 2025 (2507.02119) do: normalised by the law, do all curves collapse onto one?
    """
    if not runs.clustered:
        return []
    count = np.bincount(runs.cluster)
    end = np.zeros(len(count))
    np.maximum.at(end, runs.cluster, runs.samples)
    part = runs.samples / end[runs.cluster]
    same_size = np.array([np.ptp(np.log(runs.params[runs.cluster == c])) < 0.01 for c in range(len(count))])
    rows = (count >= 3)[runs.cluster] & same_size[runs.cluster]
    early, late = rows & (part < 0.6), rows & (part > 0.95)
    if early.sum() < 6 or late.sum() < 3:
        return []
    rise = float(np.median(residual[early]) - np.median(residual[late]))
    if abs(rise) <= 0.01:
        return []
    text = (
        f"points before 60% of a run lie {rise:+.1%} off where its end lies: curves do not "
        "collapse onto one law; points taken "
        "before the learning rate has decayed are no runs of that length"
    )
    return [Finding("curves", abs(rise), 0.01, text)]


def _sensitivity(
    form: str, runs: Runs, task: Problem, values: Mapping[str, float], found: Fitted, residual: np.ndarray,
    delta: float,
) -> list[Finding]:  # fmt: skip
    """How far the exponent a moves without the worst 2% of the runs, without the cheapest quarter, at ten times delta."""
    log_loss, n = np.log(runs.loss)[None], len(runs)
    a = float(exponents(form, values)[0])
    worst, cheap = runs.weights, runs.weights
    count = max(1, round(0.02 * n))
    worst[np.argsort(-np.abs(residual) * runs.weights)[:count]] = 0
    cheap[runs.flops < np.quantile(runs.flops, 0.25)] = 0
    start = found.solved.theta[:1]
    said = []
    names = (
        ("outlier influence", worst, delta, f"without the {count} rows farthest off the law", 0.03),
        (
            "cheapest runs",
            cheap,
            delta,
            f"without the cheapest quarter ({int((cheap == 0).sum())} rows)",
            0.05,
        ),
        ("delta", runs.weights, 10 * delta, f"with delta {10 * delta:g} in place of {delta:g}", 0.05),
    )
    for name, weights, threshold, what, limit in names:
        if (weights > 0).sum() <= len(task.bounds[0]):
            continue
        again = fit(task, log_loss, weights[None], threshold, keep=4, also=start)
        refit = {key: float(value[0]) for key, value in task.coefficients(again.solved.theta).items()}
        other = float(exponents(form, refit)[0])
        moved = abs(other - a)
        pairs = zip(list(values.values())[-2:], list(refit.values())[-2:])
        moved = max(moved, *(abs(one - two) for one, two in pairs))
        if moved > limit:
            shown = ", ".join(f"{key} {values[key]:.3g} -> {refit[key]:.3g}" for key in list(values)[-2:])
            text = f"{what}: {shown}, a {a:.3f} -> {other:.3f} (moves by {moved:.3f}, limit {limit:g})"
            said.append(Finding(name, moved, limit, text))
    return said


def check_draws(
    draws: Mapping[str, np.ndarray], unconverged: int, clusters: int, least: float
) -> list[Finding]:
    """What the bootstrap shows: a loose exponent, an irreducible loss that may be zero, failed resamples."""
    found = []
    resamples = len(next(iter(draws.values())))
    if clusters < 10:
        text = f"intervals rest on {clusters} runs (below 10): take them as too narrow"
        found.append(Finding("few clusters", clusters, 10, text))
    if unconverged > 0.01 * resamples:
        text = f"{unconverged} of {resamples} resamples did not converge"
        found.append(Finding("resamples", unconverged / resamples, 0.01, text))
    low, high = interval(draws["a"], 0.95) if "a" in draws else (0.0, 0.0)
    if high - low > LOOSE:
        loose = high - low > LOOSE_REFUSED
        text = (
            f"a, the exponent of the optimal size, is between {low:.2f} and {high:.2f} (95%; "
            f"{LOOSE_REFUSED if loose else LOOSE} or less wanted)"
        )
        found.append(Finding("loose exponent", high - low, LOOSE_REFUSED if loose else LOOSE, text, refuses=loose))
    if "E" in draws:
        low, high = interval(draws["E"], 0.95)
        if low < 0.01 * least:
            text = f"E is between {low:.2f} and {high:.2f} (95%): the irreducible loss is not identified"
            found.append(Finding("loose E", low, 0.01 * least, text))
    return found


def check_extrapolation(
    found: Extrapolation | None, baseline: str = BASELINE, nothing: str = "too few runs to hold out the largest"
) -> list[Finding]:
    """Held-out runs of more compute: are they foretold, and better than by the `baseline`? `nothing` says why none
    were held out."""
    if found is None:
        text = f"{nothing}: nothing says how the law extrapolates"
        return [Finding("no extrapolation", 0, 1, text)]
    mean, most, chance = found.mean_error, found.max_error, found.chance_error
    if 0.05 < mean <= chance:
        text = (
            f"fitted without the largest runs, it misses them by {mean:.1%} on average; by --sigma their noise alone can "
            f"give {chance:.1%}: nothing says how the law extrapolates"
        )
        return [Finding("no extrapolation", mean, 0.05, text)]
    if mean > 0.05:
        text = (
            f"fitted without the largest runs, it misses them by {mean:.1%} on average, "
            f"{most:.1%} at most (5% at most wanted)"
        )
        return [Finding("extrapolation", mean, 0.05, text, refuses=True)]
    if mean > max(0.02, chance, found.baseline_mean_error):
        text = (
            f"fitted without the largest runs, it misses them by {mean:.1%} on average, a baseline ({baseline}) by "
            f"{found.baseline_mean_error:.1%}"
        )
        return [Finding("extrapolation", mean, max(0.02, chance, found.baseline_mean_error), text)]
    return []


def check_counting(form: str, runs: Runs, a: float, delta: float = DELTA) -> list[Finding]:
    """Fits again with parameters counted otherwise: the exponent depends on the convention (by 0.3 in nanochat)."""
    if runs.also_params is None:
        return []
    other = float(exponents(form, fit_runs(form, replace(runs, params=runs.also_params), delta)[0])[0])
    if abs(other - a) <= 0.05:
        return []
    text = f"a = {a:.2f} with --params, {other:.2f} with --also-params: say which parameters are counted"
    return [Finding("counting", abs(other - a), 0.05, text)]
