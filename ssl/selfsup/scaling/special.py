"""Other forms as results: a broken power law of one axis, isoFLOP optima alone."""

from typing import Any

import numpy as np

from selfsup.scaling import law
from selfsup.scaling.analyse import LEVEL, about, profiles_json, residual_spread, rows_json
from selfsup.scaling.bootstrap import bootstrap, interval, intervals, resample_weights, too_few_clusters
from selfsup.scaling.broken import MIN_RUNS, broken_problem
from selfsup.scaling.check import check_convergence, check_draws, check_extrapolation
from selfsup.scaling.check_isoflop import check_isoflop
from selfsup.scaling.design import check_design
from selfsup.scaling.finding import Finding, split
from selfsup.scaling.extrapolate import held_out_runs
from selfsup.scaling.hold_out import errors_on, fit_one, held_out_json
from selfsup.scaling.isoflop import isoflop, power_law
from selfsup.scaling.result import Result, findings_json
from selfsup.scaling.solve import DELTA
from selfsup.scaling.table import Runs


def analyse_broken(
    runs: Runs, axis: str, resamples: int = 1000, seed: int = 0, delta: float = DELTA
) -> Result:
    """A broken power law of the axis, which stands in `runs.samples`. Raises ValueError below 12 runs."""
    task = broken_problem(runs)
    values, found = fit_one(task, runs, delta, keep=32)
    findings = check_convergence(found)
    runs_count = int(runs.cluster.max()) + 1
    if runs_count < 24:
        text = f"{runs_count} runs for 6 parameters (below 24): the break may be noise; compare with a law without one"
        findings.append(Finding("few runs", runs_count, 24, text))
    if few := too_few_clusters(runs.cluster):
        findings, resamples = [*findings, *few], 0
    draws, unconverged = {}, 0
    if resamples:
        drawn = bootstrap(
            task, np.log(runs.loss)[None], runs.cluster, found.solved.theta, resamples, seed, delta
        )
        draws, unconverged = {name: value[0] for name, value in drawn.values.items()}, drawn.unconverged
        findings += check_draws(draws, unconverged, runs_count, float(runs.loss.min()))
        low, high = interval(draws["d1"], LEVEL)
        if high / low > 100:
            text = f"the break lies between {low:.3g} and {high:.3g} (95%): it is not identified"
            findings.append(Finding("unidentified break", high / low, 100, text))
    outside = None
    largest = held_out_runs(runs)
    fitted, target = runs.take(~largest), runs.take(largest)
    if largest.any() and len(np.unique(fitted.samples)) >= MIN_RUNS:
        less, _ = fit_one(broken_problem(fitted), fitted, delta, keep=32)
        slope, height = power_law(fitted.samples, fitted.loss)
        naive = np.exp(height + slope * np.log(target.samples))
        outside = errors_on(fitted, target, law.broken(**less, x=target.samples), naive, "samples")
    findings += check_extrapolation(outside)
    warnings, refused = split(findings)
    x = float(runs.samples.max())
    facts = {
        **about(runs),
        "axis": axis,
        "delta": delta,
        "resamples": resamples,
        "unconverged": unconverged,
        "seed": seed,
        "residual_sd": residual_spread(runs, law.broken(**values, x=runs.samples)),
    }
    return Result(
        "bnsl", values, {}, intervals(draws, LEVEL) if draws else {}, float(found.solved.objective[0]),
        held_out_json(outside, "a power law of the axis, least squares"),
        findings_json(warnings), findings_json(refused), facts,
        {"x": x, "loss": float(law.broken(**values, x=x))}, {name: value.tolist() for name, value in draws.items()},
        rows=rows_json(runs),
    )  # fmt: skip


