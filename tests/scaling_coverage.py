"""How often intervals hold the truth: simulated tables, fitted and resampled. For the test and tools/scaling_truth.py."""

import numpy as np

from scaling_tables import TRUTH, checkpoint_design, isoflop_design
from selfsup.scaling import law
from selfsup.scaling.bootstrap import bootstrap, interval
from selfsup.scaling.fit import exponents, fit, problem
from selfsup.scaling.solve import DELTA
from selfsup.scaling.table import runs_of

TARGET = (2.4e10, 7e10)  # a hundredfold beyond the largest run of the isoFLOP design


def draws_of(
    clustered: bool, tables: int, resamples: int, seed: int, delta: float = DELTA, resample_rows: bool = False
):
    """Coefficients, exponent and a prediction of each resample of each table, (tables, resamples); and how many of
    the resamples did not converge.

    Noise of log loss .5%: of each of 30 isoFLOP runs, or common to the four checkpoints of a run (their own .1%).
    """
    draw = np.random.default_rng(seed)
    params, samples, cluster = checkpoint_design() if clustered else (*isoflop_design(), None)
    truth = law.chinchilla(**TRUTH, params=params, samples=samples)
    table = runs_of(params, samples, truth, cluster)
    noise = 0.005 * draw.standard_normal((tables, int(table.cluster.max()) + 1))[:, table.cluster]
    if clustered:
        noise = noise + 0.001 * draw.standard_normal((tables, len(params)))
    task, log_loss = problem("chinchilla", table), np.log(truth) + noise
    full = fit(task, log_loss, np.ones((1, len(params))), delta, keep=4)
    assert full.solved.converged.all()
    codes = np.arange(len(params)) if resample_rows else table.cluster
    found = bootstrap(task, log_loss, codes, full.solved.theta, resamples, 0, delta)
    return predicted(found.values), found.unconverged


def predicted(values):
    """With the exponent a and the loss at the target."""
    at = {"params": TARGET[0], "samples": TARGET[1]}
    return {**values, "a": exponents("chinchilla", values)[0], "loss": law.chinchilla(**values, **at)}


def coverage(values, level):
    """The share of tables whose interval holds the truth, by name."""
    truth = {name: float(value) for name, value in predicted(TRUTH).items()}
    shares = {}
    for name, draws in values.items():
        ends = [interval(row, level) for row in draws]
        shares[name] = float(np.mean([low <= truth[name] <= high for low, high in ends]))
    return shares
