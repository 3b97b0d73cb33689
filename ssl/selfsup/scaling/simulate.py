"""A design put to the test before anything is run: what a law fitted to its cells would know, by simulation.

Design matters more than the fitter: with all cells at one ratio of data to parameters the exponent a comes out
anywhere from .1 to .9, with cells of one compute and other sizes within .01.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from selfsup.scaling import law
from selfsup.scaling.check import LOOSE, LOOSE_REFUSED
from selfsup.scaling.cost import Cost
from selfsup.scaling.design import check_design
from selfsup.scaling.finding import Finding
from selfsup.scaling.fit import exponents, fit, problem
from selfsup.scaling.optimum import optimum
from selfsup.scaling.table import Runs

SIMULATIONS = 200
LEVEL = 0.95
LOOSE_TARGET = 0.05
"""A prediction whose expected interval is wider than this share of it is no prediction worth the compute."""


class Design(NamedTuple):
    """Cells that will be fitted: N, D, C by the sweep's conventions, and which budget each belongs to."""

    params: Float[np.ndarray, " n"]
    samples: Float[np.ndarray, " n"]
    flops: Float[np.ndarray, " n"]
    cluster: Int[np.ndarray, " n"]

    @property
    def cost(self) -> Cost:
        """C / (N D), as one number: the median over the larger half of the compute."""
        return Cost(float(np.median((self.flops / self.params / self.samples)[self.flops >= np.median(self.flops)])))


class Expected(NamedTuple):
    """What a fit to the design would find: intervals of a and of the loss at the target, beside the prior's own.

    `failed`: simulations whose fit did not converge. `errors`: of a, and of the target's log loss, one a simulation.
    """

    a: float
    a_interval: tuple[float, float]
    target: float
    loss: float
    loss_interval: tuple[float, float]
    params: float
    """N of least loss at the target, by the prior."""
    failed: int
    errors: Float[np.ndarray, "2 s"]


def laws_of(prior: Mapping[str, float], draws: Mapping[str, Sequence[float]] | None, count: int) -> dict[str, np.ndarray]:
    """Laws to simulate under: the prior, or draws of a pilot's fit, `count` of them taken evenly."""
    if not draws:
        return {name: np.full(count, float(prior[name])) for name in law.CHINCHILLA}
    size = len(next(iter(draws.values())))
    picked = np.linspace(0, size - 1, count).round().astype(np.int64)
    return {name: np.asarray(draws[name], dtype=np.float64)[picked] for name in law.CHINCHILLA}


def simulate(
    design: Design, prior: Mapping[str, float], noise: float, target: float, seed: int = 0,
    draws: Mapping[str, Sequence[float]] | None = None, simulations: int = SIMULATIONS,
) -> Expected:  # fmt: skip
    """Losses of the cells under each law, with noise (of log loss), fitted again: all fits at once.

    The intervals hold 95% of the fits' errors, about what the prior says. Cells of one cluster (a trunk and its
    branches) share half of the noise's variance.
    """
    laws = laws_of(prior, draws, simulations)
    generator = np.random.default_rng(seed)
    columns = {name: value[:, None] for name, value in laws.items()}
    clean = np.log(law.chinchilla(**columns, params=design.params, samples=design.samples))
    clusters = int(design.cluster.max()) + 1
    own, shared = (generator.standard_normal((simulations, n)) for n in (len(design.params), clusters))
    single = np.bincount(design.cluster)[design.cluster] == 1
    mixed = np.where(single, own, np.sqrt(0.5) * (own + shared[:, design.cluster]))
    task = problem("chinchilla", runs_of_design(design, prior))
    found = fit(task, clean + noise * mixed, np.ones((1, len(design.params))), keep=3)
    values = task.coefficients(found.solved.theta)
    truth, at = exponents("chinchilla", laws)[0], optimum("chinchilla", laws, target, design.cost)
    fitted = law.chinchilla(**values, params=at.params, samples=at.samples)
    errors = np.stack([exponents("chinchilla", values)[0] - truth, np.log(fitted / at.loss)])
    errors = np.nan_to_num(errors, nan=np.inf)
    centre = {name: np.array([float(prior[name])]) for name in law.CHINCHILLA}
    a = float(exponents("chinchilla", centre)[0][0])
    best = optimum("chinchilla", centre, target, design.cost)
    loss = float(best.loss[0])
    ends = np.quantile(errors, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], axis=1)
    return Expected(
        a, (max(0.0, a + float(ends[0, 0])), min(1.0, a + float(ends[1, 0]))), target, loss,
        (loss * float(np.exp(ends[0, 1])), loss * float(np.exp(ends[1, 1]))), float(best.params[0]),
        int((~found.solved.converged).sum()), errors,
    )  # fmt: skip


