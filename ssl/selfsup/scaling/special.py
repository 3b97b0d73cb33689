"""The other forms as results: repeated data, a broken power law of one axis, isoFLOP optima alone."""

from typing import Any

import numpy as np

from selfsup.scaling import law
from selfsup.scaling.analyse import LEVEL, about, analyse, profiles_json, residual_spread, rows_json
from selfsup.scaling.bootstrap import bootstrap, interval, intervals, resample_weights
from selfsup.scaling.broken import MIN_RUNS, broken_problem
from selfsup.scaling.check import check_extrapolation
from selfsup.scaling.check_isoflop import check_isoflop
from selfsup.scaling.design import check_design
from selfsup.scaling.extrapolate import Extrapolation
from selfsup.scaling.finding import Finding, split
from selfsup.scaling.fit import Fitted, Problem, exponents, fit, inner_law
from selfsup.scaling.isoflop import isoflop, power_law
from selfsup.scaling.profile import valley
from selfsup.scaling.repeats import LIMITS, fit_repeats, repeats_problem
from selfsup.scaling.result import Result, findings_json
from selfsup.scaling.solve import DELTA
from selfsup.scaling.table import Runs

ONE_EPOCH_RUNS = 10
"""Runs of one epoch that a base law wants, where none is given."""


def _fit_one(task: Problem, runs: Runs, delta: float, keep: int) -> tuple[dict[str, float], Fitted]:
    found = fit(task, np.log(runs.loss)[None], np.ones((1, len(runs))), delta, keep=keep)
    values = {name: float(value[0]) for name, value in task.coefficients(found.solved.theta).items()}
    return values, found


def _errors(fitted: Runs, target: Runs, predicted: np.ndarray, naive: np.ndarray, axis: str) -> Extrapolation:
    error, baseline = np.abs(predicted / target.loss - 1), np.abs(naive / target.loss - 1)
    reach = float(getattr(target, axis).max() / getattr(fitted, axis).max())
    return Extrapolation(
        len(fitted), len(target), float(fitted.flops.max()), reach, float(error.mean()), float(error.max()),
        float(baseline.mean()), float(baseline.max()),
    )  # fmt: skip


def _held_out(found: Extrapolation | None, baseline: str) -> dict[str, Any] | None:
    return None if found is None else {**found._asdict(), "error_of": "loss", "baseline": baseline}


def _convergence(found: Fitted) -> list[Finding]:
    if bool(found.solved.converged[0]):
        return []
    text = "the optimiser did not converge: its coefficients are a stop, not an optimum"
    return [Finding("not converged", float(found.solved.steps[0]), 0, text, refuses=True)]


def analyse_repeats(
    runs: Runs, base: Result | None, resamples: int = 1000, seed: int = 0, delta: float = DELTA
) -> Result:
    """R_D and R_N over a base law: a chinchilla fit that is given, or of the runs of one epoch.

    Raises ValueError without a column of unique samples, without repeats, or with too few runs for a base law.
    """
    if runs.unique is None:
        raise ValueError("--form repeats: expected --unique COL, the number of distinct samples of each run")
    fresh = runs.samples <= 1.001 * runs.unique
    if fresh.all():
        raise ValueError(
            "--form repeats: no run reads a sample twice (samples <= unique in every row); take --form chinchilla"
        )
    findings = check_design(runs, "repeats")
    if base is None:
        if fresh.sum() < ONE_EPOCH_RUNS:
            raise ValueError(
                f"--form repeats: {int(fresh.sum())} runs of one epoch are too few for a base law "
                f"(at least {ONE_EPOCH_RUNS}); "
                "give one with --base FIT.json"
            )
        base = analyse(runs.take(fresh), "chinchilla", resamples, seed, delta)
    elif base.form not in ("chinchilla", "tied"):
        raise ValueError(f"--base: expected a fit of form chinchilla or tied, got {base.form}")
    for one in base.refused:
        text = f"of the base law: {one['text']}"
        findings.append(Finding(f"base law: {one['check']}", one["value"], one["limit"], text, refuses=True))
    inner = {name: float(value) for name, value in inner_law(base.form, base.coefficients).items()}
    if resamples and not base.draws:
        text = "the base law was fitted without resamples: its own uncertainty is in no interval"
        findings.append(Finding("fixed base law", 0, resamples, text))
    task = repeats_problem(runs, inner)
    log_loss, bounded, curves = np.log(runs.loss), {}, {}
    found, profiles = fit_repeats(task, log_loss, delta)
    values = {name: float(value[0]) for name, value in task.coefficients(found.solved.theta).items()}
    findings += _convergence(found)
    for name, curve in zip(("R_D", "R_N"), profiles):
        low, high = (float(np.exp(end)) for end in valley(curve, float(found.solved.objective[0])))
        curves[name] = {"value": np.exp(curve.value).tolist(), "objective": curve.objective.tolist()}
        bounded[name] = (low, high)
        spread = min(high, LIMITS[1]) / low
        if spread > 10:
            text = (
                f"{name} = {values[name]:.3g} is a point in a valley: from {low:.3g} to "
                f"{high:.3g} the objective is within 2% of "
                "its least; use the predictions, not the number"
            )
            findings.append(Finding(f"unidentified {name}", spread, 10, text))
    draws, unconverged = {}, 0
    if resamples:
        drawn = bootstrap(task, log_loss[None], runs.cluster, found.solved.theta, resamples, seed, delta)
        draws, unconverged = {name: value[0] for name, value in drawn.values.items()}, drawn.unconverged
    outside = _repeats_held_out(runs, inner, delta)
    findings += check_extrapolation(outside)
    warnings, refused = split(findings)
    a, b = (float(value) for value in exponents("chinchilla", inner))
    last = int(runs.flops.argmax())
    at = {name: float(getattr(runs, name)[last]) for name in ("params", "samples", "unique")}
    loss = float(law.repeats(inner, values["R_D"], values["R_N"], **{k: np.array(v) for k, v in at.items()}))
    drawn_all = {**_base_draws(base, inner, resamples), **draws} if draws else {}
    known = {name: values for name, values in base.intervals.items() if name in law.CHINCHILLA}
    return Result(
        "repeats", {**inner, **values}, {"a": a, "b": b}, {**known, **_open(intervals(draws, LEVEL))} if draws else {},
        float(found.solved.objective[0]),
        _held_out(outside, "the base law, repeats counted as fresh data"),
        findings_json(warnings), findings_json(refused),
        {**about(runs), "delta": delta, "resamples": resamples, "unconverged": unconverged, "seed": seed,
         "residual_sd": residual_spread(runs, np.exp(task.model(found.solved.theta)[0][0])),
         "within_2_percent": {name: list(ends) for name, ends in bounded.items()}, "profiles": curves},
        {**at, "loss": loss}, {name: value.tolist() for name, value in drawn_all.items()},
        rows=rows_json(runs),
    )  # fmt: skip


