"""Each pitfall planted once, and found; a clean design, and nothing is said."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from scaling_tables import TRUTH, checkpoint_design, epoch, is_epochs_fit, isoflop_design, simulated
from selfsup.scaling import check, design, law, start, sweeps
from selfsup.scaling.analyse import analyse
from selfsup.scaling.check_isoflop import check_isoflop
from selfsup.scaling.design import check_design, check_untrained, seed_spread
from selfsup.scaling.extrapolate import held_out_runs
from selfsup.scaling.fit import fit, fit_runs, problem
from selfsup.scaling.isoflop import isoflop
from selfsup.scaling.predict import predict_run
from selfsup.scaling.repeated import analyse_repeats
from selfsup.scaling.broken_form import analyse_broken
from selfsup.scaling.isoflop_form import analyse_isoflop
from selfsup.scaling.sweeps import best_learning_rates
from selfsup.scaling.table import Runs, runs_of, same_cell


def clean(noise=0.001, seed=0) -> Runs:
    params, samples = isoflop_design(budgets=6, sizes=7, reach=5)
    return simulated(params, samples, noise, seed)


def found(result):
    """{check: (value, limit, refuses)}."""
    said = {f["check"]: (f["value"], f["limit"], False) for f in result.warnings}
    return said | {f["check"]: (f["value"], f["limit"], True) for f in result.refused}


def test_a_clean_design_is_not_accused():
    """Over five seeds: nothing is refused; at most a stray warning (each check is a test of chance or near it)."""
    said = [found(analyse(clean(seed=seed), "chinchilla", resamples=200)) for seed in range(5)]
    assert not any(refuses for one in said for *_, refuses in one.values())
    assert sum(len(one) for one in said) <= 3


def scattered(seed):
    """150 runs on no grid, no two of one compute."""
    draw = np.random.default_rng(seed)
    params = 10 ** draw.uniform(7.5, 10, 150)
    return simulated(params, params * 10 ** draw.uniform(0.7, 2.3, 150), 0.002, seed)


def checkpoints(seed):
    """Four checkpoints of each of 32 runs, whose noise is mostly common, with --cluster."""
    params, samples, cluster = checkpoint_design()
    runs = simulated(params, samples, 0.0005, seed, cluster)
    common = 0.003 * np.random.default_rng(100 + seed).standard_normal(32)[cluster]
    return replace(runs, loss=runs.loss * np.exp(common))


def small(seed):
    """Four isoFLOP curves of six sizes."""
    return simulated(*isoflop_design(budgets=4, sizes=6, reach=5.0), 0.001, seed)


OF_BUDGETS = {"minimum on the edge", "few budgets", "approaches", "parabola and Akima", "parabola width"}


def silent(tables, but=()):
    """Over three seeds: nothing is refused, and of a dozen and more checks at most one speaks once."""
    said = [found(analyse(tables(seed), "chinchilla", resamples=200)) for seed in range(3)]
    assert not any(refuses for one in said for *_, refuses in one.values()), said
    assert sum(len(set(one) - set(but)) for one in said) <= 1, said


@pytest.mark.parametrize("tables", [checkpoints, small])
def test_healthy_tables_are_not_accused(tables):
    silent(tables)


def test_a_table_on_no_grid_is_not_accused_of_its_fit():
    silent(scattered, but=OF_BUDGETS)


def test_a_table_on_no_grid_has_no_budgets():
    silent(scattered)


def expect(result, name, refuses=False):
    said = found(result)
    assert name in said, sorted(said)
    value, limit, refused = said[name]
    assert refused == refuses and np.isfinite(value) and np.isfinite(limit)
    return value


def of(params, samples, noise=0.002, **more):
    return analyse(replace(simulated(params, samples, noise), **more), "chinchilla", resamples=0)


def test_one_ratio_is_refused():
    params = np.geomspace(1e8, 1e10, 20)
    result = of(params, 20 * params)
    assert expect(result, "one ratio", True) < 1.01
    assert expect(result, "condition", True) > 3000


def test_data_growing_with_size_is_refused():
    """Another line in (log N, log D) than D = 20 N is no better, wide as its ratios may be."""
    params = np.geomspace(1e8, 1e10, 20)
    assert expect(of(params, 1e-6 * params**1.8), "one ratio", True) > 0.999


def test_a_narrow_ratio_is_told():
    params = np.geomspace(1e8, 1e10, 20)
    assert expect(of(params, params * np.tile([20, 40], 10)), "narrow ratio") == pytest.approx(2)


def test_few_runs():
    params, samples = isoflop_design(budgets=2, sizes=5)
    expect(of(params, samples), "few runs")
    params, samples, cluster = checkpoint_design()
    few = simulated(params, samples, 0.002, cluster=cluster).take(cluster < 5)
    result = analyse(few, "chinchilla", resamples=100)
    assert expect(result, "few runs", True) == 5
    expect(result, "few clusters")


@pytest.mark.parametrize("clusters", [1, 4])
@pytest.mark.parametrize("form", ["chinchilla", "isoflop", "bnsl", "repeats"])
def test_too_few_clusters_write_no_interval(form, clusters):
    """Of one cluster every resample is the table itself: an interval would have no width."""
    runs = clean(0.002)
    runs = replace(runs, cluster=np.arange(len(runs)) % clusters, clustered=True)
    match form:
        case "chinchilla":
            result = analyse(runs, form, resamples=100)
        case "isoflop":
            result = analyse_isoflop(runs, resamples=100)
        case "bnsl":
            result = analyse_broken(runs, "tokens", resamples=100)
        case _:
            unique = runs.samples / np.where(np.arange(len(runs)) % 3, 1.0, 6.0)
            result = analyse_repeats(replace(runs, unique=unique), None, resamples=100)
    assert expect(result, "few clusters", True) == clusters
    assert result.intervals == {} and result.draws == {} and result.about["resamples"] == 0
    if form in ("chinchilla", "repeats"):
        at = {"unique": 1e9} if form == "repeats" else {}
        assert predict_run(result, 1e9, 1e10, **at).values["loss"][1:] == [None, None]


@pytest.mark.parametrize("form", ["isoflop", "bnsl", "repeats"])
def test_nine_clusters_are_told_in_every_form(form):
    runs = clean(0.002)
    runs = replace(runs, cluster=np.arange(len(runs)) % 9, clustered=True)
    unique = runs.samples / np.where(np.arange(len(runs)) % 3, 1.0, 6.0)
    if form == "isoflop":
        result = analyse_isoflop(runs, resamples=100)
    elif form == "bnsl":
        result = analyse_broken(runs, "tokens", resamples=100)
    else:
        result = analyse_repeats(replace(runs, unique=unique), None, resamples=100)
    assert expect(result, "few clusters") == 9 and result.intervals


def test_two_sizes():
    params, samples = np.tile([1e8, 1e9], 8), np.repeat(np.geomspace(1e9, 1e11, 8), 2)
    assert expect(of(params, samples), "few sizes", True) == 2


def test_repeated_data():
    runs = clean()
    assert expect(of(runs.params, runs.samples, unique=runs.samples / 3), "repeated data") == pytest.approx(3)


def test_short_runs_and_long_warm_ups():
    runs = clean()
    steps = np.full(len(runs), 2000.0)
    steps[:3] = 200
    result = of(runs.params, runs.samples, steps=steps, warmup=np.full(len(runs), 100.0))
    assert expect(result, "short runs") == 200
    assert expect(result, "warm-up") == pytest.approx(0.5)


def test_compute_off_the_budget():
    runs = clean()
    assert expect(of(runs.params, runs.samples, budget=runs.flops * 1.03), "off budget") == pytest.approx(
        0.03, abs=1e-3
    )
    assert "off budget" not in found(of(runs.params, runs.samples, budget=runs.flops * 1.005))


def test_missing_steps_are_counted():
    """What is there is judged, what is not is counted; no number that is written is NaN."""
    runs = clean()
    steps, warmup, first = (np.full(len(runs), value) for value in (2000.0, 100.0, 10.9))
    steps[:3], steps[3], warmup[3:5], warmup[5], first[7:] = 200, np.nan, np.nan, 1000.0, np.nan
    runs = replace(runs, steps=steps, warmup=warmup, initial_loss=first)
    said = [*check_design(runs, "chinchilla"), *check_untrained(runs, 50_000)]
    assert all(np.isfinite(one.value) and np.isfinite(one.limit) and "nan" not in one.text for one in said)
    assert [(one.check, one.value) for one in said] == [
        ("missing values", 1), ("short runs", 200), ("missing values", 2), ("warm-up", 0.5), ("missing values", 35)
    ]  # fmt: skip
    assert [one.text[:13] for one in said[1:4:2]] == ["3 of 41 rows ", "4 of 40 rows "]
    nothing = replace(runs, steps=np.full(42, np.nan), warmup=np.full(42, np.nan), initial_loss=np.full(42, np.nan))
    said = [*check_design(nothing, "chinchilla"), *check_untrained(nothing, 50_000)]
    assert [(one.check, one.value) for one in said] == [("missing values", 42)] * 3


def test_initial_loss_and_divergence():
    runs = clean()
    assert not check_untrained(replace(runs, initial_loss=np.full(len(runs), 10.9)), 50_000)
    bits = replace(runs, initial_loss=np.full(len(runs), 10.8 / np.log(2)))
    assert [one.check for one in check_untrained(bits, 50_000)] == ["initial loss"]
    loss = runs.loss.copy()
    loss[4] = 11.0
    diverged = replace(runs, loss=loss)
    assert [one.check for one in check_untrained(diverged, 50_000)] == ["diverged"]
    result = analyse(diverged, "chinchilla", 0)
    assert expect(result, "outliers") > 10
    assert "lines 6" in next(f["text"] for f in result.warnings if f["check"] == "outliers")


def test_seed_noise():
    params, samples = (np.tile(v, 3) for v in isoflop_design(budgets=3, sizes=5, reach=3))
    runs = simulated(params, samples, 0.02)
    spread, freedom = seed_spread(runs)
    assert freedom == 30 and spread == pytest.approx(0.02 * runs.loss.mean(), rel=0.35)
    assert "seed noise" in {f.check for f in check_design(runs, "chinchilla")}
    assert "seed noise" not in {
        f.check for f in check_design(simulated(params, samples, 0.001), "chinchilla")
    }


def test_minimum_on_the_edge_and_approaches():
    """Sizes all above the optimum: the isoFLOP form is refused."""
    params, samples = isoflop_design(budgets=4, sizes=6, reach=3)
    result = analyse_isoflop(simulated(params * 8, samples / 8, 1e-4), resamples=100)
    assert expect(result, "minimum on the edge", True) == 1
    assert expect(of(params * 8, samples / 8), "minimum on the edge") == 1


def test_isoflop_needs_budgets():
    runs = clean()
    with pytest.raises(ValueError, match="two with a minimum"):
        analyse_isoflop(runs.take(runs.flops < 1.1e18))


def test_wide_curves_are_no_parabolas():
    params, samples = isoflop_design(budgets=5, sizes=15, reach=30)
    lopsided = {**TRUTH, "alpha": 0.7, "A": 3e5}
    runs = simulated(params, samples, 1e-4, truth=lopsided)
    expect(analyse(runs, "chinchilla", resamples=100), "parabola width")


def test_approaches_that_disagree():
    """A learning rate wrong for large models: their loss is high, the parabolas see it, the law bends."""
    runs = clean(0.0005)
    worse = runs.loss * (1 + 0.15 * np.maximum(0, np.log(runs.params / 6e8)))
    result = analyse(replace(runs, loss=worse), "chinchilla", resamples=100)
    assert expect(result, "approaches") == pytest.approx(0.141, abs=0.03)


@pytest.mark.parametrize(("off", "said"), [(0.02, []), (0.1, [False]), (-0.1, [False]), (0.25, [True])])
def test_how_far_approaches_may_be_apart(off, said):
    """From parabolas (.51) and Akima both: .05 is told, .2 refused."""
    runs = clean(0.0)
    curves = isoflop(runs)
    assert abs(curves.parabola[1] - curves.akima[1]) < 0.02
    doubts = check_isoflop(curves, float(curves.parabola[1]) + off, runs, own=False)
    assert [one.refuses for one in doubts if one.check == "approaches"] == said


def test_an_irreducible_loss_of_zero():
    params, samples = isoflop_design(budgets=3, sizes=5, low=1e17, high=1e18)
    result = analyse(simulated(params, samples, 0.04), "chinchilla", resamples=200)
    expect(result, "loose E")
    none = {**TRUTH, "E": 0.0, "alpha": 0.1, "beta": 0.1, "A": 10.0, "B": 15.0}
    exact = analyse(simulated(params, samples, 0.0, truth=none), "chinchilla", resamples=0)
    assert expect(exact, "E at zero") < 1e-3


def rising_with_size():
    """The (Mis)fitting runs at one large rate: larger models are worse. Unconstrained, alpha is negative."""
    params, samples = isoflop_design()
    loss = 2.0 + 0.02 * np.log(params / 1e8) + 2143 / samples**0.3672
    return runs_of(
        params, samples, loss * np.exp(0.002 * np.random.default_rng(0).standard_normal(len(params)))
    )


def exponents_stay_positive():
    result = analyse(rising_with_size(), "chinchilla", resamples=0)
    assert result.coefficients["alpha"] > 0 and result.coefficients["beta"] > 0
    assert {"exponent at bound", "no dependence"} & {f["check"] for f in result.refused}


def test_exponents_stay_positive():
    exponents_stay_positive()


def test_unconstrained_exponents_are_caught(monkeypatch):
    """The mutant: exponents of any sign are let through, and no error is raised."""
    monkeypatch.setattr(law, "EXPONENT_RANGE", (-40.0, 40.0))
    monkeypatch.setattr(start, "GRID", np.concatenate([-start.GRID[::-1], start.GRID]))
    with pytest.raises(AssertionError):
        exponents_stay_positive()


def test_trend_with_the_ratio():
    runs = clean(0.0005)
    ratio = runs.samples / runs.params
    low, high = np.quantile(ratio, [1 / 3, 2 / 3])
    bent = runs.loss * np.where((ratio > low) & (ratio <= high), 1.01, 1.0)
    result = analyse(replace(runs, loss=bent), "chinchilla", resamples=0)
    assert expect(result, "trend with D/N") < 1e-3


def test_outliers_that_move_the_exponents():
    """Epoch's five highest losses, of 245, move beta from .37 to .45."""
    result = analyse(epoch(drop=0), "chinchilla", resamples=0)
    assert expect(result, "outlier influence") > 0.07
    expect(result, "outliers")


