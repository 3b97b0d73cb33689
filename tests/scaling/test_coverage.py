"""Intervals cover the truth as often as they say: 200 simulated tables, 100 resamples each, by row and by run.

The full form: python tools/scaling_truth.py --coverage (its result is in the README).
"""

import numpy as np
import pytest

from scaling_tables import TRUTH, checkpoint_design, isoflop_design
from selfsup.scaling import law
from selfsup.scaling.bootstrap import bootstrap, interval
from selfsup.scaling.fit import exponents, fit, problem
from selfsup.scaling.table import runs_of

TABLES, RESAMPLES = 200, 100
TARGET = (2.4e10, 7e10)  # a hundredfold beyond the largest run of the isoFLOP design
LIMITS = {0.8: (0.72, 0.95), 0.95: (0.91, 1.0)}
"""200 draws scatter by 2.8% and 1.5% (one standard deviation) about the nominal levels."""


def draws_of(clustered: bool, resample_rows: bool = False):
    """Coefficients, exponent and a prediction of each resample of each table, (tables, resamples)."""
    draw = np.random.default_rng(1)
    if clustered:
        params, samples, cluster = checkpoint_design()
        runs = int(cluster.max()) + 1
        noise = 0.005 * draw.standard_normal((TABLES, runs))[:, cluster]
        noise = noise + 0.001 * draw.standard_normal((TABLES, len(params)))
    else:
        (params, samples), cluster = isoflop_design(), None
        noise = 0.005 * draw.standard_normal((TABLES, len(params)))
    truth = law.chinchilla(**TRUTH, params=params, samples=samples)
    table = runs_of(params, samples, truth, cluster)
    task, log_loss = problem("chinchilla", table), np.log(truth) + noise
    full = fit(task, log_loss, np.ones((1, len(params))), keep=4)
    assert full.solved.converged.all()
    codes = np.arange(len(params)) if resample_rows else table.cluster
    found = bootstrap(task, log_loss, codes, full.solved.theta, RESAMPLES, 0)
    assert found.unconverged <= 1e-3 * TABLES * RESAMPLES
    values = dict(found.values)
    values["a"] = exponents("chinchilla", found.values)[0]
    values["loss"] = law.chinchilla(**found.values, params=TARGET[0], samples=TARGET[1])
    return values


def coverage(values, level):
    """The share of tables whose interval holds the truth, by name."""
    truth = {**TRUTH, "a": float(exponents("chinchilla", TRUTH)[0])}
    truth["loss"] = float(law.chinchilla(**TRUTH, params=TARGET[0], samples=TARGET[1]))
    shares = {}
    for name, draws in values.items():
        ends = [interval(row, level) for row in draws]
        shares[name] = float(np.mean([low <= truth[name] <= high for low, high in ends]))
    return shares


def is_nominal(values):
    for level, (least, most) in LIMITS.items():
        for name, share in coverage(values, level).items():
            assert least <= share <= most, (level, name, share)


@pytest.mark.slow
@pytest.mark.parametrize("clustered", [False, True], ids=["rows", "runs"])
def test_intervals_cover(clustered):
    is_nominal(draws_of(clustered))


@pytest.mark.slow
def test_resampling_rows_of_runs_is_caught():
    """The mutant: checkpoints of one run taken for independent runs. Its 95% intervals hold the truth in about 75%."""
    values = draws_of(clustered=True, resample_rows=True)
    with pytest.raises(AssertionError):
        is_nominal(values)
    assert coverage(values, 0.95)["alpha"] < 0.85
