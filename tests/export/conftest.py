"""A run folder as training leaves it, without the training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from selfsup.checkpoint import TrainState, save_checkpoint
from selfsup.config import merge, validate
from selfsup.optim import build_optimizer
from selfsup.recipe import Recipe

CONTENT = {
    "objective": {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "encoder": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4},
    "data": {"shards": "somewhere/digits/train", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
    "run": {"dir": "r"},
}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run({"encoder": {...}}, name="run", step=7) -> run folder; no tensor has its initial value."""

    def make(changes: dict[str, Any] | None = None, name: str = "run", step: int = 7) -> Path:
        recipe = validate(Recipe, merge(CONTENT, changes or {}))
        torch.manual_seed(recipe.seed)
        objective = recipe.objective.build(recipe.encoder)
        with torch.no_grad():
            for p in objective.parameters():
                p += 0.1 * torch.randn_like(p)
        facts = {"index_fingerprint": "f1ngerpr1nt", "git_revision": "abc123"}
        optimizer = build_optimizer(recipe.optim, objective)
        save_checkpoint(tmp_path / name, TrainState(objective, optimizer, None, recipe, step, 1792, facts))
        return tmp_path / name

    return make
