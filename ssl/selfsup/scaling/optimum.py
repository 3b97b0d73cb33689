"""What to train with a given compute: closed forms where C is proportional to N D, else a search over sizes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq

from selfsup.scaling import law
from selfsup.scaling.cost import Cost
from selfsup.scaling.fit import exponents, inner_law
from selfsup.scaling.result import loss_at

Values = Mapping[str, Any]


class Plan(NamedTuple):
    """N, D and the loss predicted there; arrays where the coefficients are (draws). D counts repeats."""

    params: np.ndarray
    samples: np.ndarray
    loss: np.ndarray


def optimum(form: str, values: Values, flops: float, cost: Cost) -> Plan:
    """The N and D of least loss under flops = cost.per(N) N D, broadcast over draws.

    Where C is proportional to N D: Hoffmann et al. 2022, equation 4.
    """
    if form == "isoflop":
        n, d = (np.asarray(values[k]) * flops ** np.asarray(values[e]) for k, e in (("N0", "a"), ("D0", "b")))
        return Plan(n, d, np.asarray(loss_at(form, dict(values), flops=flops)))
    inner = inner_law("chinchilla" if form == "repeats" else form, values)
    total = inner["alpha"] + inner["beta"]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        pull = np.log(inner["alpha"] * inner["A"]) - np.log(inner["beta"] * inner["B"])
        n = np.exp(pull / total + inner["beta"] / total * np.log(flops / cost.base))
        if cost.extra:
            n = np.where(np.isfinite(n), _balanced(inner, np.asarray(pull), flops, cost), n)
        d = flops / cost.per(n) / n
        if form == "kaplan":
            return Plan(n, d, np.asarray(loss_at(form, dict(values), params=n, samples=d)))
        return Plan(n, d, law.chinchilla(**inner, params=n, samples=d))


def _balanced(inner: Values, pull: np.ndarray, flops: float, cost: Cost) -> np.ndarray:
    """N at which alpha A N^-alpha = growth(N) beta B D^-beta: the derivative of the loss along the budget is zero there.

    Bisection of the logarithm, between one parameter and 1e18.
    """
    least = max(0.0, np.log(-cost.extra / (0.95 * cost.base)) / cost.power) if cost.extra < 0 else 0.0
    low, high = np.full_like(pull, least), np.full_like(pull, np.log(1e18))
    for _ in range(60):
        x = (low + high) / 2
        n = np.exp(x)
        log_d = np.log(flops) - np.log(cost.per(n)) - x
        more = pull - inner["alpha"] * x + inner["beta"] * log_d > np.log(cost.growth(n))
        low, high = np.where(more, x, low), np.where(more, high, x)
    return np.asarray(np.exp((low + high) / 2))


def growth_of_size(form: str, values: Values, low: float, high: float, cost: Cost) -> float:
    """The power of C with which the optimal N grows between two computes: a, where C is proportional to N D."""
    if not cost.extra:
        return float(exponents(form, values)[0])
    small, large = (float(optimum(form, values, flops, cost).params) for flops in (low, max(high, 1.01 * low)))
    return float(np.log(large / small) / np.log(max(high, 1.01 * low) / low))


def limited_optimum(
    values: Values, decay: tuple[Any, Any], flops: float, cost: Cost, unique: float
) -> Plan:
    """The same where only `unique` samples exist: further ones are repeats, worth less by half-lives (R_D, R_N).

    Searched on a grid of sizes (0.5% apart) about the optimum for fresh data, where the loss has one minimum.
    """
    base = {name: np.asarray(values[name])[..., None] for name in law.CHINCHILLA}
    fresh = optimum("chinchilla", values, flops, cost).params
    centre = np.log(np.clip(fresh, 1.0, 1e18))
    sizes = np.exp(centre[..., None] + np.linspace(-7.0, 7.0, 2801))
    per = cost.per(sizes)
    possible = per > 0.05 * cost.base  # below the table a falling cost may end: no size of a plan
    data = flops / np.where(possible, per, cost.base) / sizes
    halves = [np.asarray(value)[..., None] for value in decay]
    size = np.minimum(sizes, law.optimal_params(**base, samples=unique))
    loss = law.chinchilla(
        **base, params=law.effective(sizes, size, halves[1]), samples=law.effective(data, unique, halves[0])
    )
    best = np.where(possible, loss, np.inf).argmin(-1)[..., None]
    return Plan(
        *(
            np.take_along_axis(np.broadcast_to(part, loss.shape), best, -1)[..., 0]
            for part in (sizes, data, loss)
        )
    )


def price(form: str, values: Values, flops: float, cost: Cost, factor: float) -> tuple[float, float]:
    """`factor` times the optimal size at the same compute: (loss above the optimum's, share of compute wasted).

    Wasted is what the optimal size would not have needed for the same loss. For laws of N and D.
    """
    best = optimum(form, values, flops, cost)
    size = best.params * factor
    off = float(loss_at(form, dict(values), params=size, samples=flops / cost.per(size) / size))

    def excess(log_share: float) -> float:
        return float(optimum(form, values, flops * np.exp(log_share), cost).loss) - off

    return off - float(best.loss), 1.0 - float(np.exp(brentq(excess, -30.0, 0.0)))
