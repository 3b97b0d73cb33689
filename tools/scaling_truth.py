"""Published scaling laws against ours, the coverage of our intervals, and times.

python tools/scaling_truth.py DATA            # DATA: the folder of published tables (tests/scaling_tables.py)
python tools/scaling_truth.py --coverage      # simulated: 500 tables, 400 resamples each; minutes
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the tables and simulations are the tests'

from scaling_coverage import coverage, draws_of
from scaling_tables import EPOCH, EPOCH_OBJECTIVE, epoch, marin

from selfsup.scaling.bootstrap import bootstrap
from selfsup.scaling.extrapolate import extrapolation
from selfsup.scaling.fit import exponents, fit, fit_runs, problem
from selfsup.scaling.isoflop import isoflop


def truth_table(folder: Path) -> None:
    runs = epoch(folder=folder)
    printed = {"A": 482.01, "B": 2085.43, "E": 1.8169, "alpha": 0.3478, "beta": 0.3658}
    for delta, published in ((1e-3, {**EPOCH, "objective": EPOCH_OBJECTIVE}), (1e-6, printed)):
        values, found = fit_runs("chinchilla", runs, delta)
        values["objective"] = float(found.solved.objective[0])
        for name, number in published.items():
            print(
                f"Epoch, delta {delta:g}  {name:9} {number:.9g}  {values[name]:.9g}  {values[name] / number - 1:+.1e}"
            )
    for cut in (1e20, 3e20, 1e21):
        held = extrapolation("chinchilla", runs, runs.flops > cut)
        print(f"Epoch, C <= {cut:g}: error mean {held.mean_error:.2%}, max {held.max_error:.1%}")
    for name in ("comma", "dclm", "nemotron"):
        table = marin(name, folder)
        a = float(exponents("chinchilla", fit_runs("chinchilla", table)[0])[0])
        print(f"Marin {name}: a = {a:.4f} by the law, {isoflop(table).parabola[1]:.4f} by parabolas")


def times(folder: Path) -> None:
    """CPU and wall seconds of one fit, and of 1,000 resamples by rows and by size."""
    runs = epoch(folder=folder)
    task, log_loss = problem("chinchilla", runs), np.log(runs.loss)[None]
    sizes = np.unique(np.round(np.log(runs.params), 2), return_inverse=True)[1]
    full = fit(task, log_loss, np.ones((1, len(runs))))
    for name, work in (
        ("fit, 8 starts", lambda: fit_runs("chinchilla", runs)),
        (
            "1,000 resamples of rows",
            lambda: bootstrap(task, log_loss, runs.cluster, full.solved.theta, 1000, 0),
        ),
        ("1,000 resamples of sizes", lambda: bootstrap(task, log_loss, sizes, full.solved.theta, 1000, 0)),
    ):
        spent = []
        for _ in range(5):
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            spent.append((time.process_time() - cpu, time.perf_counter() - wall))
        cpu, wall = np.array(spent).T
        print(f"{name}: median {np.median(cpu):.2f} CPU-s, wall {wall.min():.2f} to {wall.max():.2f} s")


def show_coverage(tables: int = 500, resamples: int = 400) -> None:
    """How often 80% and 95% intervals hold the truth: independent runs, and checkpoints of runs with common noise."""
    for what, clustered, options in (
        ("single runs", False, {}),
        ("single runs, delta 0.02 (least squares)", False, {"delta": 0.02}),
        ("checkpoints, resampled by runs", True, {}),
        ("checkpoints, resampled by rows, wrongly", True, {"resample_rows": True}),
    ):
        values, unconverged = draws_of(clustered, tables, resamples, 0, **options)
        print(f"{what}: {unconverged} of {tables * resamples} resamples not converged")
        narrow, wide = coverage(values, 0.8), coverage(values, 0.95)
        for name in values:
            print(f"  {name:6} {narrow[name]:.1%} of 80%, {wide[name]:.1%} of 95%")


if __name__ == "__main__":
    if sys.argv[1:] == ["--coverage"]:
        show_coverage()
    elif len(sys.argv) == 2:
        truth_table(Path(sys.argv[1]))
        times(Path(sys.argv[1]))
    else:
        sys.exit(__doc__)
