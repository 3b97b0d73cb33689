"""The laws against slow loops, their gradients against finite differences, optima against a search, truth recovered."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from scaling_tables import TRUTH, isoflop_design, simulated
from selfsup.scaling import law, optimum
from selfsup.scaling.analyse import analyse
from selfsup.scaling.broken import broken_problem
from selfsup.scaling.cost import Cost, fit_cost
from selfsup.scaling.fit import FORMS, exponents, fit, fit_runs, predict
from selfsup.scaling.isoflop import frontier, isoflop
from selfsup.scaling.predict import predict_plan
from selfsup.scaling.repeats import fit_repeats, repeats_problem
from selfsup.scaling.result import loss_at
from selfsup.scaling.rules import Setting, olmo, porian, steplaw
from selfsup.scaling.isoflop_form import analyse_isoflop
from selfsup.scaling.sweeps import fit_rule, optimal_setting
from selfsup.scaling.table import Runs, runs_of

KAPLAN = {"Nc": 6.4e13, "Dc": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}
BROKEN = {"a": 1.5, "b": 40.0, "c0": 0.1, "c1": 0.25, "d1": 1e9, "f1": 0.4}


def test_laws_are_their_formulas():
    n, d, u = 3.0e8, 7.0e9, 1.0e9
    assert law.chinchilla(**TRUTH, params=n, samples=d) == pytest.approx(
        1.8172 + 477.8 / n**0.3473 + 2143 / d**0.3672
    )
    inner = (KAPLAN["Nc"] / n) ** (0.076 / 0.103) + KAPLAN["Dc"] / d
    assert law.kaplan(**KAPLAN, params=n, samples=d) == pytest.approx(inner**0.103)
    bend = (1 + (d / 1e9) ** (1 / 0.4)) ** (-0.25 * 0.4)
    assert law.broken(**BROKEN, x=d) == pytest.approx(1.5 + 40 * d**-0.1 * bend)
    assert law.effective(d, u, 15.0) == pytest.approx(u + u * 15 * (1 - math.exp(-(d / u - 1) / 15)))
    assert law.effective(d, u, np.inf) == pytest.approx(d) and law.effective(0.5 * u, u, 15.0) == 0.5 * u


def test_first_repeats_are_nearly_worth_fresh_data():
    """2305.16264: up to four epochs cost little; many are worth nothing beyond U (1 + R*)."""
    assert 3.6 < law.effective(4.0, 1.0, 15.387756) < 4.0
    assert law.effective(1e6, 1.0, 15.387756) == pytest.approx(16.387756)


def unique_table():
    params, samples = isoflop_design()
    return params, samples, samples / np.tile([0.5, 2.0, 8.0], len(params) // 3)


def models():
    params, samples, unique = unique_table()
    x, y = np.log(params) - np.log(params).mean(), np.log(samples) - np.log(samples).mean()
    return {
        "chinchilla": (law.chinchilla_model(x, y), [1.8, 0.4, 0.5, 0.34, 0.37]),
        "tied": (law.tied_model(x, y), [1.8, 0.4, 0.5, 0.34]),
        "kaplan": (law.kaplan_model(x, y), [3.0, 2.0, 0.7, 0.1]),
        "repeats": (law.repeats_model(TRUTH, params, samples, unique), [2.0, 1.0]),
        "repeats jointly": (
            law.joint_repeats_model(x, y, np.log(unique) - np.log(samples).mean()),
            [1.8, 0.4, 0.5, 0.34, 0.37, 2.0, 1.0],
        ),
        "bnsl": (law.broken_model(x), [1.5, 0.6, 0.2, 0.3, 0.4, -0.7]),
    }


def gradient_error(model, theta):
    """Largest difference between the gradient and central differences."""
    theta = np.array([theta])
    found = model(theta)[1][0]
    worst = 0.0
    for k in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[0, k] = 1e-6
        slope = (model(theta + step)[0] - model(theta - step)[0])[0] / 2e-6
        worst = max(worst, float(np.abs(slope - found[k]).max()))
    return worst


@pytest.mark.parametrize("name", ["chinchilla", "tied", "kaplan", "repeats", "repeats jointly", "bnsl"])
def test_gradients(name):
    assert gradient_error(*models()[name]) < 1e-7


def test_repeats_jointly_is_the_law():
    """The solver's seven parameters against the law of people, sizes above and below what the data are optimal for."""
    params, samples, unique = unique_table()
    above = params > law.optimal_params(**TRUTH, samples=unique)
    assert above.any() and not above.all()
    x, y = np.log(params).mean(), np.log(samples).mean()
    model = law.joint_repeats_model(np.log(params) - x, np.log(samples) - y, np.log(unique) - y)
    theta = [TRUTH["E"], TRUTH["A"] * np.exp(-TRUTH["alpha"] * x), TRUTH["B"] * np.exp(-TRUTH["beta"] * y)]
    found = model(np.array([[*theta, TRUTH["alpha"], TRUTH["beta"], np.log(12.0), np.log(4.0)]]))[0][0]
    assert np.exp(found) == pytest.approx(law.repeats(TRUTH, 12.0, 4.0, params, samples, unique), rel=1e-12)


