"""A run folder as training leaves it, without the training."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from running import save_untrained
from selfsup.config import merge
from selfsup.data.tokenizer import TextTokenizer, train_tokenizer

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


TEXTS = [
    "The quick brown fox is here.",
    "Pack my box with the five dozen jugs!\nTwice.",
    "It isn't over: 3.14, é",
]
SMALL = {"max_length": 40, "embed_dim": 32, "depth": 2, "num_heads": 4, "init_std": 0.2}
TEXT_FORMS: dict[str, dict[str, Any]] = {
    "bert": {
        "objective": {"name": "mlm"},
        "encoder": {"post_norm": True, "embed_norm": True, "norm_eps": 1e-12, "token_types": 2},
    },
    "megatron": {"objective": {"name": "mlm"}, "encoder": {"token_types": 2}},
    "modernbert": {
        "objective": {"name": "mlm"},
        "encoder": {"embed_norm": True, "positions": "rope", "activation": "geglu", "bias": False},
    },
    "gpt2": {"objective": {"name": "clm"}, "encoder": {"causal": True, "activation": "gelu_tanh"}},
    "llama": {
        "objective": {"name": "clm"},
        "encoder": {
            "causal": True, "norm": "rms", "positions": "rope", "activation": "swiglu", "bias": False,
            "num_kv_heads": 2,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, TextTokenizer]:
    """A small tokenizer of each kind."""
    sizes = {"wordpiece": 90, "bpe": 290, "char": 60}
    return {kind: train_tokenizer(TEXTS * 3, kind, size) for kind, size in sizes.items()}


@pytest.fixture
def make_text_run(tmp_path: Path, tokenizers) -> Callable[..., Path]:
    """make_text_run("bert", {"encoder": {...}}, kind="bpe", name="run") -> run folder, as `make_run` makes them."""

    def make(
        form: str, changes: dict[str, Any] | None = None, kind: str | None = None, name: str = "run"
    ) -> Path:
        tokenizer = tokenizers[
            kind or ("bpe" if TEXT_FORMS[form]["objective"]["name"] == "clm" else "wordpiece")
        ]
        vocabulary = {"encoder": {**SMALL, "vocab_size": tokenizer.vocab_size}}
        shards = {"data": {"shards": "somewhere/docs/tokens"}, "run": {"dir": "r"}}
        content = merge(merge(merge(shards, vocabulary), TEXT_FORMS[form]), changes or {})
        facts = {
            "index_fingerprint": "f1ngerpr1nt",
            "git_revision": "abc123",
            "tokenizer_sha256": tokenizer.sha256,
        }
        run = save_untrained(tmp_path / name, content, 0.1, facts, 7)
        (run / "tokenizer.json").write_text(tokenizer.json)
        return run

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
