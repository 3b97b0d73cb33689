"""A sweep of small language models that the tests plan, and what runs cells in the test's own process."""

from pathlib import Path
from types import SimpleNamespace

import yaml

BASE = {
    "objective": {"name": "clm"},
    "encoder": {"vocab_size": 128, "max_length": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "causal": True},
    "data": {"shards": "train"}, "optim": {"schedule": "linear", "base_lr": 1e-3}, "run": {"dir": "base"},
}  # fmt: skip
SWEEP = {
    "recipe": "base.yaml", "held_out": {"shards": "test"},
    "ladder": {"widths": [16, 24, 32, 48, 64, 96, 128], "aspect": 24, "head_dim": 16},
    "grid": {"name": "isoflop", "budgets": [1e11, 4e11, 1.6e12], "per_budget": 4, "hold_out": [6e12]},
    "rule": {"name": "fixed", "lr": 1e-3, "batch": 64}, "floors": {"steps": 50}, "noise": 0.002,
    "prior": {"E": 1.0, "A": 60.0, "B": 300.0, "alpha": 0.4, "beta": 0.4},
}  # fmt: skip


def written(folder: Path, **changes) -> Path:
    """The YAML of the sweep and of its base recipe; changes to either (`base`: to the recipe)."""
    (folder / "base.yaml").write_text(yaml.safe_dump({**BASE, **changes.pop("base", {})}))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, **changes}))
    return path


class Here:
    """An executor that runs a cell at once, in this process; `breaks` fails it instead, by its name."""

    def __init__(self, breaks=()):
        self.breaks, self.ran = dict.fromkeys(breaks, 0), []

    def submit(self, function, *arguments):
        sweep, name = arguments
        self.ran.append(name)
        if name in self.breaks:
            self.breaks[name] += 1
        else:
            try:
                function(sweep, name)
            except Exception as error:  # as in a process of its own: told by the files alone
                print(f"cell {name}: {error}")
        return SimpleNamespace(done=lambda: True, paths=SimpleNamespace(stderr=Path("log.err")))