def test_a_wrong_gradient_is_caught():
    model, theta = models()["chinchilla"]

    def wrong(values):
        f, J = model(values)
        return f, J * np.array([1, 1, 1, 1, 1.01])[:, None]

    assert gradient_error(wrong, theta) > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_truth_without_noise_is_recovered(form):
    params, samples = isoflop_design()
    truth = {"chinchilla": TRUTH, "tied": {**TRUTH, "beta": TRUTH["alpha"]}, "kaplan": KAPLAN}[form]
    runs = runs_of(params, samples, predict(form, truth, params, samples))
    values, found = fit_runs(form, runs)
    assert found.solved.converged[0] and found.agreed[0] >= 2
    for name, value in truth.items():
        assert values[name] == pytest.approx(value, rel=1e-6), name


def test_truth_with_noise_is_near():
    params, samples = isoflop_design(budgets=8, sizes=9)
    values, _ = fit_runs("chinchilla", simulated(params, samples, noise=0.002))
    assert float(exponents("chinchilla", values)[0]) == pytest.approx(0.5139, abs=0.02)
    assert values["E"] == pytest.approx(1.8172, abs=0.06)


def test_repeats_are_recovered():
    params, samples, unique = unique_table()
    loss = law.repeats(TRUTH, 12.0, 4.0, params, samples, unique)
    runs = Runs(
        params, samples, 6 * params * samples, loss, np.arange(len(loss)), np.arange(len(loss)), unique=unique
    )
    task = repeats_problem(runs, TRUTH)
    found, _ = fit_repeats(task, np.log(loss))
    assert np.exp(found.solved.theta[0]) == pytest.approx([12.0, 4.0], rel=1e-5)


