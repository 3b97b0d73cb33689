"""Shards of small images with hostile names, and runs on them as training leaves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.making import encode, picture, write_tar
from running import save_untrained
from selfsup.config import merge
from selfsup.data.index import build_index, save_index

HOSTILE_KEY = """<script>alert("k")&'"""
HOSTILE_CLASS = "</title><img src=http://evil.example/x onerror=alert(1)>"
SAMPLES = 23

CONTENT = {
    "objective": {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2},
    "encoder": {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "data": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
    "run": {"dir": "r"},
}


def size_of(i: int) -> tuple[int, int]:
    """Height and width of image i: all different shapes, some beyond 64 pixels."""
    return 9 + 5 * (i % 13), 12 + 3 * (i % 7)


def key_of(i: int) -> str:
    return HOSTILE_KEY if i == 4 else f"{i:05d}"


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Two shards, 23 PNG images picture(i, *size_of(i)), classes 0 to 2; the last has no label."""
    folder = tmp_path_factory.mktemp("shards")
    for name, numbers in (("a.tar", range(15)), ("b.tar", range(15, SAMPLES))):
        members = []
        for i in numbers:
            members.append((f"{key_of(i)}.png", encode(picture(i, *size_of(i)))))
            if i < SAMPLES - 1:
                members.append((f"{key_of(i)}.cls", str(i % 3).encode()))
        write_tar(folder / name, members)
    (folder / "classes.json").write_text(json.dumps(["cat", HOSTILE_CLASS, "a tab\there", "none such"]))
    save_index(build_index(folder, 1))
    return folder


@pytest.fixture
def make_run(tmp_path: Path, shards: Path) -> Callable[..., Path]:
    """make_run({"encoder": {...}}) -> run folder at step 7; weights off their initial values."""

    def make(changes: dict[str, Any] | None = None) -> Path:
        content = merge(CONTENT, {"data": {"shards": str(shards)}})
        return save_untrained(tmp_path / "run", merge(content, changes or {}), 0.1, {}, 7)

    return make
