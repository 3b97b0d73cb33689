"""Measured noise as weights: 1 / sigma, not its inverse."""

from dataclasses import replace

import numpy as np
import pytest

from scaling_tables import TRUTH, isoflop_design, simulated
from selfsup.scaling import check, law
from selfsup.scaling.analyse import analyse
from selfsup.scaling.bootstrap import bootstrap
from selfsup.scaling.fit import exponents, fit, fit_runs, problem
from selfsup.scaling.table import Runs

TABLES = 200


def noisy(tables=TABLES):
    """42 isoFLOP runs, every second with fifteen times the noise; log losses of many tables."""
    params, samples = isoflop_design(budgets=6, sizes=7, reach=5)
    runs = replace(simulated(params, samples), sigma=np.where(np.arange(42) % 2, 0.03, 0.002))
    error = runs.sigma * np.random.default_rng(0).standard_normal((tables, 42))
    return runs, np.log(law.chinchilla(**TRUTH, params=params, samples=samples)) + error


def miss(runs, log_loss):
    """Root mean square error of the exponent a."""
    task = problem("chinchilla", runs)
    found = fit(task, log_loss, runs.weights[None], keep=2)
    a = exponents("chinchilla", task.coefficients(found.solved.theta))[0]
    return float(np.sqrt(np.mean((a - exponents("chinchilla", TRUTH)[0]) ** 2)))


def weights_help():
    runs, log_loss = noisy()
    assert miss(runs, log_loss) < 0.8 * miss(replace(runs, sigma=None), log_loss)


def test_weights_help():
    weights_help()


def test_inverted_weights_are_caught(monkeypatch):
    """The mutant, once released with a paper's code: the noisiest runs weigh most."""
    monkeypatch.setattr(Runs, "weights", property(lambda runs: np.ones(len(runs)) if runs.sigma is None else
                                                  runs.sigma / np.median(runs.sigma)))  # fmt: skip
    with pytest.raises(AssertionError):
        weights_help()


def test_a_weight_of_two_is_a_row_twice():
    runs, log_loss = noisy(1)
    runs = replace(runs, loss=np.exp(log_loss[0]))
    often = 1 + np.arange(42) % 3
    twice = np.repeat(np.arange(42), often)
    weighted, found = fit_runs("chinchilla", replace(runs, sigma=0.01 / often))
    lines = np.arange(len(twice))
    names = ("params", "samples", "flops", "loss")
    rows = {name: getattr(runs, name)[twice] for name in names}
    repeated, other = fit_runs("chinchilla", replace(runs, sigma=None, cluster=lines, line=lines, **rows))
    assert weighted == pytest.approx(repeated, rel=1e-4)
    assert found.solved.objective[0] * np.median(often) == pytest.approx(other.solved.objective[0], rel=1e-6)
    scaled, _ = fit_runs("chinchilla", replace(runs, sigma=7.0 / often))
    assert scaled == weighted


def test_resamples_are_weighted_too():
    runs, log_loss = noisy(1)
    task, sd = problem("chinchilla", runs), []
    for weights in (runs.weights, None):
        full = fit(task, log_loss, (np.ones(42) if weights is None else weights)[None], keep=4)
        drawn = bootstrap(task, log_loss, runs.cluster, full.solved.theta, 200, 0, row_weights=weights)
        sd.append(float(exponents("chinchilla", drawn.values)[0].std()))
    assert sd[0] < 0.8 * sd[1]


def test_the_count_of_parameters_is_judged_at_the_users_delta(monkeypatch):
    seen = []

    def fitted(form, runs, delta):
        seen.append(delta)
        return fit_runs(form, runs, delta)

    monkeypatch.setattr(check, "fit_runs", fitted)
    runs, log_loss = noisy(1)
    runs = replace(runs, loss=np.exp(log_loss[0]), also_params=runs.params)
    analyse(runs, "chinchilla", resamples=0, delta=0.01)
    assert seen == [0.01]
