"""Logistic regression on frozen features (scikit-learn), its regularisation chosen on held-out training data."""

import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from selfsup.probe.features import Features

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MAX_ITERATIONS = 1000
HELD_OUT = 10
"""One training sample in so many is held out to choose C."""

RECIPE = {
    "name": "logistic regression, multinomial, L2, lbfgs (scikit-learn)",
    "standardised": "each feature to mean 0, standard deviation 1 over the training set",
    "c_grid": list(C_GRID),
    "c_chosen": (
        f"best accuracy on a fixed random 1/{HELD_OUT} of the training set, the smaller of equals; the grid is walked "
        "upwards, each fit starting from the one before, and left when the accuracy has fallen from its best by a standard error; refitted on all training data"
    ),
    "max_iterations": MAX_ITERATIONS,
}


class LogregResult(NamedTuple):
    """The probe's score and how it came about."""

    accuracy: float
    """Share of test samples classified rightly, 0..1."""
    c: float
    """Chosen inverse regularisation strength, scikit-learn's C."""
    held_out_accuracy: dict[str, float]
    """C -> accuracy on the held-out part, for every C tried."""
    iterations: int
    """Of the last fit, on all training data."""
    converged: bool
    """False: the last fit was stopped at MAX_ITERATIONS."""


def logreg(train: Features, test: Features, title: str = "logistic regression") -> LogregResult:
    """Fits on `train`, scores on `test`; see RECIPE. float32 (n, d) features, labels >= 0.

    Deterministic. After DINOv2's evaluation (Oquab et al. 2023, app. B.3) with a smaller grid.
    Raises ValueError for fewer than 20 training samples or fewer than two classes among them.
    """
    if len(train.labels) < 2 * HELD_OUT or len(np.unique(train.labels)) < 2:
        raise ValueError(
            f"logistic regression: expected at least {2 * HELD_OUT} training samples of two classes, got "
            f"{len(train.labels)} of {len(np.unique(train.labels))}; give more data with --train"
        )
    scaler = StandardScaler().fit(train.values)
    values = scaler.transform(train.values)
    shuffled = np.random.default_rng(0).permutation(len(values))
    held, kept = np.split(shuffled, [len(values) // HELD_OUT])
    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
    held_out: dict[float, float] = {}
    best = (-1.0, 0.0, None)
    with warnings.catch_warnings(), tqdm(total=len(C_GRID) + 1, desc=title, unit="fit", disable=None) as bar:
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported in the result
        for c in C_GRID:
            model.set_params(C=c).fit(values[kept], train.labels[kept])
            held_out[c] = float(model.score(values[held], train.labels[held]))
            bar.update()
            if held_out[c] < best[0] - (best[0] * (1 - best[0]) / len(held)) ** 0.5:
                break  # weaker regularisation takes ever more iterations, to no purpose
            if held_out[c] > best[0]:
                best = (held_out[c], c, (model.classes_, model.coef_.copy(), model.intercept_.copy()))
        _, c, fitted = best
        assert fitted is not None
        if len(fitted[0]) == len(np.unique(train.labels)):  # else a class was in the held-out part only
            model.coef_, model.intercept_ = fitted[1:]
        else:
            model = LogisticRegression(max_iter=MAX_ITERATIONS)
        model.set_params(C=c).fit(values, train.labels)
        bar.update(bar.total - bar.n)
    iterations = int(np.max(model.n_iter_))
    accuracy = float(model.score(scaler.transform(test.values), test.labels))
    named = {f"{tried:g}": value for tried, value in held_out.items()}
    return LogregResult(accuracy, c, named, iterations, iterations < MAX_ITERATIONS)
