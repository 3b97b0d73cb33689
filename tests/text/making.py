"""Runs of text as training leaves them, without the training, and documents with labels."""

import json
from pathlib import Path

import numpy as np

from running import save_untrained
from selfsup.data.documents import open_texts
from selfsup.data.text_sources import pack_text
from selfsup.data.tokenize import tokenize_shards
from selfsup.data.tokenizer import TOKENIZER_NAME, TextTokenizer, train_tokenizer

WORDS = ["lovely", "moving", "bright"], ["dull", "tired", "grey"]
FILLER = "the film and its cast were on at ten in an old hall near us".split()


def documents(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Texts of 2 to 30 words of which some tell the label, 0 or 1."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        words = rng.choice(FILLER, rng.integers(2, 26)).tolist() + rng.choice(WORDS[i % 2], 4).tolist()
        made.append((" ".join(rng.permutation(words)), i % 2))
    return made


def text_shards(folder: Path, count: int = 60, seed: int = 0, label: bool = True) -> Path:
    """Shards of `documents`."""
    lines = [{"text": text, **({"label": right} if label else {})} for text, right in documents(count, seed)]
    source = folder.with_suffix(".jsonl")
    source.write_text("\n".join(json.dumps(line) for line in lines))
    pack_text(source, folder, 25, 1, "file")
    return folder


def word_tokenizer() -> TextTokenizer:
    return train_tokenizer([text for text, _ in documents(60)], "wordpiece", 120)


def token_shards(texts: Path, folder: Path, tokenizer: TextTokenizer) -> Path:
    """The same tokenised."""
    path = folder.with_suffix(".tokenizer.json")
    path.write_text(tokenizer.json)
    tokenize_shards(open_texts(str(texts)), folder, path)
    return folder


def text_run(folder: Path, name: str, tokenizer: TextTokenizer, shards: str = "nowhere", **sections) -> Path:
    """A run folder of objective mlm or clm: initial weights plus noise."""
    encoder = {
        "vocab_size": tokenizer.vocab_size,
        "max_length": 16,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
    }
    content = {
        "objective": {"name": name, **sections.get("objective", {})},
        "encoder": {**encoder, "causal": name == "clm", **sections.get("encoder", {})},
        "data": {"shards": shards, **sections.get("data", {})},
        "seed": sections.get("seed", 0),
        "run": {"dir": "r"},
    }
    run = save_untrained(folder, content, 0.1, {"tokenizer_sha256": tokenizer.sha256}, 7)
    (run / TOKENIZER_NAME).write_text(tokenizer.json)
    return run
