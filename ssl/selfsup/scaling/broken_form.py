"""The form `bnsl` as a result: a broken power law of one axis."""

import numpy as np

from selfsup.scaling import law
from selfsup.scaling.assemble import LEVEL, make_result, refuse_scales, residual_spread
from selfsup.scaling.bootstrap import bootstrap, interval, too_few_clusters
from selfsup.scaling.broken import MIN_RUNS, broken_problem
from selfsup.scaling.check import check_convergence, check_draws, check_extrapolation
from selfsup.scaling.extrapolate import Extrapolation, errors_on, extrapolation_json, held_out_runs
from selfsup.scaling.finding import Finding
from selfsup.scaling.fit import Problem, fit_one
from selfsup.scaling.isoflop import power_law
from selfsup.scaling.result import Result
from selfsup.scaling.solve import DELTA
from selfsup.scaling.table import Runs

STARTS = 32
POWER_LAW = "a power law of the axis, least squares"


def analyse_broken(
    runs: Runs, axis: str, resamples: int = 1000, seed: int = 0, delta: float = DELTA
) -> Result:
    """A broken power law of the axis, which stands in `runs.samples`. Raises ValueError below 12 runs."""
    refuse_scales(runs)
    task = broken_problem(runs)
    values, found = fit_one(task, runs, delta, STARTS)
    findings = [*check_convergence(found), *_at_bounds(task, found.solved.theta[0], values, runs)]
    clusters = int(runs.cluster.max()) + 1
    if clusters < 24:
        text = f"{clusters} runs for 6 parameters (below 24): the break may be noise; compare with a law without one"
        findings.append(Finding("few runs", clusters, 24, text))
    if few := too_few_clusters(runs.cluster):
        findings, resamples = [*findings, *few], 0
    draws, unconverged = {}, 0
    if resamples:
        drawn = bootstrap(
            task, np.log(runs.loss)[None], runs.cluster, found.solved.theta, resamples, seed, delta
        )
        draws, unconverged = {name: value[0] for name, value in drawn.values.items()}, drawn.unconverged
        spread = {name: value for name, value in draws.items() if name != "a"}  # here a is no exponent
        findings += check_draws(spread, unconverged, clusters, float(runs.loss.min()))
        findings += _loose_break(draws)
    outside = _held_out(runs, delta)
    findings += check_extrapolation(outside, POWER_LAW)
    facts = {
        "axis": axis, "delta": delta, "resamples": resamples, "unconverged": unconverged, "seed": seed,
        "starts": found.tried, "starts_agreed": int(found.agreed[0]),
        "residual_sd": residual_spread(runs, law.broken(**values, x=runs.samples)),
    }  # fmt: skip
    return make_result(
        "bnsl", runs, values, {}, float(found.solved.objective[0]), findings, draws,
        extrapolation_json(outside, POWER_LAW), {"x": float(runs.samples.max())}, facts,
    )  # fmt: skip


def _at_bounds(task: Problem, theta: np.ndarray, values: dict[str, float], runs: Runs) -> list[Finding]:
    """Coefficients at the end of the range that was searched: another form fits as well."""
    said = []
    low, high = task.bounds
    margin = 0.01 * (high - low)
    for place, name in ((2, "c0"), (3, "c1")):
        if theta[place] >= high[place] - margin[place] or theta[place] <= low[place] + 1e-3 * margin[place]:
            ends = f"{low[place]:g} to {high[place]:g}"
            text = f"{name} = {values[name]:.3g} lies at the end of the range searched ({ends}): not identified"
            zero = name == "c0" and theta[place] < 1  # flat before the break: a law, if an odd one
            said.append(Finding("exponent at bound", values[name], low[place], text, refuses=not zero))
    for place, name, what in ((4, "d1", "place"), (5, "f1", "width")):
        if not low[place] + margin[place] < theta[place] < high[place] - margin[place]:
            text = f"{name} = {values[name]:.3g}: the break's {what} is at the end of what was searched: not identified"
            said.append(Finding("unidentified break", values[name], float(np.exp(high[place] - low[place])), text))
    least = float(runs.loss.min())
    if values["a"] <= 1e-3 * least:
        text = f"a = {values['a']:.3g} is zero: the irreducible loss is not identified"
        said.append(Finding("E at zero", values["a"], 1e-3 * least, text))
    return said


def _loose_break(draws: dict[str, np.ndarray]) -> list[Finding]:
    low, high = interval(draws["d1"], LEVEL)
    if high / low <= 100:
        return []
    text = f"the break lies between {low:.3g} and {high:.3g} (95%): it is not identified"
    return [Finding("unidentified break", high / low, 100, text)]


def _held_out(runs: Runs, delta: float) -> Extrapolation | None:
    """The largest runs, whole ones, from the others; beside it a power law of the axis."""
    largest = held_out_runs(runs)
    fitted, target = runs.take(~largest), runs.take(largest)
    if not largest.any() or len(np.unique(fitted.samples)) < MIN_RUNS:
        return None
    values, _ = fit_one(broken_problem(fitted), fitted, delta, STARTS)
    slope, height = power_law(fitted.samples, fitted.loss)
    naive = np.exp(height + slope * np.log(target.samples))
    return errors_on(fitted, target, law.broken(**values, x=target.samples), naive, "samples")
