"""From text shards to a tokenizer, and from both to token shards."""

import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from glob import escape
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt32
from safetensors.numpy import save
from tqdm import tqdm

from selfsup.data.documents import TextStream, chunks, sampled_rows
from selfsup.data.index import INDEX_NAME, ShardIndex, load_index
from selfsup.data.reader import ShardReader
from selfsup.data.shard import fork_or_spawn
from selfsup.data.tokenizer import TOKENIZER_NAME, Kind, TextTokenizer, load_tokenizer, train_tokenizer
from selfsup.data.tokens import (
    TokenIndex,
    TokenShard,
    header_json,
    is_token_folder,
    open_tokens,
    token_dtype,
)
from selfsup.durable import fsync_path, sha256, write_atomically

TOKENS_PER_SHARD = 1 << 25


class TokenDocument(NamedTuple):
    """A tokenised document on its way to the disk."""

    ids: UInt32[np.ndarray, "n"]
    label: int
    """-1 for none."""
    bytes: int
    """Length of its text in UTF-8: what bits per byte are counted by."""


def check_free(path: Path) -> None:
    """Raises ValueError where something new cannot be made: a file or a folder with content is there already."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path}: exists; remove it, or choose another name")


def train_on_shards(
    index: ShardIndex, kind: Kind, vocab_size: int, cased: bool = False, sample: int | None = None
) -> TextTokenizer:
    """A tokenizer learnt from text shards, all documents or a keyed sample of them.

    The same shards give the same tokenizer. Raises ValueError as `train_tokenizer`, and naming the document
    that cannot be read.
    """
    return train_tokenizer(TextStream(index, sampled_rows(index, sample)), kind, vocab_size, cased)


def tokenize_shards(
    index: ShardIndex,
    dest: str | Path,
    tokenizer: str | Path,
    processes: int = 1,
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> TokenIndex:
    """Tokenises every document of text shards, in their order, into the folder `dest`; see `write_tokens`.

    The files are the same whatever the number of processes. Raises ValueError for what `load_tokenizer` and
    `write_tokens` refuse, and naming the document that cannot be read.
    """
    path = Path(tokenizer).expanduser()
    check_free(Path(dest).expanduser())
    found = load_tokenizer(path)
    documents = _encoded(index, path, found.sha256, processes)
    return write_tokens(documents, dest, found, index.classes, index.fingerprint, tokens_per_shard)


def keep_tokens(index: ShardIndex, dest: Path, tokenizer: Path, processes: int = 1) -> TokenIndex:
    """Token shards of text shards: those that are there if they are the same, else made by `tokenize_shards`.

    Raises ValueError where `dest` holds tokens of other text or of another tokenizer, and as `tokenize_shards`.
    """
    if not (dest.is_dir() and is_token_folder(dest)):
        return tokenize_shards(index, dest, tokenizer, processes)
    tokens = open_tokens(str(dest))
    if (tokens.source, tokens.tokenizer_sha256) != (index.fingerprint, load_tokenizer(tokenizer).sha256):
        raise ValueError(f"{dest}: holds tokens of other text or of another tokenizer; remove the folder")
    return tokens


def _encoded(index: ShardIndex, tokenizer: Path, sha256: str, processes: int) -> Iterator[TokenDocument]:
    parts = chunks(index, np.arange(len(index)))
    constants = repeat(index.folder), repeat(index.fingerprint), repeat(tokenizer), repeat(sha256)
    with tqdm(total=len(index), desc="tokenize", unit="document", disable=None) as bar:
        if processes <= 1 or len(parts) == 1:
            done = map(_encode, *constants, parts)
            yield from _documents(index, parts, done, bar)
            return
        with ProcessPoolExecutor(min(processes, len(parts)), mp_context=fork_or_spawn()) as pool:
            done = pool.map(_encode, *constants, parts)
            yield from _documents(index, parts, done, bar)


def _documents(
    index: ShardIndex, parts: list[np.ndarray], done: Iterable[list[np.ndarray]], bar: tqdm
) -> Iterator[TokenDocument]:
    for rows, encoded in zip(parts, done):
        for row, ids in zip(rows.tolist(), encoded):
            yield TokenDocument(ids, int(index.label[row]), int(index.length[row]))
        bar.update(len(rows))


@lru_cache(maxsize=1)
def _opened(folder: Path, fingerprint: str, tokenizer: Path, sha256: str) -> tuple[ShardReader, TextTokenizer]:
    """Opened once a process; the hashes tell another folder or tokenizer of the same name."""
    return ShardReader(load_index(folder)), load_tokenizer(tokenizer)


def _encode(
    folder: Path, fingerprint: str, tokenizer: Path, sha256: str, rows: Int64[np.ndarray, "n"]
) -> list[UInt32[np.ndarray, "_"]]:
    reader, found = _opened(folder, fingerprint, tokenizer, sha256)
    return found.encode(reader.texts(rows))


def write_tokens(
    documents: Iterable[TokenDocument],
    dest: str | Path,
    tokenizer: TextTokenizer,
    classes: tuple[str, ...] = (),
    source: str = "",
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> TokenIndex:
    """Writes a folder of token shards, whole or not at all; documents without a token are counted and left out.

    It is written beside `dest` under a name of its own and renamed at the end. Raises ValueError where
    `dest` holds something, for no documents, for tokens outside the vocabulary, and for a shard size below 1.
    """
    dest = Path(dest).expanduser()
    check_free(dest)
    if tokens_per_shard < 1:
        raise ValueError(f"tokens per shard: expected a value >= 1, got {tokens_per_shard}")
    part = dest.absolute().with_name(f".{dest.absolute().name}.tmp-{os.getpid()}")
    for old in part.parent.glob(f"{escape(part.name.rpartition('-')[0])}-*"):
        if not _runs(old.name.rpartition("-")[2]):
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    try:
        index = _write_shards(documents, part, tokenizer, classes, source, tokens_per_shard)
        write_atomically(part / TOKENIZER_NAME, tokenizer.json.encode())
        metadata = {"selfsup": header_json(index)}
        write_atomically(part / INDEX_NAME, save(index.tensors(), metadata=metadata))
        os.replace(part, dest)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # there only after a failure
    fsync_path(dest.absolute().parent)
    return open_tokens(str(dest))


def _runs(process: str) -> bool:
    """Whether there is a process of that number, other than this one."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        return True
    return int(process) != os.getpid()


