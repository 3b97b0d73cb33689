"""The form `isoflop` as a result: optimal sizes of the budgets, and the power laws through them."""

from typing import Any

import numpy as np

from selfsup.scaling import law
from selfsup.scaling.assemble import isoflop_facts, make_result, refuse_scales
from selfsup.scaling.bootstrap import too_few_clusters
from selfsup.scaling.check import check_draws, check_extrapolation
from selfsup.scaling.check_isoflop import check_isoflop, check_own
from selfsup.scaling.design import check_design
from selfsup.scaling.extrapolate import Extrapolation, condition_number
from selfsup.scaling.finding import Finding
from selfsup.scaling.fit import fit_runs, problem
from selfsup.scaling.isoflop import Isoflop, isoflop, power_laws, resampled
from selfsup.scaling.optimum import growth_of_size
from selfsup.scaling.result import Result
from selfsup.scaling.table import Runs

NAMES = ("N0", "a", "D0", "b", "L0", "c")
LAST_LOSS = "the loss of the budget before it"
MIN_RUNS = 4
"""Runs (clusters) that a budget needs for an interval: a parabola takes three."""


def analyse_isoflop(runs: Runs, resamples: int = 1000, seed: int = 0) -> Result:
    """N* = N0 C^a, D* = D0 C^b and the loss there L0 C^c (no irreducible part), by parabolas.

    Raises ValueError where fewer than two budgets have an optimum.
    """
    refuse_scales(runs)
    curves = isoflop(runs)
    if not np.isfinite(curves.parabola).all():
        said = "".join(f"; left out: {count} {reason}" for reason, count in curves.skipped.items())
        raise ValueError(
            f"--form isoflop: {len(curves.profiles)} budgets have at least 4 sizes, two with a minimum are needed{said}"
        )
    values = {name: float(value[0]) for name, value in _named(curves.parabola[None]).items()}
    findings = [f for f in check_design(runs, "chinchilla") if f.check not in ("few runs", "narrow ratio")]
    other = law_exponent(runs)
    findings += check_isoflop(curves, other, runs, own=True)
    few = too_few_clusters(runs.cluster) or _too_few_in_a_budget(runs, curves)
    if few:
        findings, resamples = [*findings, *few], 0
    draws: dict[str, np.ndarray] = {}
    failed = 0
    if resamples:
        drawn, lost = resampled(runs, curves, resamples, np.random.default_rng(seed))
        fine = np.isfinite(drawn).all(1)
        failed, draws = int((~fine).sum()), _named(drawn[fine]) if fine.any() else {}
        findings += _lost(lost, failed, resamples)
    if draws:
        findings += check_draws(draws, 0, int(runs.cluster.max()) + 1, float(runs.loss.min()))
    outside, held = _held_out(curves)
    findings += check_extrapolation(outside, LAST_LOSS) + check_own(values["a"], held)
    facts = {
        "resamples": resamples, "unconverged": failed, "seed": seed, "isoflop": isoflop_facts(curves),
        "other_a": {"Akima": float(curves.akima[1]), "the law of N and D": other},
    }  # fmt: skip
    return make_result(
        "isoflop", runs, values, {"a": values["a"], "b": values["b"]}, None, findings, draws, held,
        {"flops": curves.profiles[-1].budget}, facts, curves=curves,
    )  # fmt: skip


def law_exponent(runs: Runs) -> float | None:
    """The growth of the optimal size by E + A / N^alpha + B / D^beta; None where these runs do not determine it."""
    if len(runs) < 6:
        return None
    values, found = fit_runs("chinchilla", runs)
    low, high = law.EXPONENT_RANGE
    inside = all(1.01 * low < values[name] < 0.99 * high for name in ("alpha", "beta"))
    known = condition_number(problem("chinchilla", runs), found.solved.theta[0], runs.weights) <= 3000
    if not (inside and known and found.solved.converged[0]):
        return None
    return growth_of_size(
        "chinchilla", values, float(runs.flops.min()), float(runs.flops.max()), runs.cost
    )


def _named(parts: np.ndarray) -> dict[str, np.ndarray]:
    """The laws of `power_laws`, amplitudes in place of their logarithms, (R,) each."""
    return {name: np.exp(part) if name[1:] == "0" else part for name, part in zip(NAMES, parts.T)}


def _too_few_in_a_budget(runs: Runs, curves: Isoflop) -> list[Finding]:
    least = min(len(np.unique(runs.cluster[rows])) for rows in curves.rows)
    if least >= MIN_RUNS:
        return []
    text = f"a budget has {least} runs (clusters; below {MIN_RUNS}): a parabola takes three, so there are no intervals"
    return [Finding("few clusters", least, MIN_RUNS, text, refuses=True)]


def _lost(lost: int, failed: int, resamples: int) -> list[Finding]:
    said = []
    if lost > 0.01 * resamples:
        text = f"in {lost} of {resamples} resamples a budget has no minimum and is not in the law: intervals are narrow"
        said.append(Finding("resamples", lost / resamples, 0.01, text))
    if failed:
        text = f"{failed} of {resamples} resamples have fewer than two minima and are in no interval"
        said.append(Finding("resamples", failed / resamples, 0.1, text, refuses=failed > 0.1 * resamples))
    return said


def _held_out(curves: Isoflop) -> tuple[Extrapolation | None, dict[str, Any] | None]:
    """The loss and the size at the optimum of the largest budget, from the smaller ones; beside them the last loss
    unchanged, and N growing as the root of C."""
    fine = [p for p in curves.profiles if np.isfinite(p.parabola)]
    if len(fine) < 3:
        return None, None
    *fewer, last = fine
    log_n = np.log([p.parabola for p in fewer])[:, None]
    found = power_laws(fewer, log_n, np.array([p.parabola_loss for p in fewer])[:, None])[0]
    log_c, reach = np.log(last.budget), last.budget / fewer[-1].budget
    error = float(abs(np.exp(found[4] + found[5] * log_c) / last.parabola_loss - 1))
    baseline = abs(fewer[-1].parabola_loss / last.parabola_loss - 1)
    size = float(np.exp(found[0] + found[1] * log_c) / last.parabola)
    outside = Extrapolation(len(fewer), 1, fewer[-1].budget, reach, error, error, baseline, baseline)
    return outside, {
        **outside._asdict(), "error_of": "the loss at the optimum of the largest budget",
        "baseline": LAST_LOSS, "size_factor": max(size, 1 / size),
        "size_baseline_factor": float(np.exp(abs(np.log(fewer[-1].parabola * reach**0.5 / last.parabola)))),
    }  # fmt: skip
