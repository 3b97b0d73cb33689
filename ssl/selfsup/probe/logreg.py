"""Logistic regression on frozen features (scikit-learn), its C chosen on held-out training data."""

import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
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
        f"best accuracy on a fixed random 1/{HELD_OUT} of the training set, the smaller of equals; the "
        "grid is walked upwards, each fit starting from the one before, and left when the accuracy has "
        "fallen from its best by a standard error; refitted on all training data"
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


WORDS_C_GRID = (0.1, 1.0, 10.0, 100.0)
"""For TF-IDF, whose rows have length 1 and are not standardised."""
WORDS = {"sublinear_tf": True, "ngram_range": (1, 2), "min_df": 2}
WORDS_RECIPE = {
    **RECIPE,
    "features": f"scikit-learn's TfidfVectorizer of the raw text, {WORDS}",
    "standardised": "no: rows of length 1",
    "c_grid": list(WORDS_C_GRID),
}


def logreg(train: Features, test: Features, title: str = "logistic regression") -> LogregResult:
    """Fits on `train`, scores on `test`; see RECIPE. float32 (n, d) features, labels >= 0.

    After DINOv2's evaluation (Oquab et al. 2023) with a smaller grid of C. Deterministic, on
    one thread: about 20 ms an iteration for 50,000 x 192 features.
    Raises ValueError for fewer than 20 training samples or fewer than two classes among them.
    """
    _expect_enough(train.labels)
    scaler = StandardScaler().fit(train.values)
    values, test_values = scaler.transform(train.values), scaler.transform(test.values)
    return _fit(values, train.labels, test_values, test.labels, C_GRID, title)


def words_logreg(
    train: list[str],
    train_labels: Int64[np.ndarray, " n"],
    test: list[str],
    test_labels: Int64[np.ndarray, " m"],
    title: str = "TF-IDF, logistic regression",
) -> LogregResult:
    """The same on counts of words and pairs of words (see WORDS_RECIPE): the baseline without a model.

    Raises ValueError as `logreg`, and where no word is in two training texts.
    """
    _expect_enough(train_labels)
    counts = TfidfVectorizer(**WORDS)
    try:
        values = counts.fit_transform(train)
    except ValueError as error:
        raise ValueError(f"TF-IDF: {error}; leave it out with --baselines, or give other texts") from None
    return _fit(values, train_labels, counts.transform(test), test_labels, WORDS_C_GRID, title)


def _expect_enough(labels: np.ndarray) -> None:
    if len(labels) < 2 * HELD_OUT or len(np.unique(labels)) < 2:
        raise ValueError(
            f"logistic regression: expected at least {2 * HELD_OUT} training samples of two classes, got "
            f"{len(labels)} of {len(np.unique(labels))}; give more data with --train"
        )


def _fit(
    values: Any,
    labels: np.ndarray,
    test_values: Any,
    test_labels: np.ndarray,
    grid: tuple[float, ...],
    title: str,
) -> LogregResult:
    """values: arrays or sparse matrices (n, d)."""
    # One BLAS thread: lbfgs makes thousands of small products, whose threads wait for each other. On
    # a busy machine two were 10 times slower than one, and another count chose another C.
    with (
        threadpool_limits(1, user_api="blas"),
        warnings.catch_warnings(),
        tqdm(total=len(grid) + 1, desc=title, unit="fit", disable=None) as bar,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported in the result
        c, held_out, model = _choose_c(values, labels, grid, bar)
        model.set_params(C=c).fit(values, labels)
        bar.update(bar.total - bar.n)
    iterations = int(np.max(model.n_iter_))
    accuracy = float(model.score(test_values, test_labels))
    return LogregResult(accuracy, c, held_out, iterations, iterations < MAX_ITERATIONS)


def _choose_c(
    values: Any, labels: np.ndarray, grid: tuple[float, ...], bar: tqdm
) -> tuple[float, dict[str, float], LogisticRegression]:
    """Walks the grid; returns the chosen C, all held-out accuracies, and a model to go on from."""
    held, kept = np.split(
        np.random.default_rng(0).permutation(values.shape[0]), [values.shape[0] // HELD_OUT]
    )
    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
    held_out: dict[str, float] = {}
    best, chosen, start = -1.0, grid[0], None
    for c in grid:
        model.set_params(C=c).fit(values[kept], labels[kept])
        accuracy = float(model.score(values[held], labels[held]))
        held_out[f"{c:g}"] = accuracy
        bar.update()
        if accuracy > best:
            best, chosen, start = accuracy, c, (model.coef_.copy(), model.intercept_.copy())
        elif accuracy < best - (best * (1 - best) / len(held)) ** 0.5:
            break  # weaker regularisation takes ever more iterations, to no purpose
    assert start is not None
    if len(np.unique(labels[kept])) < len(np.unique(labels)):  # a class that only the held-out part has
        return chosen, held_out, LogisticRegression(max_iter=MAX_ITERATIONS)
    model.coef_, model.intercept_ = start
    return chosen, held_out, model