def runs_of_design(
    design: Design, prior: Mapping[str, float], budget: Float[np.ndarray, " n"] | None = None,
    steps: Float[np.ndarray, " n"] | None = None,
) -> Runs:  # fmt: skip
    """The design as a table, its losses those of the prior."""
    n = len(design.params)
    loss = law.chinchilla(**{name: float(prior[name]) for name in law.CHINCHILLA}, params=design.params,
                          samples=design.samples)  # fmt: skip
    return Runs(
        design.params, design.samples, design.flops, loss, design.cluster, np.arange(n, dtype=np.int64),
        design.cost, budget=budget, steps=steps, clustered=bool(design.cluster.max() + 1 < n), read=n,
    )  # fmt: skip


def judge(
    design: Design, expected: Expected, prior: Mapping[str, float], budget: Float[np.ndarray, " n"] | None = None,
    steps: Float[np.ndarray, " n"] | None = None,
) -> list[Finding]:  # fmt: skip
    """Doubts about the design; those that refuse it say why it cannot identify the law."""
    found = check_design(runs_of_design(design, prior, budget, steps), "chinchilla")
    width = expected.a_interval[1] - expected.a_interval[0]
    if width > LOOSE:
        text = (
            f"simulated, the exponent a comes out from {expected.a_interval[0]:.3f} to {expected.a_interval[1]:.3f}: "
            f"add sizes away from the optimum, compute, or seeds"
        )
        found.append(Finding("loose exponent", width, LOOSE, text, refuses=width > LOOSE_REFUSED))
    low, high = expected.loss_interval
    share = (high - low) / expected.loss
    if share > LOOSE_TARGET:
        text = f"simulated, the loss at {expected.target:.3g} FLOPs comes out from {low:.4g} to {high:.4g}"
        found.append(Finding("loose target", share, LOOSE_TARGET, text))
    if budget is not None:
        found += _centred(design, prior, budget)
    if expected.failed:
        text = f"{expected.failed} of {expected.errors.shape[1]} simulated fits did not converge; they are counted in"
        found.append(Finding("simulations", expected.failed, 0, text))
    return found


def _centred(design: Design, prior: Mapping[str, float], budget: Float[np.ndarray, " n"]) -> list[Finding]:
    """Budgets whose optimum, by the prior, is the smallest or largest of their sizes, or beyond."""
    off = []
    for level in np.unique(budget):
        rows = budget == level
        params, samples = design.params[rows], design.samples[rows]
        best = params[law.chinchilla(**prior, params=params, samples=samples).argmin()]
        if len(params) > 1 and best in (params.min(), params.max()):
            off.append(f"{level:.3g}")
    if not off:
        return []
    text = f"expected optimum at the edge of the sizes for {', '.join(off)} FLOPs: widen the ladder there"
    return [Finding("expected minimum on the edge", len(off), 0, text)]


def gradient(values: Mapping[str, float], params: np.ndarray, samples: np.ndarray) -> Float[np.ndarray, "n 5"]:
    """Of log L(N, D) in (log E, log A, alpha, log B, beta)."""
    a, b = values["A"] * params ** -values["alpha"], values["B"] * samples ** -values["beta"]
    loss = values["E"] + a + b
    parts = np.stack([np.full_like(a, values["E"]), a, -a * np.log(params), b, -b * np.log(samples)], axis=-1)
    return parts / loss[..., None]


def linear_sd(design: Design, prior: Mapping[str, float], noise: float, target: float) -> float:
    """Standard deviation of the predicted log loss at the target, by the law's gradient: least squares' own."""
    at = optimum("chinchilla", prior, target, design.cost)
    g = gradient(prior, np.atleast_1d(at.params), np.atleast_1d(at.samples))[0]
    rows = gradient(prior, design.params, design.samples)
    return noise * float(np.sqrt(g @ np.linalg.pinv(rows.T @ rows, rcond=1e-13) @ g))


class Proposal(NamedTuple):
    """A cell worth running next: which candidate, and the target's standard deviation (log loss) with it."""

    index: int
    sd: float


def propose(
    design: Design, candidates: Design, hours: Float[np.ndarray, " m"], prior: Mapping[str, float], noise: float,
    target: float, count: int,
) -> list[Proposal]:  # fmt: skip
    """The next best cells: each time the candidate that lowers the target's variance most an hour."""
    at = optimum("chinchilla", prior, target, design.cost)
    g = gradient(prior, np.atleast_1d(at.params), np.atleast_1d(at.samples))[0]
    rows = gradient(prior, design.params, design.samples)
    new = gradient(prior, candidates.params, candidates.samples)
    # A weak belief in the prior keeps a design of fewer cells than coefficients from being singular.
    spread = np.linalg.inv(rows.T @ rows / noise**2 + np.diag(np.full(5, 1e-2)))
    chosen: list[Proposal] = []
    for _ in range(min(count, len(new))):
        lowered = (new @ spread @ g) ** 2 / (noise**2 + np.einsum("mi,ij,mj->m", new, spread, new))
        worth = lowered / hours
        worth[[p.index for p in chosen]] = -np.inf
        best = int(worth.argmax())
        step = spread @ new[best]
        spread = spread - np.outer(step, step) / (noise**2 + new[best] @ step)
        chosen.append(Proposal(best, float(np.sqrt(g @ spread @ g))))
    return chosen
