"""The design check: what it expects is what sweeps then give, and designs that identify nothing are refused."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from scaling_tables import TRUTH, isoflop_design
from selfsup.scaling import law
from selfsup.scaling.cost import Cost
from selfsup.scaling.fit import exponents
from selfsup.scaling.optimum import optimum
from selfsup.scaling.simulate import Design, judge, laws_of, linear_sd, propose, simulate

NOISE, TARGET = 0.003, 1e22


def design(params, samples):
    return Design(params, samples, 6 * params * samples, np.arange(len(params)))


GRID = design(*isoflop_design(4, 6, 4.0))


def by_scipy(log_loss):
    """A fit of its own: SciPy's least squares from the truth."""
    x, y = np.log(GRID.params), np.log(GRID.samples)

    def residuals(theta):
        e, a, alpha, b, beta = theta
        return np.logaddexp(e, np.logaddexp(a - alpha * x, b - beta * y)) - log_loss

    begin = [np.log(TRUTH["E"]), np.log(TRUTH["A"]), TRUTH["alpha"], np.log(TRUTH["B"]), TRUTH["beta"]]
    e, a, alpha, b, beta = least_squares(residuals, begin, x_scale="jac").x
    return {"E": np.exp(e), "A": np.exp(a), "B": np.exp(b), "alpha": alpha, "beta": beta}


def test_what_is_expected_is_what_sweeps_give():
    """200 sweeps with noise of their own, fitted by SciPy: as many fall within the interval as it says."""
    expected = simulate(GRID, TRUTH, NOISE, TARGET)
    assert expected.failed == 0
    clean = np.log(law.chinchilla(**TRUTH, params=GRID.params, samples=GRID.samples))
    draw = np.random.default_rng(77)
    at = optimum("chinchilla", TRUTH, TARGET, Cost(6.0))
    within_a = within_loss = 0
    for _ in range(200):
        values = by_scipy(clean + NOISE * draw.standard_normal(len(clean)))
        a = float(exponents("chinchilla", values)[0])
        loss = float(law.chinchilla(**values, params=at.params, samples=at.samples))
        within_a += expected.a_interval[0] <= a <= expected.a_interval[1]
        within_loss += expected.loss_interval[0] <= loss <= expected.loss_interval[1]
    # 190 of 200 expected; three standard deviations of the count and of 200 simulated ends.
    assert 176 <= within_a <= 199 and 176 <= within_loss <= 199
    assert expected.errors[1].std() == pytest.approx(linear_sd(GRID, TRUTH, NOISE, TARGET), rel=0.25)


def test_one_ratio_is_refused_and_isoflops_are_not():
    flops = np.geomspace(1e18, 1e20, 20)
    line = design(np.sqrt(flops / 120), 20 * np.sqrt(flops / 120))
    loose, tight = (simulate(d, TRUTH, 0.002, TARGET) for d in (line, design(*isoflop_design(5, 4, 3.0))))
    assert loose.a_interval[1] - loose.a_interval[0] > 0.5
    assert tight.a_interval[1] - tight.a_interval[0] < 0.05
    found = judge(line, loose, TRUTH)
    assert {f.check for f in found if f.refuses} == {"one ratio", "loose exponent"}
    assert "D/N" in next(f for f in found if f.check == "one ratio").text
    assert not any(f.refuses for f in judge(GRID, simulate(GRID, TRUTH, NOISE, TARGET), TRUTH))


def test_too_few_and_too_narrow_are_refused():
    few = design(*(column[:5] for column in isoflop_design(4, 6, 4.0)))
    names = {f.check for f in judge(few, simulate(few, TRUTH, NOISE, TARGET), TRUTH) if f.refuses}
    assert {"few runs", "compute span"} <= names
    narrow = design(*isoflop_design(3, 3, 1.2, 1e18, 3e18))
    expected = simulate(narrow, TRUTH, 0.01, TARGET)
    assert "loose exponent" in {f.check for f in judge(narrow, expected, TRUTH) if f.refuses}


def test_a_minimum_expected_on_the_edge_is_told():
    budget = np.repeat(np.geomspace(1e18, 1e20, 4), 6)
    fine = judge(GRID, simulate(GRID, TRUTH, NOISE, TARGET), TRUTH, budget)
    assert "expected minimum on the edge" not in {f.check for f in fine}
    wrong = {**TRUTH, "A": TRUTH["A"] * 30}
    off = judge(GRID, simulate(GRID, TRUTH, NOISE, TARGET), wrong, budget)
    assert "expected minimum on the edge" in {f.check for f in off}


def test_clusters_widen_and_draws_of_a_pilot_are_laws():
    together = GRID._replace(cluster=np.arange(24) % 6)
    alone = simulate(GRID, TRUTH, NOISE, TARGET).errors[1].std()
    assert simulate(together, TRUTH, NOISE, TARGET).errors[1].std() != alone
    draws = {name: np.linspace(0.9, 1.1, 1000) * value for name, value in TRUTH.items()}
    laws = laws_of(TRUTH, {k: v.tolist() for k, v in draws.items()}, 200)
    assert len(laws["A"]) == 200 and laws["A"].min() == draws["A"][0] and laws["A"].max() == draws["A"][-1]


def test_the_proposal_is_the_best_of_all_candidates():
    params, samples = isoflop_design(2, 7, 6.0, 1e19, 1e21)
    candidates = design(params, samples)
    hours = candidates.flops / 1e18
    first, second = propose(GRID, candidates, hours, TRUTH, NOISE, TARGET, 2)
    before = linear_sd(GRID, TRUTH, NOISE, TARGET) ** 2

    def gain(extra):
        joined = design(np.append(GRID.params, params[extra]), np.append(GRID.samples, samples[extra]))
        return (before - linear_sd(joined, TRUTH, NOISE, TARGET) ** 2) / hours[extra]

    slow = [gain(index) for index in range(len(params))]
    assert first.index == int(np.argmax(slow))
    joined = design(np.append(GRID.params, params[first.index]), np.append(GRID.samples, samples[first.index]))
    assert first.sd == pytest.approx(linear_sd(joined, TRUTH, NOISE, TARGET), rel=0.01)
    assert second.index != first.index and second.sd < first.sd
