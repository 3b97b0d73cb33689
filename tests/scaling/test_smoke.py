"""A sweep in small: plan, run, table. Its shape and order are held, not its numbers.

The text is a random chain of letters: a letter depends on the one before it. The narrowest model cannot hold the
table of transitions, the widest has no time to learn it.
"""

import numpy as np
import pytest
import yaml

from data.text_making import make_tokens
from scaling.test_sweep import Here, rows
from selfsup.scaling.plan import make_plan
from selfsup.scaling.sweep import run_sweep
from text_runs import tokenizer

BUDGETS = (3e9, 6e9)


def chain(folder, documents, seed):
    """Documents of 400 letters each, and the entropy of the next letter."""
    vocab = tokenizer().vocab_size
    table = np.random.default_rng(0).dirichlet(np.full(vocab - 5, 0.08), vocab - 5)
    steps = table.cumsum(1)
    draw = np.random.default_rng(seed)
    now = draw.integers(0, vocab - 5, documents)
    letters = []
    for _ in range(400):
        now = np.minimum((steps[now] < draw.random(documents)[:, None]).sum(1), vocab - 6)
        letters.append(now)
    make_tokens((np.stack(letters, 1) + 5).tolist(), folder, tokenizer(), tokens_per_shard=10**7)
    return folder, float(-(table * np.log(table + 1e-12)).sum(1).mean())


@pytest.mark.slow
def test_two_budgets_of_three_sizes(tmp_path):
    train, entropy = chain(tmp_path / "train", 2000, 1)
    held, _ = chain(tmp_path / "held", 40, 2)
    base = {
        "objective": {"name": "clm"},
        "encoder": {"vocab_size": tokenizer().vocab_size, "max_length": 128, "embed_dim": 16, "depth": 1, "num_heads": 1,
                    "causal": True},
        "data": {"shards": str(train)},
        "optim": {"schedule": "linear", "betas": [0.9, 0.98], "weight_decay": 0.0, "warmup_fraction": 0.1},
        "run": {"dir": "base", "device": "cpu"},
    }  # fmt: skip
    sweep = {
        "recipe": "base.yaml", "held_out": {"shards": str(held), "samples": 100, "batch": 50},
        "ladder": {"widths": [4, 16, 64], "depths": [1, 1, 1], "heads": [1, 1, 4]},
        "grid": {"name": "isoflop", "budgets": list(BUDGETS), "per_budget": 3},
        "rule": {"name": "power", "lr_factor": 0.9, "lr_params": -0.45, "batch_factor": 154000, "batch_params": -0.65},
        "floors": {"steps": 5},
    }  # fmt: skip
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    plan = make_plan(tmp_path / "sweep.yaml", None, 1e9)
    run_sweep(plan, tmp_path / "out", Here(), 1, 0, pause=0.0)
    table = rows(tmp_path / "out")
    assert [row["state"] for row in table] == ["done"] * 6
    loss = np.array([float(row["loss"]) for row in table]).reshape(2, 3)
    assert (loss[:, 1] < loss[:, 0]).all() and (loss[:, 1] < loss[:, 2]).all()  # too small, too short
    assert (loss[1] < loss[0]).all()  # twice the compute
    assert loss.min() > 0.95 * entropy, loss
