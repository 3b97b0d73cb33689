"""Published scaling laws against ours, the coverage of our intervals, and times.

python tools/scaling_truth.py DATA            # DATA: the folder of published tables (tests/scaling_tables.py)
python tools/scaling_truth.py --coverage      # simulated: 500 tables, 400 resamples each; minutes
"""

import sys
import time
from pathlib import Path

import numpy as np

from selfsup.scaling import law
from selfsup.scaling.bootstrap import bootstrap, interval
from selfsup.scaling.extrapolate import extrapolation
from selfsup.scaling.fit import exponents, fit, fit_runs, problem
from selfsup.scaling.isoflop import isoflop
from selfsup.scaling.table import Columns, Runs, read_table, runs_of

TRUTH = {"E": 1.8172, "A": 477.8, "B": 2143.0, "alpha": 0.3473, "beta": 0.3672}
TARGET = (2.4e10, 7e10)


def epoch(folder: Path) -> Runs:
    path = folder / "epoch_chinchilla_svg_extracted.csv"
    runs = read_table(path, Columns("Model Size", "loss", flops="Training FLOP"))
    return runs.take(runs.loss < np.sort(runs.loss)[-5])


def truth_table(folder: Path) -> None:
    runs = epoch(folder)
    for delta, published in (
        (
            1e-3,
            {
                "A": 477.84,
                "B": 2143.9,
                "E": 1.81724,
                "alpha": 0.34731,
                "beta": 0.36718,
                "objective": 0.00101827403,
            },
        ),
        (1e-6, {"A": 482.01, "B": 2085.43, "E": 1.8169, "alpha": 0.3478, "beta": 0.3658}),
    ):
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
        columns = Columns("params", "loss", "tokens", budget="budget")
        table = read_table(folder / "marin_isoflop_202603.csv", columns, [f"dataset={name}"])
        a = float(exponents("chinchilla", fit_runs("chinchilla", table)[0])[0])
        print(f"Marin {name}: a = {a:.4f} by the law, {isoflop(table).parabola[1]:.4f} by parabolas")


def times(folder: Path) -> None:
    """CPU and wall seconds of one fit, and of 1,000 resamples by rows and by size."""
    runs = epoch(folder)
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


def coverage(tables: int = 500, resamples: int = 400) -> None:
    """How often 80% and 95% intervals hold the truth: independent runs, and checkpoints of runs with common noise."""
    for clustered in (False, True):
        params, samples, cluster = checkpoints() if clustered else curves()
        draw = np.random.default_rng(0)
        noise = 0.005 * draw.standard_normal((tables, int(cluster.max()) + 1))[:, cluster]
        if clustered:
            noise = noise + 0.001 * draw.standard_normal((tables, len(params)))
        truth = law.chinchilla(**TRUTH, params=params, samples=samples)
        task, log_loss = problem("chinchilla", runs_of(params, samples, truth)), np.log(truth) + noise
        full = fit(task, log_loss, np.ones((1, len(params))), keep=4)
        ways = [("runs", cluster)] + ([("rows, wrongly", np.arange(len(params)))] if clustered else [])
        for what, codes in ways:
            found = bootstrap(task, log_loss, codes, full.solved.theta, resamples, 0)
            values = {**found.values, "a": exponents("chinchilla", found.values)[0]}
            values["loss"] = law.chinchilla(**found.values, params=TARGET[0], samples=TARGET[1])
            wanted = {**TRUTH, "a": float(exponents("chinchilla", TRUTH)[0])}
            wanted["loss"] = float(law.chinchilla(**TRUTH, params=TARGET[0], samples=TARGET[1]))
            print(
                f"{'checkpoints' if clustered else 'single runs'}, {len(params)} rows, resampled by {what}: ",
                end="",
            )
            print(f"{found.unconverged} of {tables * resamples} resamples not converged")
            for name, draws in values.items():
                shares = []
                for level in (0.8, 0.95):
                    ends = [interval(row, level) for row in draws]
                    shares.append(np.mean([low <= wanted[name] <= high for low, high in ends]))
                print(f"  {name:6} {shares[0]:.1%} of 80%, {shares[1]:.1%} of 95%")


def curves() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Five isoFLOP curves of six sizes within 6 times the optimum."""
    g = (TRUTH["alpha"] * TRUTH["A"] / (TRUTH["beta"] * TRUTH["B"])) ** (1 / (TRUTH["alpha"] + TRUTH["beta"]))
    best = g * (np.geomspace(1e18, 1e20, 5) / 6) ** (TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]))
    params = (best[:, None] * np.geomspace(1 / 6, 6, 6)).ravel()
    return params, np.repeat(np.geomspace(1e18, 1e20, 5), 6) / 6 / params, np.arange(30)


def checkpoints() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """8 sizes, 4 lengths, 4 checkpoints of each run."""
    sizes, ratios = np.geomspace(3e7, 3e9, 8), np.array([5, 20, 80, 320])
    params = np.repeat(sizes, 16)
    samples = params * np.tile(np.repeat(ratios, 4), 8) * np.tile([0.4, 0.6, 0.8, 1.0], 32)
    return params, samples, np.repeat(np.arange(32), 4)


if __name__ == "__main__":
    if sys.argv[1:] == ["--coverage"]:
        coverage()
    elif len(sys.argv) == 2:
        truth_table(Path(sys.argv[1]))
        times(Path(sys.argv[1]))
    else:
        sys.exit(__doc__)
