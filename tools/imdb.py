"""The IMDB film reviews (Maas et al. 2011): 25,000 + 25,000, half of them good -> shards of text and of tokens.

    python tools/imdb.py imdb-train.jsonl.xz imdb-test.jsonl.xz data/imdb

Each line of a file is a review: {"id": "train/neg/0", "label": 0, "text": "..."}, label 0 for a bad one, 1
for a good one; the file may be compressed (.xz, .gz). The HTML line breaks in the reviews, <br />, become
line breaks; nothing else is changed. Writes the text shards DEST/train and DEST/test with their labels;
DEST/tokenizer.json, a WordPiece vocabulary learnt on train; and the token shards DEST/train-tokens, for
pretraining, which does not look at labels. Run again it keeps what is there.

The original archive (https://ai.stanford.edu/~amaas/data/sentiment/) has a file a review; as such lines:

    for file in sorted(Path("aclImdb/train").glob("[np]*/*.txt")):
        row = {"id": str(file), "label": int(file.parent.name == "pos"), "text": file.read_text()}
        print(json.dumps(row))
"""

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import tyro
from text_folders import keep_tokenizer, keep_tokens, pack_texts, read_text

from selfsup.data.pack import make_key
from selfsup.data.tokenizer import TOKENIZER_NAME
from selfsup.data.tokens import TokenIndex

CLASSES = ["neg", "pos"]
_BREAK = re.compile(r"<br\s*/?>")


def convert(train: Path, test: Path, dest: Path, vocab_size: int = 8192) -> TokenIndex:
    """Makes all folders; returns the tokens of train.

    Raises ValueError for a file that cannot be read, and where `dest` holds something else.
    """
    documents = {"train": read_reviews(train), "test": read_reviews(test)}  # before anything is written
    indexes = {split: pack_texts(reviews, CLASSES, dest / split) for split, reviews in documents.items()}
    path = dest / TOKENIZER_NAME
    keep_tokenizer([text for *_, text in documents["train"]], path, "wordpiece", vocab_size)
    return keep_tokens(indexes["train"], path, dest / "train-tokens")


def read_reviews(path: Path) -> list[tuple[str, int, str]]:
    """(key, label, text) of every line. Raises ValueError naming file and line for what is no review."""
    reviews, taken = [], set()
    lines = read_text(path, 'expected lines of {"id": ..., "label": 0 or 1, "text": ...}').split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            label, text = row["label"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number}: expected JSON with label and text: {error!r}") from None
        if label not in (0, 1) or not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}: line {number}: expected label 0 or 1 and a text, got {line[:80]!r}")
        key = make_key(Path(f"{row.get('id', number)}.txt"), taken)
        reviews.append((key, int(label), _BREAK.sub("\n", text)))
    if not reviews:
        raise ValueError(f"{path}: no reviews in it")
    return reviews


def main(
    train: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TRAIN")],
    test: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TEST")],
    dest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    vocab_size: int = 8192,
) -> int:
    """The IMDB film reviews as shards of text and of tokens.

    Args:
        train: JSON lines of the training reviews, compressed or not.
        test: JSON lines of the test reviews.
        dest: gets the folders train, test and train-tokens, and tokenizer.json.
        vocab_size: tokens of the vocabulary, at most: a small text has fewer.
    """
    try:
        convert(train, test, dest, vocab_size)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
