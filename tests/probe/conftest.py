"""Digits as shards, and run folders as training leaves them, without the training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from running import save_untrained
from selfsup.config import merge
from selfsup.data.pack import pack_arrays

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}
CLASSES = [str(i) for i in range(10)]


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A folder with shards `train` (400 images of 8x8) and `test` (100)."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 15).astype(np.uint8)
    pack_arrays(images[:400], labels[:400].astype(np.int64), CLASSES, folder / "train", 150)
    pack_arrays(images[400:500], labels[400:500].astype(np.int64), CLASSES, folder / "test", 150)
    return folder


@pytest.fixture
def make_run(tmp_path: Path, digits: Path) -> Callable[..., Path]:
    """make_run({"seed": 1}, name="run", step=7) -> run folder; weights a little off the initial ones."""

    def make(changes: dict[str, Any] | None = None, name: str = "run", step: int = 7) -> Path:
        content = {
            "objective": {"decoder_embed_dim": 8, "decoder_depth": 0, "decoder_num_heads": 2},
            "encoder": {"img_size": 8, "patch_size": 2, "in_chans": 1, **SIZES},
            "data": {"shards": str(digits / "train"), "mean": [0.3], "std": [0.4]},
            "run": {"dir": "r"},
        }
        return save_untrained(tmp_path / name, merge(content, changes or {}), 0.02, {}, step)

    return make
