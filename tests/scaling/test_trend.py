"""Residuals that depend on D/N or compute: seen from 12 runs on, and not where the law is right."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from scaling_tables import TRUTH, isoflop_design
from selfsup.scaling import law, trend
from selfsup.scaling.fit import fit, problem
from selfsup.scaling.table import runs_of
from selfsup.scaling.trend import chance_of, check_trends



def share_told(design, bent, seed=0, noise=0.002, cluster=None, tables=100):
    """In what share of simulated tables a trend is told: (any, with D/N, with compute). `bent` multiplies the losses."""
    params, samples = design
    truth = law.chinchilla(**TRUTH, params=params, samples=samples)
    if bent is not None:
        truth = truth * bent(params, samples)
    draw = np.random.default_rng(seed)
    runs = runs_of(params, samples, truth, cluster)
    error = noise * draw.standard_normal((tables, int(runs.cluster.max()) + 1))[:, runs.cluster]
    if cluster is not None:
        error = error + noise / 5 * draw.standard_normal((tables, len(params)))
    task, log_loss = problem("chinchilla", runs), np.log(truth) + error
    found = fit(task, log_loss, np.ones((1, len(params))), keep=3)
    law_there, gradient = task.model(found.solved.theta)
    said = [
        {one.check for one in check_trends(runs, J.T, one_loss - there)}
        for one_loss, there, J in zip(log_loss, law_there, gradient)
    ]
    names = ("trend with D/N", "trend with compute")
    return np.mean([bool(one) for one in said]), *(np.mean([name in one for one in said]) for name in names)


def middle(params, samples):
    """Runs of the middle third of D/N are 1% too high."""
    low, high = np.quantile(samples / params, [1 / 3, 2 / 3])
    return np.where((samples / params > low) & (samples / params <= high), 1.01, 1.0)


def cheap(params, samples):
    """The cheapest runs are 2% too high, as of runs that were not cooled down."""
    return np.where(params * samples < np.quantile(params * samples, 0.3), 1.02, 1.0)


def starved(params, samples):
    """Large models of few samples are trained worse still than the law says: not a sum of a power of N and one of D."""
    few = np.maximum(0, np.log(np.median(samples / params)) - np.log(samples / params))
    return 1 + 0.05 * np.maximum(0, np.log(params / np.median(params))) * few


DESIGNS = {12: (3, 4, 5.0), 15: (3, 5, 6.0), 16: (4, 4, 5.0), 42: (6, 7, 5.0)}


@pytest.mark.parametrize("runs", DESIGNS)
def test_a_wrong_form_is_told(runs):
    """A step in D/N, a step in compute, an interaction: noise 0.2%. 12 runs see a step in D/N in 4 tables of 10."""
    design = isoflop_design(*DESIGNS[runs])
    assert share_told(design, middle)[1] > (0.25 if runs == 12 else 0.8)
    assert share_told(design, cheap)[2] > 0.4
    assert share_told(design, starved)[1] > 0.9


@pytest.mark.parametrize("runs", DESIGNS)
def test_a_right_form_is_not_accused(runs):
    """One in a hundred, for each of two axes; 300 tables of a share of 2% scatter by 0.8%."""
    assert share_told(isoflop_design(*DESIGNS[runs]), None, tables=300)[0] < 0.045


def checkpoints_are_silent():
    params, samples = isoflop_design(4, 5, 5.0)
    rows = np.repeat(np.arange(20), 4)
    part = np.tile([0.4, 0.6, 0.8, 1.0], 20)
    assert share_told((params[rows], samples[rows] * part), None, noise=0.01, cluster=rows, tables=300)[0] < 0.045


def test_checkpoints_of_one_run_are_one_witness():
    checkpoints_are_silent()


def test_rows_taken_for_witnesses_are_caught(monkeypatch):
    """The mutant: every checkpoint is counted as a run of its own."""
    whole = trend.check_trends
    lines = np.arange(80)
    monkeypatch.setitem(
        globals(), "check_trends", lambda runs, *rest: whole(replace(runs, cluster=lines), *rest)
    )
    with pytest.raises(AssertionError):
        checkpoints_are_silent()


def test_the_chance_is_that_of_the_f_test():
    """Against the textbook's: squares of two nested least-squares fits."""
    draw = np.random.default_rng(0)
    J, Z, r = draw.standard_normal((14, 5)), draw.standard_normal((14, 2)), draw.standard_normal(14)

    def squares(columns):
        return float(((r - columns @ np.linalg.lstsq(columns, r, rcond=None)[0]) ** 2).sum())

    small, large = squares(J), squares(np.hstack([J, Z]))
    expected = stats.f.sf((small - large) / 2 / (large / 7), 2, 7)
    assert chance_of(J, r, Z) == pytest.approx(expected, rel=1e-9)
    assert chance_of(J, r, J[:, :2] @ np.eye(2)) == 1.0
