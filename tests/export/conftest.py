"""A run folder as training leaves it, without the training."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from running import save_untrained
from selfsup.config import merge

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
        facts = {"index_fingerprint": "f1ngerpr1nt", "git_revision": "abc123"}
        return save_untrained(tmp_path / name, merge(CONTENT, changes or {}), 0.1, facts, step)

    return make


@pytest.fixture
def run_card() -> Callable[[Path, Tensor], list[dict[str, Any]]]:
    """run_card(folder, images) -> the variables after each Python block of its README.md, run as written
    but for the folder and the images."""

    def run(folder: Path, images: Tensor) -> list[dict[str, Any]]:
        blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        ends = []
        for block in blocks:
            variables = {"images": images}
            code, count = re.subn(r"torch\.randn\(1, (.*?)\)", "images", block.replace("DIR", str(folder)))
            shape = ", ".join(map(str, images.shape[1:]))
            assert count == 0 or f"torch.randn(1, {shape})" in block, block
            exec(code, variables)
            ends.append(variables)
        return ends

    return run
