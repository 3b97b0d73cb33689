"""Repeated data: base law and half-lives are recovered together, with intervals, and doubted where they should be."""

from dataclasses import replace

import numpy as np
import pytest

from scaling_tables import TRUTH
from selfsup.scaling import law, repeated
from selfsup.scaling.analyse import analyse
from selfsup.scaling.bootstrap import Draws, bootstrap, interval, resample_weights
from selfsup.scaling.fit import fit
from selfsup.scaling.repeated import analyse_repeats
from selfsup.scaling.repeats import draws_over_base, fit_jointly, repeats_problem
from selfsup.scaling.solve import huber
from selfsup.scaling.table import Runs

FULL = {**TRUTH, "R_D": 12.0, "R_N": 4.0}


def table(noise=0.0, seed=0, **more) -> Runs:
    """144 runs of the law, 48 of one epoch, of which 34 are larger than is optimal for their data."""
    params, unique, epochs = (
        axis.ravel()
        for axis in np.meshgrid(np.geomspace(1e7, 3e9, 12), np.geomspace(1e8, 1e10, 4), [1.0, 6.0, 20.0])
    )
    samples = unique * epochs
    loss = law.repeats(TRUTH, FULL["R_D"], FULL["R_N"], params, samples, unique)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    lines = np.arange(len(loss))
    runs = Runs(params, samples, 6 * params * samples, loss, lines, lines, unique=unique)
    return replace(runs, **more)


def test_the_design_has_large_runs_of_one_epoch():
    runs = table()
    large = runs.params > law.optimal_params(**TRUTH, samples=runs.unique)
    fresh = runs.samples <= 1.001 * runs.unique
    assert (fresh & large).sum() == 34 and fresh.sum() == 48


def is_the_truth(values):
    for name, value in FULL.items():
        assert values[name] == pytest.approx(value, rel=1e-5), name


def test_truth_without_noise_is_recovered():
    result = analyse_repeats(table(), None, resamples=0)
    is_the_truth(result.coefficients)
    assert not result.refused
    assert result.extrapolation["mean_error"] < 1e-6  # base law and half-lives of the smaller runs alone


def test_a_base_law_of_all_fresh_runs_is_caught():
    """The mutant: the base law of the runs of one epoch, held. R_N is 11 in place of 4."""
    runs = table()
    base = analyse(runs.take(runs.samples <= 1.001 * runs.unique), "chinchilla", resamples=0)
    values = analyse_repeats(runs, base, resamples=0).coefficients
    with pytest.raises(AssertionError):
        is_the_truth(values)
    assert values["R_N"] > 8


TABLES = 100


@pytest.mark.slow
def test_intervals_cover():
    """100 tables with 1% of noise; one standard deviation of a share of 95% is 2.2%."""
    runs = table()
    task, _, _ = fit_jointly(runs)
    log_loss = np.log(runs.loss) + 0.01 * np.random.default_rng(3).standard_normal((TABLES, len(runs)))
    full = fit(task, log_loss, np.ones((1, len(runs))), keep=4)
    drawn = bootstrap(task, log_loss, runs.cluster, full.solved.theta, 100, 0)
    assert drawn.unconverged <= 0.01 * TABLES * 100
    for name, rows in drawn.values.items():
        ends = [interval(row, 0.95) for row in rows]
        share = np.mean([low <= FULL[name] <= high for low, high in ends])
        assert share >= 0.885, (name, share)


def test_the_base_laws_doubts_are_carried():
    runs = table(0.003)
    fresh = runs.take(runs.samples <= 1.001 * runs.unique)
    base = analyse(fresh, "chinchilla", resamples=100)
    text = {"check": "seed noise", "value": 1.0, "limit": 0.2, "text": "noisy"}
    result = analyse_repeats(runs, replace(base, warnings=[text]), resamples=100)
    assert "base law: seed noise" in {one["check"] for one in result.warnings}
    assert np.ptp(result.draws["E"]) > 0 and set(result.intervals) == {*FULL, "a", "b"}
    held = analyse_repeats(runs, replace(base, draws={}), resamples=100)
    assert set(held.intervals) == set(law.REPEATS) and "fixed base law" in {f["check"] for f in held.warnings}


def test_whole_runs_are_held_out():
    """Rows of one run: all of it is fitted, or all of it is foretold."""
    runs = table(0.003)
    cluster = np.unique(np.stack([runs.params, runs.unique]), axis=1, return_inverse=True)[1].ravel()
    result = analyse_repeats(replace(runs, cluster=cluster, clustered=True), None, resamples=0)
    assert result.extrapolation["held_out"] % 3 == 0 and result.extrapolation["held_out"] > 29


