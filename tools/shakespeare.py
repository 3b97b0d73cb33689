"""Shakespeare's plays, one character a token, in nanoGPT's split: TEXT -> shards of text and of tokens.

    curl -LO https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python tools/shakespeare.py input.txt data/shakespeare

Writes DEST/train and DEST/test, the first 90% and the last 10% of the characters, each as one document;
DEST/tokenizer.json, every character of the whole text and the five special tokens; and the token shards
DEST/train-tokens and DEST/test-tokens. The text may be compressed (.xz, .gz). Run again it keeps what is
there.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from text_folders import keep_tokenizer, keep_tokens, pack_texts, read_text

from selfsup.data.tokenizer import SPECIALS, TOKENIZER_NAME
from selfsup.data.tokens import TokenIndex

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def convert(source: Path, dest: Path) -> dict[str, TokenIndex]:
    """Makes all folders; returns the tokens, {"train": index, "test": index}.

    Raises ValueError for a file that cannot be read, and where `dest` holds something else.
    """
    text = read_text(source, f"download {URL}")
    cut = int(0.9 * len(text))  # as nanoGPT's data/shakespeare_char/prepare.py
    parts = {"train": text[:cut], "test": text[cut:]}
    if not all(parts.values()):
        raise ValueError(f"{source}: expected text to split in two, got {len(text)} characters")
    indexes = {split: pack_texts([(split, -1, part)], [], dest / split) for split, part in parts.items()}
    path = dest / TOKENIZER_NAME
    keep_tokenizer([text], path, "char", len(SPECIALS) + len(set(text)))
    return {split: keep_tokens(index, path, dest / f"{split}-tokens") for split, index in indexes.items()}


def main(
    text: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")],
    dest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
) -> int:
    """Shakespeare's plays, one character a token, in nanoGPT's split.

    Args:
        text: input.txt, or the same compressed.
        dest: gets the folders train, test, train-tokens and test-tokens, and tokenizer.json.
    """
    try:
        convert(text, dest)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