def analyse_isoflop(runs: Runs, resamples: int = 1000, seed: int = 0) -> Result:
    """N* = N0 C^a, D* = D0 C^b and the loss there L0 C^c (no irreducible part), by parabolas.

    Raises ValueError where fewer than two budgets have an optimum.
    """
    curves = isoflop(runs)
    values = _optima(curves)
    if not values:
        raise ValueError(
            f"--form isoflop: {len(curves.profiles)} budgets have at least 4 sizes, two with a "
            "minimum are needed; rows of one "
            "budget are those whose --budget agrees, or whose FLOPs lie within 10% of each other"
        )
    findings = [f for f in check_design(runs, "chinchilla") if f.check not in ("few runs", "narrow ratio")]
    findings += check_isoflop(curves, None, runs, own=True)
    if few := too_few_clusters(runs.cluster):
        findings, resamples = [*findings, *few], 0
    draws: dict[str, list[float]] = {}
    failed = 0
    for weights in (
        resample_weights(runs.cluster, resamples, np.random.default_rng(seed)) if resamples else ()
    ):
        drawn = _optima(isoflop(runs, weights))
        failed += not drawn
        for name, value in drawn.items():
            draws.setdefault(name, []).append(value)
    arrays = {name: np.array(value) for name, value in draws.items()}
    if failed:
        text = f"{failed} of {resamples} resamples have fewer than two minima and are in no interval"
        findings.append(Finding("resamples", failed / resamples, 0, text, refuses=failed > 0.1 * resamples))
    if arrays:
        findings += check_draws(arrays, 0, int(runs.cluster.max()) + 1, float(runs.loss.min()))
    outside = _isoflop_held_out(runs)
    warnings, refused = split(findings)
    largest = curves.profiles[-1].budget
    shown = {
        "akima_a": float(curves.akima[1]),
        "akima_b": float(curves.akima[3]),
        "budgets_left_out": curves.skipped,
    }
    return Result(
        "isoflop", values, {"a": values["a"], "b": values["b"]}, intervals(arrays, LEVEL) if arrays else {},
        None, outside, findings_json(warnings), findings_json(refused),
        {**about(runs), "resamples": resamples, "unconverged": failed, "seed": seed, **shown},
        {"flops": largest, "loss": float(values["L0"] * largest ** values["c"])}, draws,
        profiles_json(curves), rows_json(runs),
    )  # fmt: skip


def _optima(curves: Any) -> dict[str, float]:
    fine = [p for p in curves.profiles if np.isfinite(p.parabola) and p.parabola_loss > 0]
    if len(fine) < 2:
        return {}
    log_n0, a, log_d0, b = (float(value) for value in curves.parabola)
    c, log_loss = power_law(np.array([p.budget for p in fine]), np.array([p.parabola_loss for p in fine]))
    return {
        "N0": float(np.exp(log_n0)),
        "a": a,
        "D0": float(np.exp(log_d0)),
        "b": b,
        "L0": float(np.exp(log_loss)),
        "c": c,
    }


def _isoflop_held_out(runs: Runs) -> dict[str, Any] | None:
    """The optimum of the largest budget from the smaller ones; beside it N growing as the root of C."""
    profiles = [p for p in isoflop(runs).profiles if np.isfinite(p.parabola)]
    if len(profiles) < 3:
        return None
    *fewer, last = profiles
    budgets = np.array([p.budget for p in fewer])
    a, height = power_law(budgets, np.array([p.parabola for p in fewer]))
    predicted = np.exp(height + a * np.log(last.budget))
    naive = fewer[-1].parabola * np.sqrt(last.budget / fewer[-1].budget)
    error, baseline = (abs(float(value) / last.parabola - 1) for value in (predicted, naive))
    return {
        "fitted": len(fewer), "held_out": 1, "fitted_flops": fewer[-1].budget, "reach": last.budget / fewer[-1].budget,
        "mean_error": error, "max_error": error, "baseline_mean_error": baseline, "baseline_max_error": baseline,
        "error_of": "the optimal N of the largest budget", "baseline": "N grows as the root of C",
    }  # fmt: skip