def _write_shards(
    documents: Iterable[TokenDocument],
    folder: Path,
    tokenizer: TextTokenizer,
    classes: tuple[str, ...],
    source: str,
    tokens_per_shard: int,
) -> TokenIndex:
    dtype, unk = token_dtype(tokenizer.vocab_size), tokenizer.unk
    shards: list[TokenShard] = []
    waiting: list[np.ndarray] = []
    held = unknown = empty = 0
    lengths, labels, sizes = [], [], []

    def flush() -> None:
        path = folder / f"tokens-{len(shards):06d}.npy"
        tokens = np.concatenate(waiting)
        np.save(path, tokens)
        fsync_path(path)
        shards.append(TokenShard(path.name, path.stat().st_size, sha256(path), len(tokens)))
        waiting.clear()

    for ids, label, size in documents:
        if len(ids) == 0:
            empty += 1
            continue
        if ids.max() >= tokenizer.vocab_size:
            raise ValueError(f"token {ids.max()}: expected one below the vocabulary of {tokenizer.vocab_size}")
        if held and held + len(ids) > tokens_per_shard:
            flush()
            held = 0
        waiting.append(ids.astype(dtype))
        held += len(ids)
        unknown += 0 if unk is None else int((ids == unk).sum())
        lengths.append(len(ids))
        labels.append(label)
        sizes.append(size)
    if not lengths:
        raise ValueError(f"nothing to write: no document has a token ({empty} without one)")
    flush()
    return TokenIndex(
        folder=folder,
        shards=tuple(shards),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        label=np.array(labels, dtype=np.int64),
        bytes=np.array(sizes, dtype=np.int64),
        classes=tuple(classes),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        source=source,
        unknown=unknown,
        empty=empty,
    )