def _base_draws(base: Result, inner: dict[str, float], resamples: int) -> dict[str, np.ndarray]:
    """The base law's own draws beside those of the half-lives; they were drawn apart, so no pair is correlated."""
    source = base.values()
    count = len(source["E"])
    return {name: source[name][np.arange(resamples) % count] for name in inner}


def _open(found: dict[str, list[float]]) -> dict[str, list[float | None]]:
    """An end at the limit of the search is no bound."""
    return {
        name: [low if low > 1.01 * LIMITS[0] else 0.0, high if high < 0.99 * LIMITS[1] else None, level]
        for name, (low, high, level) in found.items()
    }


def _repeats_held_out(runs: Runs, base: dict[str, float], delta: float) -> Extrapolation | None:
    largest = runs.flops > np.quantile(runs.flops, 0.8)
    if not largest.any() or (~largest).sum() < 3:
        return None
    fitted, target = runs.take(~largest), runs.take(largest)
    values, _ = _fit_one(repeats_problem(fitted, base), fitted, delta, keep=12)
    predicted = law.repeats(base, values["R_D"], values["R_N"], target.params, target.samples, target.unique)
    naive = law.chinchilla(**base, params=target.params, samples=target.samples)
    return _errors(fitted, target, predicted, naive, "flops")


def analyse_broken(
    runs: Runs, axis: str, resamples: int = 1000, seed: int = 0, delta: float = DELTA
) -> Result:
    """A broken power law of the axis, which stands in `runs.samples`. Raises ValueError below 12 runs."""
    task = broken_problem(runs)
    values, found = _fit_one(task, runs, delta, keep=32)
    findings = _convergence(found)
    runs_count = int(runs.cluster.max()) + 1
    if runs_count < 24:
        text = f"{runs_count} runs for 6 parameters (below 24): the break may be noise; compare with a law without one"
        findings.append(Finding("few runs", runs_count, 24, text))
    draws, unconverged = {}, 0
    if resamples:
        drawn = bootstrap(
            task, np.log(runs.loss)[None], runs.cluster, found.solved.theta, resamples, seed, delta
        )
        draws, unconverged = {name: value[0] for name, value in drawn.values.items()}, drawn.unconverged
        low, high = interval(draws["d1"], LEVEL)
        if high / low > 100:
            text = f"the break lies between {low:.3g} and {high:.3g} (95%): it is not identified"
            findings.append(Finding("unidentified break", high / low, 100, text))
    outside = None
    largest = runs.samples > np.quantile(runs.samples, 0.8)
    fitted, target = runs.take(~largest), runs.take(largest)
    if largest.any() and len(np.unique(fitted.samples)) >= MIN_RUNS:
        less, _ = _fit_one(broken_problem(fitted), fitted, delta, keep=32)
        slope, height = power_law(fitted.samples, fitted.loss)
        naive = np.exp(height + slope * np.log(target.samples))
        outside = _errors(fitted, target, law.broken(**less, x=target.samples), naive, "samples")
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
        _held_out(outside, "a power law of the axis, least squares"),
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
    if failed > 0.01 * resamples:
        text = (
            f"{failed} of {resamples} resamples have fewer than two minima and are left out of the intervals"
        )
        findings.append(Finding("resamples", failed / resamples, 0.01, text))
    if arrays and np.ptp(np.quantile(arrays["a"], [0.025, 0.975])) > 0.4:
        low, high = interval(arrays["a"], LEVEL)
        text = f"a is between {low:.2f} and {high:.2f} (95%; 0.4 or less wanted)"
        findings.append(Finding("loose exponent", high - low, 0.4, text, refuses=True))
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
