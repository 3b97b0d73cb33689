"""From runs to a result: the fit, intervals, the held-out error and every check, for the laws of N and D."""

from typing import Any

import numpy as np

from selfsup.scaling import law
from selfsup.scaling.bootstrap import bootstrap, intervals, too_few_clusters
from selfsup.scaling.check import (
    check_counting,
    check_draws,
    check_extrapolation,
    check_fit,
)
from selfsup.scaling.check_isoflop import check_isoflop
from selfsup.scaling.design import check_design
from selfsup.scaling.extrapolate import BASELINE, Extrapolation, extrapolation
from selfsup.scaling.finding import split
from selfsup.scaling.fit import Problem, exponents, fit_runs, predict, problem
from selfsup.scaling.isoflop import Isoflop, isoflop
from selfsup.scaling.optimum import growth_of_size
from selfsup.scaling.profile import profile
from selfsup.scaling.result import Result, findings_json
from selfsup.scaling.solve import DELTA
from selfsup.scaling.table import Runs

LEVEL = 0.95


def analyse(runs: Runs, form: str, resamples: int = 1000, seed: int = 0, delta: float = DELTA) -> Result:
    """The law `form` (chinchilla, tied, kaplan) on these runs.

    Raises ValueError where there are fewer rows than parameters.
    """
    values, found = fit_runs(form, runs, delta)
    task = problem(form, runs)
    findings = [*check_design(runs, form), *check_fit(form, runs, task, values, found, delta)]
    if few := too_few_clusters(runs.cluster):
        findings, resamples = [*findings, *few], 0
    draws, unconverged = _draws(form, task, runs, found.solved.theta, resamples, seed, delta)
    if draws:
        findings += check_draws(draws, unconverged, int(runs.cluster.max()) + 1, float(runs.loss.min()))
    outside = extrapolation(form, runs, delta=delta)
    findings += check_extrapolation(outside)
    a, b = (float(value) for value in exponents(form, values))
    curves = isoflop(runs)
    growth = growth_of_size(form, values, float(runs.flops.min()), float(runs.flops.max()), runs.cost)
    findings += check_isoflop(curves, growth, runs, own=False)
    findings += check_counting(form, runs, a)
    warnings, refused = split(findings)
    largest = int(runs.flops.argmax())
    at = {"params": float(runs.params[largest]), "samples": float(runs.samples[largest])}
    anchor = {
        **at,
        "loss": float(predict(form, values, **{key: np.array(value) for key, value in at.items()})),
    }
    return Result(
        form, values, {"a": a, "b": b}, intervals(draws, LEVEL) if draws else {}, float(found.solved.objective[0]),
        extrapolation_json(outside), findings_json(warnings), findings_json(refused),
        {
            **about(runs), "delta": delta, "resamples": resamples, "unconverged": unconverged, "seed": seed,
            "starts": found.tried, "starts_agreed": int(found.agreed[0]), "steps": int(found.solved.steps[0]),
            "profiles": profiles_of(form, task, runs, found.solved.theta, delta),
            "residual_sd": residual_spread(runs, predict(form, values, runs.params, runs.samples)),
        },
        anchor, {name: value.tolist() for name, value in draws.items() if name not in ("a", "b")}, profiles_json(curves),
        rows_json(runs),
    )  # fmt: skip


def profiles_of(
    form: str, task: Problem, runs: Runs, theta: np.ndarray, delta: float
) -> dict[str, dict[str, list[float]]]:
    """The least objective along E and the exponents, for the laws that have them."""
    if form == "kaplan":
        return {}
    least, curves = float(runs.loss.min()), {}
    near = np.linspace(0.8, 1.2, 13)
    E = np.concatenate([np.linspace(0.0, least, 13), theta[0, 0] * near])
    grids = {"E": (0, E[E <= least])}
    for name, which in (("alpha", 3), ("beta", 4))[: 1 if form == "tied" else 2]:
        around = theta[0, which] * np.concatenate([np.geomspace(0.25, 4.0, 13), near])
        grids[name] = (which, np.clip(around, *law.EXPONENT_RANGE))
    weights = runs.weights[None]
    others = np.concatenate([theta, task.begin(np.log(runs.loss)[None], weights, 2)[0]])
    for name, (which, values) in grids.items():
        values = np.unique(values)
        curve = profile(task, np.log(runs.loss), which, values, others, delta, weights)
        curves[name] = {"value": values.tolist(), "objective": curve.objective.tolist()}
    return curves


def residual_spread(runs: Runs, predicted: np.ndarray) -> float:
    """Robust standard deviation (1.4826 times the median size) of the residuals of log loss."""
    return 1.4826 * float(np.median(np.abs(np.log(runs.loss) - np.log(predicted))))


def _draws(
    form: str, task: Problem, runs: Runs, theta: np.ndarray, resamples: int, seed: int, delta: float
) -> tuple[dict[str, np.ndarray], int]:
    """Coefficients and exponents of each resample, and how many fits did not converge. None with 0 resamples."""
    if not resamples:
        return {}, 0
    found = bootstrap(task, np.log(runs.loss)[None], runs.cluster, theta, resamples, seed, delta, runs.weights)
    draws = {name: value[0] for name, value in found.values.items()}
    a, b = exponents(form, draws)
    return {**draws, "a": a, "b": b}, found.unconverged


def about(runs: Runs) -> dict[str, Any]:
    """The rows that were used, those that were not and why, and their ranges."""
    ranges = {
        name: [float(getattr(runs, name).min()), float(getattr(runs, name).max())]
        for name in ("params", "samples", "flops", "loss")
    }
    return {
        "rows_read": runs.read, "rows_used": len(runs), "dropped": runs.dropped, "runs": int(runs.cluster.max()) + 1,
        "clustered": runs.clustered, "cost": list(runs.cost), "ranges": ranges,
        "weights": None if runs.sigma is None else [float(runs.weights.min()), float(runs.weights.max())],
    }  # fmt: skip


def extrapolation_json(found: Extrapolation | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {**found._asdict(), "error_of": "loss", "baseline": BASELINE}


def profiles_json(found: Isoflop) -> list[dict[str, Any]]:
    """The isoFLOP curves, for pictures."""
    rows = []
    for curve in found.profiles:
        row = curve._asdict()
        row.update({name: row[name].tolist() for name in ("params", "loss", "samples")})
        rows.append(row)
    return rows


def rows_json(runs: Runs) -> dict[str, list[float]]:
    """The rows that were fitted, for pictures."""
    names = ("params", "samples", "flops", "loss") + (("unique",) if runs.unique is not None else ())
    return {name: getattr(runs, name).tolist() for name in names}