def is_refitted(runs, draws, resamples):
    """In each resample no coefficient of the base law, moved by 1%, lowers that resample's objective."""
    log_loss, weights = np.log(runs.loss), resample_weights(runs.cluster, resamples, np.random.default_rng(0))

    def objective(values):
        base = {name: values[name] for name in law.CHINCHILLA}
        found = law.repeats(base, values["R_D"], values["R_N"], runs.params, runs.samples, runs.unique)
        return huber(log_loss - np.log(found), 1e-3)

    for k in range(resamples):
        values = {name: draws[name][k] for name in FULL}
        least = weights[k] @ objective(values)
        for name in law.CHINCHILLA:
            for factor in (0.99, 1.01):
                assert weights[k] @ objective({**values, name: factor * values[name]}) >= least, (k, name)


def test_the_base_law_is_refitted_in_each_resample(monkeypatch):
    """And the mutant: the base law held at its estimate, half-lives refitted."""
    runs = table(0.01)
    task, found, _ = fit_jointly(runs)
    values = {name: float(value[0]) for name, value in task.coefficients(found.solved.theta).items()}
    draws, _ = repeated._repeats_draws(runs, task, found, None, values, 12, 0, 1e-3)
    is_refitted(runs, draws, 12)
    assert len(np.unique(draws["E"])) == 12

    def held(task, log_loss, cluster, theta, resamples, seed, delta):
        weights = resample_weights(cluster, resamples, np.random.default_rng(seed))
        base = {name: np.full(resamples, values[name]) for name in law.CHINCHILLA}
        found, unconverged = draws_over_base(runs, base, values, weights, delta)
        return Draws({name: value[None] for name, value in found.items()}, unconverged)

    monkeypatch.setattr(repeated, "bootstrap", held)
    draws, _ = repeated._repeats_draws(runs, task, found, None, values, 12, 0, 1e-3)
    with pytest.raises(AssertionError):
        is_refitted(runs, draws, 12)


def test_starts_are_ranked_at_the_given_threshold():
    """A fifth of the runs is far off: the best cell of the grid at a wide threshold is not that at a narrow one."""
    runs = table(0.002)
    log_loss = np.log(runs.loss) + np.where(np.arange(len(runs)) % 5 == 0, 0.1, 0.0) * (runs.samples > runs.unique)
    cells = [(d, n) for d in np.linspace(*np.log((0.05, 1e4)), 24) for n in np.linspace(*np.log((0.05, 1e4)), 24)]
    best = []
    for delta in (1e-3, 1.0):
        value = []
        for d, n in cells:
            found = law.repeats(TRUTH, np.exp(d), np.exp(n), runs.params, runs.samples, runs.unique)
            value.append(huber(log_loss - np.log(found), delta).sum())
        best.append(cells[int(np.argmin(value))])
        start = repeats_problem(runs, TRUTH, delta).begin(log_loss[None], np.ones((1, len(runs))), 1)[0, 0]
        assert start == pytest.approx(best[-1])
    assert best[0] != best[1]


def repeats_are_the_largest(seed=0) -> Runs:
    """20 runs of one epoch, and the 5 largest, which read their data eight times."""
    params = np.repeat(np.geomspace(1e8, 3e9, 5), 4)
    unique = np.append(params * np.tile([5.0, 15.0, 40.0, 100.0], 5), np.full(5, 6e10))
    params = np.append(params, np.geomspace(3e9, 6e9, 5))
    samples = unique * np.repeat([1.0, 8.0], [20, 5])
    loss = law.repeats(TRUTH, 15.0, 5.0, params, samples, unique)
    loss = loss * np.exp(0.001 * np.random.default_rng(seed).standard_normal(25))
    lines = np.arange(25)
    return Runs(params, samples, 6 * params * samples, loss, lines, lines, unique=unique)


def test_half_lives_without_repeats_foretell_nothing():
    """The runs that are held out are the only ones that repeat data: what is left says nothing of R_D."""
    runs = repeats_are_the_largest()
    base = analyse(runs.take(runs.samples <= runs.unique), "chinchilla", resamples=0)
    result = analyse_repeats(runs, base, resamples=0)
    assert result.extrapolation is None and not result.refused
    said = {one["check"]: one["text"] for one in result.warnings}
    assert "fewer than 3 that repeat data" in said["no extrapolation"]


def test_the_mutant_that_holds_them_out_is_caught(monkeypatch):
    """And the mutant: half-lives fitted on runs of one epoch. The right law is refused."""
    monkeypatch.setattr(repeated, "REPEATING", 0)
    with pytest.raises(AssertionError):
        test_half_lives_without_repeats_foretell_nothing()


def test_the_base_laws_parameters_are_counted():
    """24 runs: few for the seven coefficients fitted together, enough for two half-lives over a given base law."""
    runs, row = table(0.002), np.arange(144)
    some = runs.take((row % 9 == 0) | (row % 18 == 1))
    base = analyse(runs.take(runs.samples <= 1.001 * runs.unique), "chinchilla", resamples=0)
    limits = [
        [one["limit"] for one in analyse_repeats(some, given, resamples=0).warnings if one["check"] == "few runs"]
        for given in (base, None)
    ]
    assert len(some) == 24 and limits == [[], [28]]
