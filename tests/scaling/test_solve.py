"""The batched solver against SciPy, one fit at a time."""

import numpy as np
import pytest
from scipy.optimize import minimize

from scaling_tables import isoflop_design, simulated
from selfsup.scaling import law, solve
from selfsup.scaling.bootstrap import bootstrap, resample_weights
from selfsup.scaling.fit import fit, problem
from selfsup.scaling.solve import huber
from selfsup.scaling.start import nonnegative

DELTA = 1e-3


def table():
    params, samples = isoflop_design(budgets=4, sizes=7)
    return simulated(params, samples, noise=0.01, seed=3)


def scipy_objective(task, log_loss, weights, theta):
    """The least that BFGS on log E, log A', log B', alpha, beta reaches from four starts about theta."""

    def value(free):
        point = np.array([[*np.exp(free[:3]), *free[3:]]])
        f, J = task.model(point)
        r = log_loss - f[0]
        slopes = J[0] * np.array([*np.exp(free[:3]), 1, 1])[:, None]
        return (weights * huber(r, DELTA)).sum() / DELTA, -slopes @ (
            weights * np.clip(r, -DELTA, DELTA)
        ) / DELTA

    draw = np.random.default_rng(0)
    begin = np.concatenate([np.log(np.maximum(theta[:3], 1e-6)), theta[3:]])
    ends = []
    for scale in (0.0, 0.05, 0.2, 0.4):
        start = begin + scale * draw.standard_normal(5)
        end = minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 3000})
        if (end.x[3:] > 0).all():
            ends.append(end.fun * DELTA)
    return min(ends)


def test_resamples_reach_what_scipy_reaches():
    runs = table()
    task, log_loss = problem("chinchilla", runs), np.log(runs.loss)
    weights = resample_weights(runs.cluster, 40, np.random.default_rng(0))
    full = fit(task, log_loss[None], np.ones((1, len(runs))))
    ours = fit(task, log_loss[None], weights, keep=1, also=full.solved.theta)
    assert ours.solved.converged.all()
    worse = [
        float(ours.solved.objective[k]) / scipy_objective(task, log_loss, weights[k], ours.solved.theta[k])
        - 1
        for k in range(len(weights))
    ]
    # Resamples of 28 noisy runs have local optima; SciPy's random starts may find a better one now and then.
    assert np.median(worse) < 1e-8 and np.mean(np.array(worse) > 1e-6) <= 0.05


def test_a_weight_of_two_is_a_row_twice():
    runs = table()
    task, log_loss = problem("chinchilla", runs), np.log(runs.loss)
    weights = np.ones(len(runs))
    weights[3], weights[5] = 2, 0
    theta = np.array([[1.8, 0.4, 0.5, 0.35, 0.37]])
    one = solve.solve(task.model, theta, log_loss[None], weights[None], task.bounds)
    rows = np.repeat(np.arange(len(runs)), weights.astype(int))
    x, y = np.log(runs.params), np.log(runs.samples)
    model = law.chinchilla_model((x - x.mean())[rows], (y - y.mean())[rows])
    two = solve.solve(model, theta, log_loss[rows][None], np.ones((1, len(rows))), task.bounds)
    assert one.objective[0] == pytest.approx(two.objective[0], rel=1e-9)
    assert one.theta[0] == pytest.approx(two.theta[0], rel=1e-4)


def bounded_case():
    """Noisy runs at few steps apart whose resamples press E and exponents against their bounds."""
    params, samples = isoflop_design(budgets=3, sizes=5, low=1e16, high=1e17)
    runs = simulated(params, samples, noise=0.05, seed=1)
    task, log_loss = problem("chinchilla", runs), np.log(runs.loss)
    theta = fit(task, log_loss[None], np.ones((1, len(runs)))).solved.theta
    return task, log_loss[None], resample_weights(runs.cluster, 200, np.random.default_rng(0)), theta


def test_on_the_bounds_fits_converge_to_a_stationary_point():
    task, log_loss, weights, theta = bounded_case()
    found = solve.solve(task.model, np.repeat(theta, 200, 0), log_loss, weights, task.bounds)
    assert found.converged.mean() > 0.98
    low, high = task.bounds
    at_bound = (found.theta <= low) | (found.theta >= high)
    assert at_bound.any(1).mean() > 0.1  # the case is what it claims to be
    f, J = task.model(found.theta)
    r = log_loss - f
    g = -np.einsum("rpn,rn->rp", J, weights * np.clip(r, -DELTA, DELTA))
    pull = weights * np.minimum(1, DELTA / np.maximum(np.abs(r), 1e-12))
    size = np.sqrt(np.einsum("rpn,rn->rp", J**2, pull))
    free = np.where(at_bound, 0, g / np.maximum(size, 1e-9))
    assert (np.abs(free[found.converged]) < 0.01 * np.sqrt(found.objective[found.converged])[:, None]).all()
    assert (np.where(found.theta <= low, g, 0)[found.converged] >= -1e-7).all()


def test_clipping_alone_is_caught(monkeypatch):
    """The mutant: a step that leaves the bounds is clipped, and the others are left as they were."""
    task, log_loss, weights, theta = bounded_case()

    def clipped(K, g, at, fixed, low, high):
        return solve._solved(K, -g, fixed)

    monkeypatch.setattr(solve, "_bounded_step", clipped)
    found = solve.solve(task.model, np.repeat(theta, 200, 0), log_loss, weights, task.bounds, max_steps=300)
    assert found.converged.mean() < 0.97


def test_a_stop_is_not_called_an_optimum():
    task, log_loss, weights, theta = bounded_case()
    found = solve.solve(task.model, np.repeat(theta, 200, 0), log_loss, weights, task.bounds, max_steps=2)
    assert found.converged.mean() < 0.5 and (found.steps > 0).all()


def test_unconverged_resamples_are_counted(monkeypatch):
    runs = table()
    task, log_loss = problem("chinchilla", runs), np.log(runs.loss)[None]
    theta = fit(task, log_loss, np.ones((1, len(runs)))).solved.theta
    assert bootstrap(task, log_loss, runs.cluster, theta, 100, 0).unconverged == 0
    whole = solve._descend
    monkeypatch.setattr(solve, "_descend", lambda *a: whole(*a[:-1], 3))
    assert bootstrap(task, log_loss, runs.cluster, theta, 100, 0).unconverged > 20


def test_nonnegative_least_squares():
    from scipy.optimize import nnls

    draw = np.random.default_rng(0)
    A, b = draw.standard_normal((50, 20, 3)), draw.standard_normal((50, 20))
    found, _ = nonnegative(A.transpose(0, 2, 1) @ A, np.einsum("rnp,rn->rp", A, b))
    for k in range(50):
        assert found[k] == pytest.approx(nnls(A[k], b[k])[0], abs=1e-8)


def test_clusters_are_drawn_whole():
    cluster = np.array([0, 0, 0, 1, 2, 2])
    weights = resample_weights(cluster, 500, np.random.default_rng(0))
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 4] == weights[:, 5]).all()
    assert (weights[:, [0, 3, 4]].sum(1) == 3).all()
    assert weights[:, [0, 3, 4]].mean(0) == pytest.approx([1, 1, 1], abs=0.12)


def test_huber_is_its_definition():
    r = np.array([-3.0, -0.5, 0.0, 0.2, 2.0])
    slow = [0.5 * v * v if abs(v) <= 1 else abs(v) - 0.5 for v in r]
    assert huber(r, 1.0) == pytest.approx(slow)
