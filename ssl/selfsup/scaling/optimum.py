"""What to train with a given compute: closed forms where there are any, else a search over sizes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from selfsup.scaling import law
from selfsup.scaling.fit import exponents, inner_law
from selfsup.scaling.result import loss_at

Values = Mapping[str, Any]


class Plan(NamedTuple):
    """N, D and the loss predicted there; arrays where the coefficients are (draws). D counts repeats."""

    params: np.ndarray
    samples: np.ndarray
    loss: np.ndarray


def optimum(form: str, values: Values, flops: float, flops_per: float) -> Plan:
    """The N and D of least loss under flops = flops_per N D (Hoffmann et al. 2022, equation 4), broadcast over draws."""
    if form == "isoflop":
        n, d = (np.asarray(values[k]) * flops ** np.asarray(values[e]) for k, e in (("N0", "a"), ("D0", "b")))
        return Plan(n, d, np.asarray(loss_at(form, dict(values), flops=flops)))
    inner = inner_law("chinchilla" if form == "repeats" else form, values)
    total = inner["alpha"] + inner["beta"]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        log_g = (np.log(inner["alpha"] * inner["A"]) - np.log(inner["beta"] * inner["B"])) / total
        n = np.exp(log_g + inner["beta"] / total * np.log(flops / flops_per))
        d = flops / flops_per / n
        if form == "kaplan":
            return Plan(n, d, np.asarray(loss_at(form, dict(values), params=n, samples=d)))
        return Plan(n, d, law.chinchilla(**inner, params=n, samples=d))


def limited_optimum(
    values: Values, decay: tuple[Any, Any], flops: float, flops_per: float, unique: float
) -> Plan:
    """The same where only `unique` samples exist: further ones are repeats, worth less by half-lives (R_D, R_N).

    Searched on a grid of sizes (0.5% apart) about the optimum for fresh data, where the loss has one minimum.
    """
    base = {name: np.asarray(values[name])[..., None] for name in law.CHINCHILLA}
    fresh = optimum("chinchilla", values, flops, flops_per).params
    centre = np.log(np.clip(fresh, 1.0, 1e18))
    sizes = np.exp(centre[..., None] + np.linspace(-7.0, 7.0, 2801))
    data = flops / flops_per / sizes
    halves = [np.asarray(value)[..., None] for value in decay]
    size = np.minimum(sizes, law.optimal_params(**base, samples=unique))
    loss = law.chinchilla(
        **base, params=law.effective(sizes, size, halves[1]), samples=law.effective(data, unique, halves[0])
    )
    best = loss.argmin(-1)[..., None]
    return Plan(
        *(
            np.take_along_axis(np.broadcast_to(part, loss.shape), best, -1)[..., 0]
            for part in (sizes, data, loss)
        )
    )


def price(
    form: str, values: Values, flops: float, flops_per: float, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """`factor` times the optimal size at the same compute: (loss above the optimum's, share of compute wasted).

    Wasted is what the optimal size would not have needed for the same loss. For laws of N and D.
    """
    best = optimum(form, values, flops, flops_per)
    off = loss_at(form, dict(values), params=best.params * factor, samples=best.samples / factor)
    inner = inner_law(form, values)
    a = exponents(form, values)[0]
    power = 1.0 / np.asarray(values["alpha_D"]) if form == "kaplan" else 1.0
    floor = inner["E"]
    # Along the optimum the inner law is E + K C^-(alpha a); invert it.
    ratio = (off**power - floor) / (best.loss**power - floor)
    return np.asarray(off - best.loss), np.asarray(1.0 - ratio ** (-1.0 / (inner["alpha"] * a)))
