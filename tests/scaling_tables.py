"""Tables and truths that the tests of scaling laws share."""

import os
from pathlib import Path

import numpy as np
import pytest

from selfsup.scaling import law
from selfsup.scaling.table import Columns, Runs, read_table, runs_of

ROOT = Path(__file__).parent.parent
TRUTH = {"E": 1.8172, "A": 477.8, "B": 2143.0, "alpha": 0.3473, "beta": 0.3672}
EPOCH = {"E": 1.81724, "A": 477.84, "B": 2143.9, "alpha": 0.34731, "beta": 0.36718}
EPOCH_OBJECTIVE = 0.00101827402
C4 = {
    "E": np.exp(0.6254804),
    "A": np.exp(6.255414),
    "B": np.exp(7.3049974),
    "alpha": 0.3526596,
    "beta": 0.3526596,
}
"""The base law of 2305.16264 on C4."""


def shared(name: str) -> Path:
    """A published table; skips the test where the folder of such tables is not at hand."""
    places = [os.environ.get("SELFSUP_SHARED"), ROOT.parent / "shared", ROOT.parent.parent / "shared"]
    for place in places:
        if place and (path := Path(place) / "data" / "scaling" / name).exists():
            return path
    pytest.skip(f"the published table {name} is not at hand (SELFSUP_SHARED names the folder of such data)")


def epoch(drop: int = 5, folder: Path | None = None) -> Runs:
    """Epoch's 245 points of Hoffmann et al., without the highest losses. `folder` has the tables."""
    name = "epoch_chinchilla_svg_extracted.csv"
    runs = read_table(folder / name if folder else shared(name), Columns("Model Size", "loss", flops="Training FLOP"))
    keep = np.ones(len(runs), dtype=bool)
    keep[np.argsort(runs.loss)[len(runs) - drop :]] = False
    return runs.take(keep)


def marin(dataset: str, folder: Path | None = None) -> Runs:
    name = "marin_isoflop_202603.csv"
    columns = Columns("params", "loss", "tokens", budget="budget")
    return read_table(folder / name if folder else shared(name), columns, [f"dataset={dataset}"])


def isoflop_design(
    budgets: int = 5, sizes: int = 6, reach: float = 6.0, low: float = 1e18, high: float = 1e20
):
    """(N, D) of isoFLOP curves about the true optimum."""
    alpha, beta = TRUTH["alpha"], TRUTH["beta"]
    g = (alpha * TRUTH["A"] / (beta * TRUTH["B"])) ** (1 / (alpha + beta))
    params, samples = [], []
    for flops in np.geomspace(low, high, budgets):
        best = g * (flops / 6) ** (beta / (alpha + beta))
        for factor in np.geomspace(1 / reach, reach, sizes):
            params.append(best * factor)
            samples.append(flops / 6 / (best * factor))
    return np.array(params), np.array(samples)


def checkpoint_design():
    """(N, D, run): 8 sizes, 4 lengths, 4 checkpoints of each run."""
    params, samples, cluster = [], [], []
    for number, (size, ratio) in enumerate(
        (n, r) for n in np.geomspace(3e7, 3e9, 8) for r in (5, 20, 80, 320)
    ):
        for part in (0.4, 0.6, 0.8, 1.0):
            params.append(size)
            samples.append(size * ratio * part)
            cluster.append(number)
    return np.array(params), np.array(samples), np.array(cluster)


def simulated(params, samples, noise=0.0, seed=0, cluster=None, truth=TRUTH) -> Runs:
    """Runs of the true law with log-normal noise."""
    error = noise * np.random.default_rng(seed).standard_normal(len(params))
    return runs_of(
        params, samples, law.chinchilla(**truth, params=params, samples=samples) * np.exp(error), cluster
    )


def is_epochs_fit(values, objective):
    """Epoch's notebook, at delta 1e-3."""
    assert objective == pytest.approx(EPOCH_OBJECTIVE, rel=1e-7)
    for name, value in EPOCH.items():
        assert values[name] == pytest.approx(value, rel=5e-4), name
