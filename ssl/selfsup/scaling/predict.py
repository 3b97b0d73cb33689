"""`selfsup scaling predict`: from a fit and a compute to a size, an amount of data, a loss, each with its interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfsup.scaling.bootstrap import interval
from selfsup.scaling.cost import CONSTANT, Cost
from selfsup.scaling.optimum import Plan, growth_of_size, limited_optimum, optimum, price
from selfsup.scaling.repeats import PUBLISHED_DECAY
from selfsup.scaling.result import Result, loss_at
from selfsup.scaling.rules import PUBLISHED

FACTORS = (0.25, 0.5, 2.0, 4.0)
REACH = 100.0
"""Beyond so many times the largest compute of the table a plan says that it is a guess."""


@dataclass(frozen=True)
class Prediction:
    """values: {name: [value, low, high]} (low, high None without draws). price: {factor: [loss above, share wasted]}."""

    flops: float | None
    level: float
    values: dict[str, list[float | None]]
    price: dict[str, list[float]] = field(default_factory=dict)
    rules: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def predict_plan(
    result: Result, flops: float, level: float = 0.95, unique: float | None = None, rules: Sequence[str] = ()
) -> Prediction:
    """What to train with this compute; `rules` name those of `rules.PUBLISHED` that are asked for.

    Raises ValueError where the fit was refused, or knows no N and D, and for a level that its draws do not reach.
    """
    if result.form == "bnsl":
        raise ValueError(
            "a bnsl fit knows one axis: give --at VALUE (of its axis) in place of --flops or --hours"
        )
    if result.refused:
        lines = [f"  {found['check']}: {found['text']}" for found in result.refused]
        raise ValueError(
            "\n".join(["the fit was refused as a ground for plans:", *lines, "mend the table, or predict the loss of one "
                       "run with --params N --samples D"])
        )  # fmt: skip
    if not (np.isfinite(flops) and flops > 0):
        raise ValueError(f"--flops: expected a positive number, got {flops:g}")
    notes, cost = _reach(result, flops), Cost(*result.about["cost"])
    plan: Callable[[Any], Plan] = lambda values: optimum(result.form, values, flops, cost)  # noqa: E731
    if unique is not None:
        plan = _limited(result, flops, cost, unique, notes)
    elif result.form == "repeats":
        notes.append("data are taken to be fresh; --unique-samples U says how many there are")
    best, drawn = plan(result.coefficients), plan(result.values())
    values = _with_interval(best, drawn, result, level)
    if unique is not None:
        values["epochs"] = [part / unique if part is not None else None for part in values["samples"]]
    notes += _scatter(result)
    prices = {}
    if result.form in ("chinchilla", "tied", "kaplan") and unique is None:
        for factor in FACTORS:
            above, wasted = price(result.form, result.coefficients, flops, cost, factor)
            prices[f"{factor:g}"] = [above, wasted]
    n, d = float(best.params), float(best.samples)
    if result.form != "isoflop":
        notes += _cost_notes(result, flops, cost, n)
    return Prediction(flops, level, values, prices, {name: list(PUBLISHED[name](n, d)) for name in rules}, notes)


def _enough(result: Result, level: float) -> None:
    """Raises ValueError where an end of the interval would rest on fewer than two draws: the outermost draw of 300 is
    no quantile of 0.005%."""
    needed = math.ceil(round(4 / (1 - level), 6))
    have = len(next(iter(result.draws.values())))
    if have < needed:
        raise ValueError(
            f"--level {level:g}: expected a fit of at least {needed} resamples (4 / (1 - level)), it has {have}; "
            f"fit again with --resamples {needed}, or take a level of {math.floor((1 - 4 / have) * 1e4) / 1e4:g} or less"
        )


def _limited(
    result: Result, flops: float, cost: Cost, unique: float, notes: list[str]
) -> Callable[[Any], Plan]:  # fmt: skip
    """Plans with `unique` samples at most; half-lives from the fit if it has them, else published ones."""
    if not unique > 0:
        raise ValueError(f"--unique-samples: expected a positive number, got {unique:g}")
    if result.form not in ("chinchilla", "tied", "repeats"):
        raise ValueError(
            f"--unique-samples: needs a fit of form chinchilla, tied or repeats, got {result.form}"
        )
    own = result.form == "repeats"
    enough = unique >= float(optimum("chinchilla", result.coefficients, flops, cost).samples)
    if not own and not enough:
        notes.append(
            "repeats are valued as published for language models (R_D = "
            f"{PUBLISHED_DECAY[0]:.3g}, R_N = {PUBLISHED_DECAY[1]:.3g}, "
            "2305.16264), a point in a valley; fit --form repeats on runs of your own"
        )

    def plan(values: Any) -> Plan:
        decay = (values["R_D"], values["R_N"]) if own else PUBLISHED_DECAY
        return limited_optimum(values, decay, flops, cost, unique)

    return plan


def predict_run(
    result: Result, params: float, samples: float, unique: float | None = None, level: float = 0.95
) -> Prediction:
    """The loss of one run of N parameters on D samples, also from a fit that was refused for plans."""
    if result.form in ("isoflop", "bnsl"):
        raise ValueError(f"a fit of form {result.form} does not predict the loss of any N and D")
    if not (params > 0 and samples > 0):
        raise ValueError(f"--params and --samples: expected positive numbers, got {params:g} and {samples:g}")
    if result.form == "repeats" and unique is None:
        raise ValueError(
            "a fit of form repeats needs --unique-samples U, the distinct samples among --samples"
        )
    at = {"params": params, "samples": samples} | ({"unique": unique} if result.form == "repeats" else {})
    flops = float(Cost(*result.about["cost"]).per(params)) * params * samples
    notes = _reach(result, flops)
    if unique is not None and result.form != "repeats" and samples > unique:
        notes.append(
            f"{samples / unique:.3g} epochs are counted as fresh data by this form; fit --form repeats"
        )
    notes += _scatter(result)
    if result.refused:
        notes.append(
            "the fit was refused for plans (" + ", ".join(found["check"] for found in result.refused) + ")"
        )
    values = {
        "loss": _triple(
            loss_at(result.form, result.coefficients, **at),
            loss_at(result.form, result.values(), **at),
            result,
            level,
        )
    }
    return Prediction(flops, level, values, notes=notes)


def predict_axis(result: Result, x: float, level: float = 0.95) -> Prediction:
    """The loss at one value of a bnsl fit's axis."""
    if result.form != "bnsl":
        raise ValueError(
            f"--at: is for a fit of form bnsl, got {result.form}; give --flops, --hours, or --params and --samples"
        )
    if not x > 0:
        raise ValueError(f"--at: expected a positive number, got {x:g}")
    reach = x / result.about["ranges"]["samples"][1]
    notes = [f"{reach:.3g} times beyond the largest {result.about['axis']} of the table"] if reach > 1 else []
    if result.refused:
        notes.append("the fit was refused (" + ", ".join(found["check"] for found in result.refused) + ")")
    value = loss_at("bnsl", result.coefficients, x=x)
    return Prediction(
        None,
        level,
        {"loss": _triple(value, loss_at("bnsl", result.values(), x=x), result, level)},
        notes=notes,
    )