def test_a_broken_law_is_recovered():
    x = np.geomspace(1e6, 1e12, 40)
    runs = runs_of(np.ones(40), x, law.broken(**BROKEN, x=x))
    task = broken_problem(runs)
    found = fit(task, np.log(runs.loss)[None], np.ones((1, 40)), keep=32)
    values = {name: value[0] for name, value in task.coefficients(found.solved.theta).items()}
    for name, value in BROKEN.items():
        assert values[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("count", [5, 11])
def test_a_broken_law_of_few_points_is_refused(count):
    x = np.geomspace(1e6, 1e12, count)
    with pytest.raises(ValueError, match=f"at least 12 different values of its axis, got {count}"):
        broken_problem(runs_of(np.ones(count), x, law.broken(**BROKEN, x=x)))


@pytest.mark.parametrize(("form", "truth"), [("chinchilla", TRUTH), ("kaplan", KAPLAN)])
def test_the_optimum_is_that_of_a_search(form, truth):

    def loss(log_n, product):
        return float(predict(form, truth, np.exp(log_n), product / np.exp(log_n)))

    for flops, per in ((1e19, 6.0), (1e23, 7.3)):
        found = optimum.optimum(form, truth, flops, Cost(per))
        best = minimize_scalar(
            loss, args=(flops / per,), bounds=(5, 45), method="bounded", options={"xatol": 1e-10}
        )
        assert float(np.log(found.params)) == pytest.approx(best.x, abs=1e-5)
        assert float(found.loss) == pytest.approx(best.fun, rel=1e-12)
        assert float(found.params * found.samples * per) == pytest.approx(flops)


@pytest.mark.parametrize(("form", "truth"), [("chinchilla", TRUTH), ("kaplan", KAPLAN)])
def test_the_price_is_what_the_optimum_would_not_have_needed(form, truth):
    best = optimum.optimum(form, truth, 1e22, Cost(6.0))
    for factor in (0.25, 4.0):
        above, wasted = optimum.price(form, truth, 1e22, Cost(6.0), factor)
        less = optimum.optimum(form, truth, 1e22 * (1 - float(wasted)), Cost(6.0))
        assert float(less.loss) == pytest.approx(float(best.loss + above), rel=1e-12) and above > 0


@pytest.mark.parametrize("cost", [Cost(6.0, 2400.0, 1 / 3), Cost(6.0, -3e6, 0.9), Cost(5.0, 90.0, 0.1)])
@pytest.mark.parametrize(("form", "truth"), [("chinchilla", TRUTH), ("kaplan", KAPLAN)])
def test_the_optimum_where_compute_is_not_6nd(form, truth, cost):
    """Against a bounded search over sizes; also the price, and the limited optimum with data enough."""

    def loss(log_n, flops):
        n = np.exp(log_n)
        return float(predict(form, truth, n, flops / (cost.per(n) * n)))

    for flops in (1e19, 1e23):
        found = optimum.optimum(form, truth, flops, cost)
        best = minimize_scalar(loss, args=(flops,), bounds=(16, 35), method="bounded", options={"xatol": 1e-10})
        assert float(np.log(found.params)) == pytest.approx(best.x, abs=1e-5)
        assert float(found.loss) == pytest.approx(best.fun, rel=1e-12)
        above, wasted = optimum.price(form, truth, flops, cost, 4.0)
        assert found.loss + above == pytest.approx(loss(np.log(4.0 * found.params), flops), rel=1e-9)
        less = optimum.optimum(form, truth, flops * (1 - wasted), cost)
        assert float(less.loss) == pytest.approx(float(found.loss) + above, rel=1e-12)
        if form == "chinchilla":
            enough = optimum.limited_optimum(truth, (15.4, 5.3), flops, cost, 1e15)
            assert float(enough.loss) == pytest.approx(best.fun, rel=1e-6)


def test_a_cost_is_found_and_a_constant_one_kept():
    params, samples = isoflop_design()
    for power in (1 / 3, 2 / 3):
        extra = 0.8 * params.min() ** power * 6
        found = fit_cost(params, samples, (6 + extra * params**-power) * params * samples, 7.0)
        assert found.base == pytest.approx(6, rel=1e-3) and found.power == pytest.approx(power, rel=1e-3)
        assert found.off < 1e-4
    assert fit_cost(params, samples, 6.5 * params * samples, 6.5) == Cost(6.5, off=pytest.approx(0))
    noise = np.exp(0.05 * np.random.default_rng(0).standard_normal(len(params)))
    assert fit_cost(params, samples, 6 * noise * params * samples, 6.0).off == pytest.approx(0.1, abs=0.06)


def test_a_plan_where_compute_is_not_6nd():
    """C = 6 (N + 400 N^(2/3)) D, as attention adds: the plan spends the budget, at the size that a search finds.
    With one C / (N D) for all sizes it spent .74 of it."""
    params, samples = isoflop_design(budgets=6, sizes=7, reach=5)
    cost = Cost(6.0, 2400.0, 1 / 3)
    flops = cost.per(params) * params * samples
    exact = simulated(params, samples, 1e-4)
    runs = replace(exact, flops=flops, cost=fit_cost(params, samples, flops, 8.0), measured_flops=True)
    result = analyse(runs, "chinchilla", resamples=0)
    found = predict_plan(result, 1e22)
    best = minimize_scalar(
        lambda x: float(predict("chinchilla", TRUTH, np.exp(x), 1e22 / cost.per(np.exp(x)) / np.exp(x))),
        bounds=(16, 35), method="bounded",
    )  # fmt: skip
    n, d = found.values["params"][0], found.values["samples"][0]
    assert float(cost.per(n)) * n * d == pytest.approx(1e22, rel=2e-3)
    assert n == pytest.approx(np.exp(best.x), rel=0.05)
    assert any("here N grows as C^0.5" in note for note in found.notes)
    assert any("C / (N D) is extrapolated" in note for note in found.notes)
    assert "approaches" not in {one["check"] for one in result.warnings + result.refused}
    blind = predict_plan(analyse(replace(runs, cost=Cost(8.5)), "chinchilla", resamples=0), 1e22).values
    assert float(cost.per(blind["params"][0])) * blind["params"][0] * blind["samples"][0] < 0.9e22


def test_limited_data():
    """With data enough it is the plain optimum; with less, a smaller loss is not to be had, and a search agrees."""
    plain = optimum.optimum("chinchilla", TRUTH, 1e22, Cost(6.0))
    enough = optimum.limited_optimum(TRUTH, (15.4, 5.3), 1e22, Cost(6.0), 1e13)
    assert float(enough.loss) == pytest.approx(float(plain.loss), rel=1e-7)
    unique = 1e10
    short = optimum.limited_optimum(TRUTH, (15.4, 5.3), 1e22, Cost(6.0), unique)
    line = lambda log_n: float(law.repeats(TRUTH, 15.4, 5.3, np.exp(log_n), 1e22 / 6 / np.exp(log_n), unique))  # noqa: E731
    best = min(line(log_n) for log_n in np.linspace(15, 35, 20001))
    assert float(short.loss) == pytest.approx(best, rel=1e-5) and short.loss > plain.loss
    assert short.samples > unique  # some repeats are worth it


def test_exponents_are_slopes_of_the_optimum():
    for form, truth in (("chinchilla", TRUTH), ("kaplan", KAPLAN)):
        small, large = (optimum.optimum(form, truth, c, Cost(6.0)) for c in (1e20, 1e22))
        a, b = exponents(form, truth)
        assert float(np.log(large.params / small.params) / np.log(100)) == pytest.approx(float(a))
        assert float(np.log(large.samples / small.samples) / np.log(100)) == pytest.approx(float(b))


def test_isoflop_optima_of_exact_parabolas():
    """Curves that are parabolas in log N about N* = 0.1 C^0.5: both methods find them."""
    params, samples, loss, budget = [], [], [], []
    for flops in (1e18, 1e19, 1e20):
        for shift in np.linspace(-1.5, 1.5, 7):
            n = 0.1 * flops**0.5 * np.exp(shift)
            params.append(n)
            samples.append(flops / 6 / n)
            loss.append(3 - 0.2 * np.log10(flops / 1e18) + 0.05 * shift**2)
            budget.append(flops)
    runs = runs_of(np.array(params), np.array(samples), np.array(loss))
    curves = isoflop(runs)
    assert curves.parabola[1] == pytest.approx(0.5, abs=1e-9) and curves.parabola[3] == pytest.approx(
        0.5, abs=1e-9
    )
    assert curves.akima[1] == pytest.approx(0.5, abs=2e-3)
    assert [p.parabola_loss for p in curves.profiles] == pytest.approx([3.0, 2.8, 2.6])
    assert not any(p.at_edge or p.outside for p in curves.profiles)
    result = analyse_isoflop(runs, resamples=0)
    assert loss_at("isoflop", result.coefficients, flops=1e18) == pytest.approx(3.0, rel=1e-3)


def test_frontier():
    flops, loss = np.array([3.0, 1.0, 2.0, 4.0, 4.0]), np.array([2.0, 3.0, 3.5, 1.9, 1.8])
    assert frontier(flops, loss).tolist() == [1, 0, 4]


def test_rules():
    assert porian(108e6, 1e9) == Setting(pytest.approx(0.0047), pytest.approx(327_680))
    assert porian(15.6e6, 1e9) == Setting(pytest.approx(0.00896, rel=1e-2), pytest.approx(90_300, rel=1e-2))
    assert olmo(108e6, 1e9).lr == pytest.approx(0.00235)
    assert steplaw(1e9, 1e11).lr == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)


def test_a_rule_is_recovered_from_sweeps():
    sizes, data, rates = np.array([1e7, 1e8, 1e9, 1e7, 1e8]), np.array([1e9, 1e9, 1e9, 1e10, 1e10]), []
    for n, d in zip(sizes, data):
        best = 2.0 * n**-0.7 * d**0.3
        lr, batch = (v.ravel() for v in np.meshgrid(best * 2.0 ** np.arange(-3, 3), 2.0 ** np.arange(4, 9)))
        loss = 3 + 0.002 * np.log(lr / best) ** 2 + 0.003 * np.log(batch / 60) ** 2
        rates.append(optimal_setting(lr, batch, loss)[0])
    factor, powers = fit_rule(np.array(rates), sizes, data)
    assert factor == pytest.approx(2.0, rel=1e-6) and powers == pytest.approx([-0.7, 0.3], abs=1e-8)
    with pytest.raises(ValueError, match="wants 7"):
        optimal_setting(lr[:3], batch[:3], loss[:3])
