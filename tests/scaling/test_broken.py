"""The broken power law: whole runs are held out, and coefficients at the end of their range are told."""

import numpy as np
import pytest

from selfsup.scaling import broken_form, law
from selfsup.scaling.broken_form import analyse_broken
from selfsup.scaling.table import runs_of

TRUTH = {"a": 1.5, "b": 40.0, "c0": 0.1, "c1": 0.25, "d1": 1e9, "f1": 0.4}


def curve(x, cluster=None, noise=1e-3, values=TRUTH):
    error = np.exp(noise * np.random.default_rng(0).standard_normal(len(x)))
    return runs_of(np.ones(len(x)), x, law.broken(**values, x=x) * error, cluster)


def whole_runs_are_held_out():
    """8 runs of 5 rows: two runs, 10 rows; the largest fifth of the rows would be 8."""
    ends = np.geomspace(1e8, 1e12, 8)
    x = (ends[:, None] * np.geomspace(0.01, 1, 5)).ravel()
    result = analyse_broken(curve(x, np.repeat(np.arange(8), 5)), "tokens", resamples=0)
    assert result.extrapolation["held_out"] == 10 and result.extrapolation["fitted"] == 30


def test_whole_runs_are_held_out(monkeypatch):
    """And the mutant: rows."""
    whole_runs_are_held_out()
    monkeypatch.setattr(broken_form, "held_out_runs", lambda runs: runs.flops > np.quantile(runs.flops, 0.8))
    with pytest.raises(AssertionError):
        whole_runs_are_held_out()


def said(runs):
    result = analyse_broken(runs, "tokens", resamples=0)
    return {f["check"]: False for f in result.warnings} | {f["check"]: True for f in result.refused}


def test_coefficients_at_the_end_of_their_range():
    """A power of 9 is the sum of two exponents at their ends; a power law has no break, and none to name."""
    x = np.geomspace(1e6, 1e12, 30)
    fine = said(curve(x))
    assert not {"exponent at bound", "unidentified break", "E at zero"} & set(fine)
    steep = runs_of(np.ones(30), np.geomspace(1, 10, 30), 0.5 + 2 * np.geomspace(1, 10, 30) ** -9.0)
    assert said(steep)["exponent at bound"]
    late = curve(x, values={**TRUTH, "d1": 1e13, "a": 0.0}, noise=0.0)
    assert {"unidentified break", "E at zero"} & set(said(late))