def _reach(result: Result, flops: float) -> list[str]:
    low, high = result.about["ranges"]["flops"]
    notes = []
    if flops > high:
        guess = ": a guess, whatever its interval" if flops > REACH * high else ""
        notes.append(f"{flops / high:.3g} times the compute of the largest run of the table{guess}")
    elif flops < low:
        notes.append(f"{low / flops:.3g} times less compute than the smallest run of the table")
    return notes


def _cost_notes(result: Result, flops: float, cost: Cost, params: float) -> list[str]:
    """Where C is not proportional to N D: what was taken, how well it fits, and whether it still drifts at the plan."""
    notes = []
    if cost.extra:
        form = "chinchilla" if result.form == "repeats" else result.form
        slope = growth_of_size(form, result.coefficients, flops / 1.01, flops, cost)
        notes.append(
            f"C / (N D) = {float(cost.per(params)):.4g} at this N, by {cost.base:.4g} {cost.extra:+.4g} "
            f"N^-{cost.power:.3g} through the table (off by {cost.off:.1%} at most): here N grows as "
            f"C^{slope:.3f} (a is for C proportional to N D)"
        )
    low, high = result.about["ranges"]["params"]
    drift = abs(float(cost.per(params) / cost.per(np.clip(params, low, high))) - 1)
    if drift > CONSTANT:
        notes.append(
            f"C / (N D) is extrapolated: at this N it is {drift:.1%} from that of the table's nearest size"
        )
    if cost.off > CONSTANT and not cost.extra:
        notes.append(f"C / (N D) is taken as {cost.base:.4g}, off by {cost.off:.1%} in some row of the table")
    return notes


def _scatter(result: Result) -> list[str]:
    spread = result.about.get("residual_sd")
    if spread is None:
        return []
    return [
        f"intervals are of the law; single runs scatter about it by {spread:.2%} (robust standard "
        "deviation in this table)"
    ]


def _with_interval(best: Plan, drawn: Plan, result: Result, level: float) -> dict[str, list[float | None]]:
    return {
        name: _triple(getattr(best, name), getattr(drawn, name), result, level)
        for name in ("params", "samples", "loss")
    }


def _triple(value: Any, drawn: np.ndarray, result: Result, level: float) -> list[float | None]:
    if not result.draws:
        return [float(value), None, None]
    _enough(result, level)
    return [float(value), *interval(np.nan_to_num(np.asarray(drawn), posinf=1e300), level)]
