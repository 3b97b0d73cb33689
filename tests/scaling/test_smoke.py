"""A sweep in small, by the commands that a user types: plan, run, fit, report. Shape and order are held, not numbers.
Its cells are trained in this process; submitit's processes are in test_sweep.py.

The text is a random chain of letters, each drawn by the one before it. The narrowest model cannot hold the table of
transitions, the widest has no time to learn it. Over seeds 0, 1, 2 (of text and models alike) the middle size was best
by 0.15 to 0.22 at the small budget and by 0.08 at the large one, and 0.27 to 0.33 better there.
"""

import csv
import io
import shlex
import sys

import numpy as np
import pytest
import yaml

from data.text_making import make_tokens
from scaling_sweeps import Here
from selfsup import cli
from selfsup.scaling import sweep
from selfsup.scaling.plan import read_plan
from selfsup.scaling.result import read_result
from text_runs import tokenizer

SEED = 0
LETTERS = tokenizer().vocab_size - 5
WIDTHS, BUDGETS = [4, 16, 64], [2e9, 5e9]


def chain(folder, documents, seed):
    """Documents of 400 letters each."""
    steps = np.random.default_rng(0).dirichlet(np.full(LETTERS, 0.08), LETTERS).cumsum(1)
    draw = np.random.default_rng(seed)
    letters = [draw.integers(0, LETTERS, documents)]
    for _ in range(399):
        letters.append(np.minimum((steps[letters[-1]] < draw.random(documents)[:, None]).sum(1), LETTERS - 1))
    make_tokens((np.stack(letters, 1) + 5).tolist(), folder, tokenizer(), tokens_per_shard=10**7)
    return str(folder)


def written(folder):
    """The sweep's YAML, its base recipe beside it."""
    base = {
        "objective": {"name": "clm"},
        "encoder": {"vocab_size": LETTERS + 5, "max_length": 128, "embed_dim": 16, "depth": 1, "num_heads": 1,
                    "causal": True},
        "data": {"shards": chain(folder / "train", 2000, 1 + 10 * SEED)},
        "optim": {"schedule": "linear", "betas": [0.9, 0.98], "weight_decay": 0.0, "warmup_fraction": 0.1},
        "run": {"dir": "base", "device": "cpu"},
    }  # fmt: skip
    content = {
        "recipe": "base.yaml", "seed": SEED,
        "held_out": {"shards": chain(folder / "held", 40, 2 + 10 * SEED), "samples": 100, "batch": 50},
        "ladder": {"widths": WIDTHS, "depths": [1, 1, 1], "heads": [1, 1, 4]},
        "grid": {"name": "isoflop", "budgets": BUDGETS, "per_budget": 3},
        "rule": {"name": "power", "lr_factor": 0.9, "lr_params": -0.45, "batch_factor": 154000, "batch_params": -0.65},
        "floors": {"steps": 30},
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_two_budgets_of_three_sizes(tmp_path, monkeypatch):
    def selfsup(*words):
        monkeypatch.setattr(sys, "argv", ["selfsup", "scaling", *map(str, words)])
        return cli.main()

    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert selfsup("plan", written(tmp_path), "--json", plan) == 0
    assert {found["check"] for found in read_plan(plan).warnings} >= {"short runs", "few runs", "compute span"}
    monkeypatch.setattr(sweep, "make_executor", lambda *_: Here())
    assert selfsup("run", plan, "--out", out, "--workers", 1) == 0
    table = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert [(row["state"], row["fit"]) for row in table] == [("done", "1")] * 6
    loss = np.array([float(row["loss"]) for row in table]).reshape(2, 3)
    assert [float(row["budget"]) for row in table] == np.repeat(BUDGETS, 3).tolist()
    assert loss.argmin(1).tolist() == [1, 1], loss  # a U: too small, too short
    assert (loss[1] < loss[0]).all(), loss
    # So little is hardly a ground for a law, and the fit says so; whether it refuses is the machine's rounding.
    assert selfsup(*shlex.split(sweep.fit_command(read_plan(plan), out))[2:], "--resamples", 100) in (0, 1)
    result = read_result(out / "fit.json")
    assert result.about["rows_used"] == 6 and result.warnings
    selfsup("report", "--fit", out / "fit.json", "--sweep", out, "--out", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "6 done" in page and "Not identified" in page and "data:image/svg+xml" in page
