"""Measured noise as weights: 1 / sigma, not its inverse."""

from dataclasses import replace

import numpy as np
import pytest

from scaling_tables import TRUTH, isoflop_design, simulated
from selfsup.scaling import check, law
from selfsup.scaling.analyse import analyse
from selfsup.scaling.bootstrap import bootstrap
from selfsup.scaling.extrapolate import errors_on
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


def said(runs):
    """{check: (value, text, refuses)}."""
    result = analyse(runs, "chinchilla", resamples=0)
    found = {one["check"]: (one["value"], one["text"], False) for one in result.warnings}
    return found | {one["check"]: (one["value"], one["text"], True) for one in result.refused}


def test_an_outlier_is_told_by_its_own_numbers():
    """One row of sigma .2% is 3% off; another, of sigma 20%, is 40% off, as it may be."""
    params, samples = isoflop_design(budgets=6, sizes=7, reach=5)
    runs = simulated(params, samples, 0.002)
    sigma, off = np.full(42, 0.002), np.ones(42)
    sigma[5], off[5], off[30] = 0.2, 1.4, 1.03
    value, text, _ = said(replace(runs, loss=runs.loss * off, sigma=sigma))["outliers"]
    assert "1 rows" in text and "(lines 32)" in text and "40" not in text
    assert 10 < value < 25


def largest_are_noisy(off=1.0):
    params, samples = isoflop_design(budgets=6, sizes=7, reach=5)
    runs = simulated(params, samples)
    sigma = np.where(np.arange(42) >= 35, 0.15, 0.002)
    error = sigma * np.random.default_rng(0).standard_normal(42)
    loss = runs.loss * np.exp(error) * np.where(np.arange(42) >= 35, off, 1.0)
    return replace(runs, loss=loss, sigma=sigma, budget=np.round(runs.flops, -15))


def test_noise_that_was_measured_is_no_refusal():
    """A right law whose held-out runs scatter by 15%: they say nothing. 1.8 times the loss is beyond their noise, and
    exact rows among noisy ones say enough."""
    found = said(largest_are_noisy())
    assert "extrapolation" not in found and "by --sigma" in found["no extrapolation"][1]
    assert said(largest_are_noisy(1.8))["extrapolation"][2]
    assert said(replace(largest_are_noisy(), sigma=None))["extrapolation"][2]
    mixed = largest_are_noisy()
    sigma = np.where(np.arange(42) >= 38, 0.15, 0.002)
    exact = law.chinchilla(**TRUTH, params=mixed.params, samples=mixed.samples)
    loss = np.where(sigma > 0.1, mixed.loss, exact)
    assert not {"extrapolation", "no extrapolation"} & set(said(replace(mixed, loss=loss, sigma=sigma)))


def test_the_chance_error_is_that_of_simulated_noise():
    """Mean and standard deviation of weighted |noise|, 20,000 times."""
    runs = largest_are_noisy().take(np.arange(42) > 32)
    noise = np.abs(runs.sigma * np.random.default_rng(0).standard_normal((20_000, len(runs))))
    mean = noise @ runs.weights / runs.weights.sum()
    found = errors_on(runs, runs, runs.loss, runs.loss)
    assert found.chance_error == pytest.approx(mean.mean() + 3 * mean.std(), rel=0.02)


def test_rows_of_no_weight_do_not_identify_a_law():
    """16 good rows at one D/N, 8 beside it with a sigma of 30%: the condition is that of the weighted gradient."""
    params = np.concatenate([np.geomspace(1e8, 1e10, 16), np.geomspace(1e8, 1e10, 8)])
    samples = params * np.concatenate([np.full(16, 20.0), np.tile([2.0, 200.0], 4)])
    runs = simulated(params, samples, 0.001)
    sigma = np.where(np.arange(24) < 16, 0.001, 0.3)
    assert "condition" not in said(runs)
    assert "condition" in said(replace(runs, sigma=sigma))
