"""From runs to a result: the fit, intervals, the held-out error and every check, for the laws of N and D."""

import numpy as np

from selfsup.scaling import law
from selfsup.scaling.assemble import isoflop_facts, largest_run, make_result, refuse_scales, residual_spread
from selfsup.scaling.bootstrap import bootstrap, too_few_clusters
from selfsup.scaling.check import (
    check_counting,
    check_draws,
    check_extrapolation,
    check_fit,
)
from selfsup.scaling.check_isoflop import check_isoflop
from selfsup.scaling.design import check_design
from selfsup.scaling.extrapolate import extrapolation, extrapolation_json
from selfsup.scaling.fit import Problem, exponents, fit_runs, predict, problem
from selfsup.scaling.isoflop import isoflop
from selfsup.scaling.optimum import growth_of_size
from selfsup.scaling.profile import profile
from selfsup.scaling.result import Result
from selfsup.scaling.solve import DELTA
from selfsup.scaling.table import Runs


def analyse(runs: Runs, form: str, resamples: int = 1000, seed: int = 0, delta: float = DELTA) -> Result:
    """The law `form` (chinchilla, tied, kaplan) on these runs.

    Raises ValueError where there are fewer rows than parameters, and where the fit has no finite coefficients.
    """
    refuse_scales(runs)
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
    findings += check_counting(form, runs, a, delta)
    facts = {
        "delta": delta, "resamples": resamples, "unconverged": unconverged, "seed": seed,
        "starts": found.tried, "starts_agreed": int(found.agreed[0]), "steps": int(found.solved.steps[0]),
        "profiles": profiles_of(form, task, runs, found.solved.theta, delta),
        "residual_sd": residual_spread(runs, predict(form, values, runs.params, runs.samples)),
        "isoflop": isoflop_facts(curves),
    }  # fmt: skip
    return make_result(
        form, runs, values, {"a": a, "b": b}, float(found.solved.objective[0]), findings, draws,
        extrapolation_json(outside), largest_run(runs), facts, curves=curves,
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
