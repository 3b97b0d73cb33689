"""What tools/shakespeare.py and tools/imdb.py share: a file that may be compressed, and text on its way to tokens."""

import bz2
import gzip
import lzma
import zlib
from pathlib import Path

from selfsup.data import tokenize
from selfsup.data.index import ShardIndex
from selfsup.data.pack import Sample, pack_samples
from selfsup.data.tokenizer import Kind, load_tokenizer, train_tokenizer
from selfsup.data.tokens import TokenIndex
from selfsup.durable import write_atomically

_OPENERS = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open, b"BZh": bz2.open}


def read_text(path: Path, advice: str) -> str:
    """The text of a UTF-8 file, compressed with xz, gzip or bzip2 or not at all.

    advice: what to do about a file that is not there. Raises ValueError naming the file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {advice}")
    with open(path, "rb") as file:
        head = file.read(6)
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), open)
    try:
        with opener(path, "rb") as stream:
            return stream.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); get it again") from None


def pack_texts(documents: list[tuple[str, int, str]], classes: list[str], dest: Path) -> ShardIndex:
    """Text shards of (key, label, text), label -1 for none; those of an earlier run are kept.

    Raises ValueError where `dest` holds shards of something else.
    """
    samples = [Sample(key, "txt", label, text.encode()) for key, label, text in documents]
    report = pack_samples(samples, classes, dest)
    print(report)
    return report.index


def keep_tokenizer(texts: list[str], path: Path, kind: Kind, vocab_size: int) -> None:
    """Learns a tokenizer of at most `vocab_size` tokens, or finds one there, which is kept.

    Raises ValueError where the one that is there is of another kind or size. One with fewer tokens is right where
    the texts have no more: to know that, it is learnt again and compared.
    """
    if not path.exists():
        found = train_tokenizer(texts, kind, vocab_size)
        write_atomically(path, found.json.encode())
    else:
        found = load_tokenizer(path)
        right = (found.kind, found.vocab_size) == (kind, vocab_size)
        if found.kind == kind and found.vocab_size < vocab_size:
            right = train_tokenizer(texts, kind, vocab_size).sha256 == found.sha256
        if not right:
            raise ValueError(
                f"{path}: expected a {kind} tokenizer of {vocab_size} tokens, got {found.kind} of "
                f"{found.vocab_size}; remove it and the token shards beside it"
            )
    if found.vocab_size < vocab_size:
        print(f"note: the text has no more than {found.vocab_size} tokens in it, {vocab_size} were allowed")
    print(f"{found.vocab_size} tokens, {kind}: {path}")


def keep_tokens(index: ShardIndex, tokenizer: Path, dest: Path) -> TokenIndex:
    """Token shards of text shards, or those of an earlier run. Raises ValueError where others are there."""
    tokens = tokenize.keep_tokens(index, dest, tokenizer)
    left_out = f", {tokens.empty} without a token left out" if tokens.empty else ""
    per_token = tokens.bytes.sum() / tokens.tokens
    print(
        f"{len(tokens)} documents{left_out}, {tokens.tokens} tokens of {per_token:.2f} bytes, "
        f"{tokens.unknown} unknown: {dest}"
    )
    return tokens
