"""The form `repeats` as a result: half-lives and a base law, fitted together or over a given one."""

from typing import Any

import numpy as np

from selfsup.scaling import law
from selfsup.scaling.assemble import LEVEL, largest_run, make_result, refuse_scales, residual_spread
from selfsup.scaling.bootstrap import bootstrap, intervals, resample_weights, too_few_clusters
from selfsup.scaling.check import check_convergence, check_draws, check_extrapolation, check_repeats
from selfsup.scaling.design import check_design
from selfsup.scaling.extrapolate import Extrapolation, errors_on, extrapolation_json, held_out_runs
from selfsup.scaling.finding import Finding
from selfsup.scaling.fit import Fitted, Problem, exponents, fit_one, inner_law
from selfsup.scaling.profile import Profile, valley
from selfsup.scaling.repeats import (
    FRESH,
    LIMITS,
    base_laws,
    draws_over_base,
    fit_jointly,
    fit_repeats,
    repeats_problem,
)
from selfsup.scaling.result import Result
from selfsup.scaling.solve import DELTA
from selfsup.scaling.table import Runs

ONE_EPOCH_RUNS = 10
"""Runs of one epoch that a base law wants, where none is given."""
REPEATING = 3
"""Rows that repeat data, among those fitted, that half-lives want: with none R_D is anything, and foretells nothing."""
NAIVE = "the base law, repeats counted as fresh data"
NOTHING_HELD_OUT = f"without the largest runs too few are left to fit, or fewer than {REPEATING} that repeat data"


def analyse_repeats(
    runs: Runs, base: Result | None, resamples: int = 1000, seed: int = 0, delta: float = DELTA
) -> Result:
    """R_D and R_N over a base law: a chinchilla fit that is given, or fitted with them on all runs.

    Raises ValueError without a column of unique samples, without repeats, or with too few runs for a base law.
    """
    refuse_scales(runs)
    _refuse(runs, base)
    findings = check_design(runs, "repeats", None if base is None else len(law.REPEATS))
    if few := too_few_clusters(runs.cluster):
        findings, resamples = [*findings, *few], 0
    task, found, curves, values = _fitted(runs, base, delta)
    predicted = np.asarray(_repeats_at(values, runs))
    if base is None:
        findings += check_repeats(runs, task, values, found, predicted)
    else:
        findings += [*_of_base(base, resamples), *check_convergence(found)]
    shown, bounded, said = _valleys(values, float(found.solved.objective[0]), curves)
    findings += said
    draws, unconverged = {}, 0
    if resamples:
        draws, unconverged = _repeats_draws(runs, task, found, base, values, resamples, seed, delta)
        findings += check_draws(draws, unconverged, int(runs.cluster.max()) + 1, float(runs.loss.min()))
    outside = _repeats_held_out(runs, base, delta)
    findings += check_extrapolation(outside, NAIVE, NOTHING_HELD_OUT)
    a, b = (float(value) for value in exponents("chinchilla", values))
    held = base is not None and not base.draws  # a base law that does not vary has no interval
    moving = {name: drawn for name, drawn in draws.items() if name in law.REPEATS or not held}
    facts = {
        "delta": delta, "resamples": resamples, "unconverged": unconverged, "seed": seed,
        "residual_sd": residual_spread(runs, predicted), "within_2_percent": bounded, "profiles": shown,
    }  # fmt: skip
    return make_result(
        "repeats", runs, values, {"a": a, "b": b}, float(found.solved.objective[0]), findings, draws,
        extrapolation_json(outside, NAIVE),
        largest_run(runs, ("params", "samples", "unique")), facts, ends=_open(intervals(moving, LEVEL)),
    )  # fmt: skip


def _refuse(runs: Runs, base: Result | None) -> None:
    """Raises ValueError for a table or a base law that no half-life can be fitted with."""
    if runs.unique is None:
        raise ValueError("--form repeats: expected --unique COL, the number of distinct samples of each run")
    fresh = runs.samples <= FRESH * runs.unique
    if fresh.all():
        raise ValueError(
            "--form repeats: no run reads a sample twice (samples <= unique in every row); take --form chinchilla"
        )
    if base is None and fresh.sum() < ONE_EPOCH_RUNS:
        raise ValueError(
            f"--form repeats: {int(fresh.sum())} runs of one epoch are too few for a base law "
            f"(at least {ONE_EPOCH_RUNS}); give one with --base FIT.json"
        )
    if base is not None and base.form not in ("chinchilla", "tied"):
        raise ValueError(f"--base: expected a fit of form chinchilla or tied, got {base.form}")