def test_undertrained_small_runs():
    """The cheapest budgets are 1.5% too high, as of runs that were not cooled down."""
    runs = clean(0.002)
    loss = np.where(runs.flops < 3e18, runs.loss * 1.015, runs.loss)
    expect(analyse(replace(runs, loss=loss), "chinchilla", resamples=0), "trend with compute")


def test_cheap_runs_that_carry_the_exponents():
    """Without the cheapest quarter of Epoch's points beta falls from .37 to .27."""
    assert expect(analyse(epoch(), "chinchilla", resamples=0), "cheapest runs") == pytest.approx(
        0.106, abs=0.01
    )


def test_checkpoints_taken_for_runs():
    params, samples, cluster = checkpoint_design()
    noise = 0.01 * np.random.default_rng(0).standard_normal(8)[cluster // 4]
    loss = law.chinchilla(**TRUTH, params=params, samples=samples) * np.exp(noise)
    assert expect(analyse(runs_of(params, samples, loss), "chinchilla", 0), "correlated rows") > 0.5
    assert "correlated rows" not in found(analyse(runs_of(params, samples, loss, cluster), "chinchilla", 0))


def test_checkpoints_before_the_schedule_has_ended():
    params, samples, cluster = checkpoint_design()
    part = np.tile([0.4, 0.6, 0.8, 1.0], 32)
    early = np.where(part < 0.99, 1.03, 1.0)
    runs = simulated(params, samples, 0.002, cluster=cluster)
    assert "curves" not in found(analyse(runs, "chinchilla", 0))
    assert expect(analyse(replace(runs, loss=runs.loss * early), "chinchilla", 0), "curves") > 0.01


def test_a_law_that_does_not_extrapolate_is_refused():
    """Beyond the largest fitted run the losses stop falling (another tokenizer, a bug in large runs)."""
    runs = clean()
    loss = np.where(runs.flops > 3e19, runs.loss * 1.08, runs.loss)
    budget = np.round(np.log10(runs.flops), 2)
    result = analyse(replace(runs, loss=loss, budget=10**budget), "chinchilla", resamples=0)
    assert expect(result, "extrapolation", True) > 0.05


def test_whole_runs_are_held_out():
    """No checkpoint of a held-out run stays in the fit: a fifth of the runs, by the compute at their ends."""
    params, samples, cluster = checkpoint_design()
    runs = simulated(params, samples, 0.002, cluster=cluster)
    held = held_out_runs(runs)
    assert not set(runs.cluster[held]) & set(runs.cluster[~held])
    ends = runs.flops[3::4]
    assert set(runs.cluster[held]) == set(np.argsort(ends)[-7:])
    budget = np.where(np.arange(len(runs)) % 4 == 3, 3.0, np.arange(len(runs)) % 2 + 1.0)
    assert held_out_runs(replace(runs, budget=budget)).all()


def test_counting_convention():
    """Parameters without embeddings see another exponent: Pearce and Song's mechanism, N + w N^(1/3)."""
    params, samples = isoflop_design(low=1e15, high=1e18)
    without = np.maximum(params - 2.5e4 * params ** (1 / 3), 1e3)
    runs = replace(simulated(params, samples, 0.0005), also_params=without)
    assert expect(analyse(runs, "chinchilla", 0), "counting") > 0.05


def test_flops_that_are_not_6nd():
    runs = clean()
    measured = replace(runs, flops=runs.flops * (1 + 0.5 * (runs.params / 1e8) ** -0.5), measured_flops=True)
    assert expect(analyse(measured, "chinchilla", 0), "FLOPs per N D") > 0.2


def test_not_converged_is_refused(monkeypatch):
    from selfsup.scaling import solve

    whole = solve._descend
    monkeypatch.setattr(solve, "_descend", lambda *a: whole(*a[:-1], 1))
    expect(analyse(clean(0.005), "chinchilla", 0), "not converged", True)


def test_unidentified_half_lives():
    """Two epochs at most say little about the half-life."""
    params, samples = isoflop_design()
    unique = samples / np.tile([1.0, 1.5, 2.0], 10)
    loss = law.repeats(TRUTH, 15.0, 5.0, params, samples, unique)
    loss = loss * np.exp(0.003 * np.random.default_rng(0).standard_normal(len(loss)))
    lines = np.arange(len(loss))
    runs = Runs(params, samples, 6 * params * samples, loss, lines, lines, unique=unique)
    expect(analyse_repeats(runs, None, 100), "unidentified R_D")


def test_a_break_that_is_not_there():
    x = np.geomspace(1e6, 1e12, 16)
    loss = (1.5 + 40 * x**-0.2) * np.exp(0.01 * np.random.default_rng(0).standard_normal(16))
    result = analyse_broken(runs_of(np.ones(16), x, loss), "tokens", 100)
    expect(result, "few runs")
    expect(result, "unidentified break")


def swept(rates):
    """Three sizes; the learning rates of each."""
    params = np.concatenate([np.full(len(r), n) for n, r in zip((1e7, 1e8, 1e9), rates)])
    lr = np.concatenate([np.array(r) for r in rates])
    loss = 3 + 0.05 * np.log(lr / (0.5 * params**-0.25)) ** 2
    return replace(runs_of(params, 20 * params, loss), lr=lr)


def test_unequal_sweeps_and_edges():
    fair = [[0.5 * n**-0.25 * f for f in (0.5, 1, 2)] for n in (1e7, 1e8, 1e9)]
    kept, said = best_learning_rates(swept(fair))
    assert len(kept) == 3 and not said and kept.dropped == {"not at the best learning rate of their cell": 6}
    assert kept.loss == pytest.approx([3, 3, 3])
    _, said = best_learning_rates(swept([fair[0], fair[1][1:], fair[2][:1]]))
    assert {f.check for f in said} == {"unequal sweeps", "sweep edge"}
    _, said = best_learning_rates(swept([[0.003]] * 3))
    assert {f.check for f in said} == {"one learning rate"}
    _, said = best_learning_rates(swept([rates[1:2] for rates in fair]))  # a rule of size that nobody tested
    assert {f.check for f in said} == {"no sweep"}


def sweeps_with_jitter_are_matched(jitter):
    """N and D of one cell differ as they do where one is computed from a rounded other."""
    fair = [[0.5 * n**-0.25 * f for f in (0.5, 1, 2)] for n in (1e7, 1e8, 1e9)]
    runs, draw = swept(fair), np.random.default_rng(0)
    off = [1 + jitter * draw.uniform(-1, 1, len(runs)) for _ in range(3)]
    runs = replace(runs, params=runs.params * off[0], samples=runs.samples * off[1], lr=runs.lr * off[2])
    kept, said = best_learning_rates(runs)
    assert len(kept) == 3 and not said and kept.loss == pytest.approx([3, 3, 3])
    seeds = simulated(*(np.repeat(v, 3) * o for v, o in zip(isoflop_design(3, 5, 3), np.tile(off, 5)[:2])), 0.02)
    spread, freedom = seed_spread(seeds)
    assert freedom == 30 and spread == pytest.approx(0.02 * seeds.loss.mean(), rel=0.35)


@pytest.mark.parametrize("jitter", [0.0, 1e-5, 1e-3])
def test_a_cell_is_one_within_a_percent(jitter):
    sweeps_with_jitter_are_matched(jitter)


def test_cells_matched_exactly_are_caught(monkeypatch):
    """The mutant: a difference in the fifth digit hides a sweep."""
    exact = partial(same_cell, within=0.0)
    monkeypatch.setattr(sweeps, "same_cell", exact)
    monkeypatch.setattr(design, "same_cell", exact)
    sweeps_with_jitter_are_matched(0.0)
    with pytest.raises(AssertionError):
        sweeps_with_jitter_are_matched(1e-5)


def test_cells_apart_stay_apart():
    """A table of many sizes 0.8% apart is no single cell, and sizes of other data are no neighbours."""
    chain = 1e8 * 1.008 ** np.arange(100)
    assert np.bincount(same_cell(chain)).max() == 2
    grid = np.array([(n, d) for n in (1.0, 1.02) for d in (1.0, 1.005, 1.02)])
    assert same_cell(*grid.T, None).tolist() == [0, 0, 1, 2, 2, 3]


def test_a_mean_is_no_sum():
    """The mutant: the mean in place of the sum gives the same minimum here and another objective, which the test of
    Epoch's number sees; an optimiser with an absolute tolerance would stop early on it."""
    runs = epoch()
    task = problem("chinchilla", runs)
    mean = fit(task, np.log(runs.loss)[None], np.full((1, len(runs)), 1 / len(runs)))
    values = {name: float(value[0]) for name, value in task.coefficients(mean.solved.theta).items()}
    with pytest.raises(AssertionError):
        is_epochs_fit(values, mean.solved.objective[0])
    is_epochs_fit(values, mean.solved.objective[0] * len(runs))


def test_a_threshold_of_one_is_caught():
    values, wide = fit_runs("chinchilla", epoch(), delta=1.0)
    with pytest.raises(AssertionError):
        is_epochs_fit(values, wide.solved.objective[0])
    assert values["A"] == pytest.approx(
        593, rel=0.01
    )  # the coefficients of a package whose log_huber has delta 1


def test_every_limit_is_beside_its_number():
    result = analyse(clean(0.02), "chinchilla", resamples=200)
    for one in result.warnings + result.refused:
        assert set(one) == {"check", "value", "limit", "text"} and one["text"]
    assert check.check_extrapolation(None)[0].check == "no extrapolation"
