"""Small texts, tokenizers and token shards for tests."""

from pathlib import Path

import numpy as np

from selfsup.data.tokenize import TokenDocument, write_tokens
from selfsup.data.tokenizer import Kind, TextTokenizer, train_tokenizer
from selfsup.data.tokens import TokenIndex

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs!\nTwice, if you can.",
    "It isn't over until it's over: 3.14159, 2.71828.",
]


def make_tokenizer(kind: Kind = "wordpiece", vocab_size: int = 300) -> TextTokenizer:
    """A tokenizer of a few hundred tokens; [PAD] [UNK] [CLS] [SEP] [MASK] are 0 to 4."""
    return train_tokenizer(TEXTS * 3, kind, vocab_size)


def make_tokens(
    documents: list[list[int]],
    folder: Path,
    tokenizer: TextTokenizer,
    labels: list[int] | None = None,
    tokens_per_shard: int = 100,
) -> TokenIndex:
    """Token shards of given documents, each said to be of two bytes a token."""
    labels = labels if labels is not None else [-1] * len(documents)
    written = [TokenDocument(np.array(d, np.uint32), label, 2 * len(d)) for d, label in zip(documents, labels)]
    return write_tokens(written, folder, tokenizer, tokens_per_shard=tokens_per_shard)