def _fitted(
    runs: Runs, base: Result | None, delta: float
) -> tuple[Problem, Fitted, tuple[Profile, Profile], dict[str, float]]:
    """The problem, its fit, the profiles of both half-lives, and all seven coefficients."""
    if base is None:
        task, found, curves = fit_jointly(runs, delta)
        inner = {}
    else:
        inner = {name: float(value) for name, value in inner_law(base.form, base.coefficients).items()}
        task = repeats_problem(runs, inner, delta)
        found, curves = fit_repeats(task, np.log(runs.loss), delta)
    fitted = {name: float(value[0]) for name, value in task.coefficients(found.solved.theta).items()}
    return task, found, curves, inner | fitted


def _of_base(base: Result, resamples: int) -> list[Finding]:
    """What the given base law was doubted or refused for is this one's too."""
    said = []
    for refuses, several in ((False, base.warnings), (True, base.refused)):
        for one in several:
            text = f"of the base law: {one['text']}"
            said.append(Finding(f"base law: {one['check']}", one["value"], one["limit"], text, refuses))
    if resamples and not base.draws:
        text = "the base law was fitted without resamples: its own uncertainty is in no interval"
        said.append(Finding("fixed base law", 0, resamples, text))
    return said


def _repeats_at(values: dict[str, float], runs: Runs) -> np.ndarray:
    base = {name: values[name] for name in law.CHINCHILLA}
    assert runs.unique is not None
    return law.repeats(base, values["R_D"], values["R_N"], runs.params, runs.samples, runs.unique)


def _valleys(
    values: dict[str, float], objective: float, profiles: tuple[Profile, Profile]
) -> tuple[dict[str, Any], dict[str, list[float]], list[Finding]]:
    """The profiles for pictures, where the objective is within 2% of its least, and what is not identified."""
    curves, bounded, said = {}, {}, []
    for name, curve in zip(law.REPEATS, profiles):
        low, high = (float(np.exp(end)) for end in valley(curve, objective))
        curves[name] = {"value": np.exp(curve.value).tolist(), "objective": curve.objective.tolist()}
        bounded[name] = [low, high]
        spread = min(high, LIMITS[1]) / low
        if spread > 10:
            text = (
                f"{name} = {values[name]:.3g} is a point in a valley: from {low:.3g} to "
                f"{high:.3g} the objective is within 2% of "
                "its least; use the predictions, not the number"
            )
            said.append(Finding(f"unidentified {name}", spread, 10, text))
    return curves, bounded, said


def _repeats_draws(
    runs: Runs, task: Problem, found: Fitted, base: Result | None, values: dict[str, float], resamples: int,
    seed: int, delta: float,
) -> tuple[dict[str, np.ndarray], int]:  # fmt: skip
    """All seven coefficients and the exponents of each resample: refitted together, or over the given base's draws."""
    if base is None:
        again = bootstrap(
            task, np.log(runs.loss)[None], runs.cluster, found.solved.theta, resamples, seed, delta
        )
        draws, unconverged = {name: value[0] for name, value in again.values.items()}, again.unconverged
    else:
        generator = np.random.default_rng(seed)
        weights = resample_weights(runs.cluster, resamples, generator)
        source = inner_law(base.form, base.values())
        picked = generator.integers(len(source["E"]), size=resamples)
        laws = {name: value[picked] for name, value in source.items()}
        draws, unconverged = draws_over_base(runs, laws, values, weights, delta)
    a, b = exponents("chinchilla", draws)
    return {**draws, "a": a, "b": b}, unconverged


def _open(found: dict[str, Any]) -> dict[str, list[float | None]]:
    """An end of a half-life at the limit of the search is no bound."""
    for name in law.REPEATS:
        if name in found:
            low, high, level = found[name]
            found[name] = [low if low > 1.01 * LIMITS[0] else 0.0, high if high < 0.99 * LIMITS[1] else None, level]
    return found


def _repeats_held_out(runs: Runs, base: Result | None, delta: float) -> Extrapolation | None:
    """Base law and half-lives (or half-lives over a given base) without the largest runs, which they then predict.

    None where too few runs are left to fit, or where the largest runs are those that repeat data.
    """
    largest = held_out_runs(runs)
    fitted, target = runs.take(~largest), runs.take(largest)
    assert fitted.unique is not None
    if len(fitted) < (8 if base is None else 3) or (fitted.samples > FRESH * fitted.unique).sum() < REPEATING:
        return None
    if base is None:
        if not base_laws(fitted, delta):
            return None
        task, found, _ = fit_jointly(fitted, delta)
        values = {name: float(value[0]) for name, value in task.coefficients(found.solved.theta).items()}
    else:
        values = {name: float(value) for name, value in inner_law(base.form, base.coefficients).items()}
        values |= fit_one(repeats_problem(fitted, values, delta), fitted, delta, keep=12)[0]
    inner = {name: values[name] for name in law.CHINCHILLA}
    naive = law.chinchilla(**inner, params=target.params, samples=target.samples)
    return errors_on(fitted, target, _repeats_at(values, target), naive)
