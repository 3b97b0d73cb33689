"""Token shards: documents tokenised once, one number a token, read from the disk as they are needed.

A folder holds `tokens-000000.npy ...` (one flat uint16 or uint32 array each, which NumPy alone reads),
`tokenizer.json`, the tokenizer that made them, and `index.safetensors`: where every document begins.
No special tokens are stored: whoever builds rows puts them in. A document never spans two shards.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from selfsup.data.index import INDEX_NAME, local_folder
from selfsup.data.tokenizer import TOKENIZER_NAME, TextTokenizer, json_sha256, load_tokenizer
from selfsup.durable import sha256

TOKENS_VERSION = 1


class TokenShard(NamedTuple):
    """What the index remembers of a file of tokens."""

    name: str
    size: int
    sha256: str
    tokens: int


@dataclass(frozen=True)
class TokenIndex:
    """Every document of a folder of token shards, in the order of the shards. `len` counts documents."""

    folder: Path
    shards: tuple[TokenShard, ...]
    label: Int64[np.ndarray, "n"]
    """-1 where there is none."""
    offsets: Int64[np.ndarray, "n+1"]
    """Document i is tokens offsets[i] to offsets[i+1] of all shards put end to end; none is empty."""
    bytes: Int64[np.ndarray, "n"]
    """UTF-8 length of each document."""
    classes: tuple[str, ...]
    tokenizer_sha256: str
    vocab_size: int
    source: str
    """Fingerprint of the text shards that were tokenised; empty where there were none."""
    unknown: int
    """How many of the tokens are [UNK]."""
    empty: int
    """Documents left out because they have no token."""
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.label)

    def __reduce__(self):
        return open_tokens, (str(self.folder),)  # to a process that is not forked: not the mapped files

    @property
    def tokens(self) -> int:
        """All tokens of all documents."""
        return int(self.offsets[-1])

    def document(self, i: int | np.integer) -> Int64[np.ndarray, "n"]:
        """The tokens of document i. Raises ValueError as `read`."""
        return self.read(self.offsets[i], self.offsets[i + 1])

    def read(self, start: int | np.integer, stop: int | np.integer) -> Int64[np.ndarray, "n"]:
        """Tokens start to stop of all shards put end to end.

        Raises ValueError, naming the file, for a shard that cannot be opened or is not what was indexed.
        """
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        parts, starts = [], self._starts
        shard = int(np.searchsorted(starts, start, side="right")) - 1
        while start < stop:
            end = min(int(stop), int(starts[shard + 1]))
            parts.append(self._map(shard)[int(start - starts[shard]) : int(end - starts[shard])])
            start, shard = end, shard + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    @cached_property
    def _starts(self) -> Int64[np.ndarray, "_"]:
        return np.cumsum([0, *(shard.tokens for shard in self.shards)], dtype=np.int64)

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            expected = self.shards[shard]
            path = self.folder / expected.name
            try:
                tokens = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: cannot open the token shard: {error}") from None
            if tokens.shape != (expected.tokens,) or tokens.dtype != token_dtype(self.vocab_size):
                raise ValueError(
                    f"{path}: altered: expected {expected.tokens} {token_dtype(self.vocab_size)} tokens as "
                    f"indexed, got {tokens.shape} {tokens.dtype}; make the folder again: selfsup data tokenize"
                )
            self._maps[shard] = tokens
        return self._maps[shard]

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that made the tokens. Raises ValueError where it has been replaced since."""
        _check_tokenizer(self.folder, self.tokenizer_sha256)
        return load_tokenizer(self.folder / TOKENIZER_NAME)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the index says: equal means the same tokens of the same tokenizer."""
        digest = hashlib.sha256(header_json(self).encode())
        for name, array in self.tensors().items():
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def tensors(self) -> dict[str, np.ndarray]:
        """The columns as `index.safetensors` holds them."""
        return {"offsets": self.offsets, "label": self.label, "bytes": self.bytes}


def header_json(index: TokenIndex) -> str:
    """All else that `index.safetensors` says, as its header has it."""
    names = ("classes", "tokenizer_sha256", "vocab_size", "source", "unknown", "empty")
    values = {name: getattr(index, name) for name in names}
    header = {"kind": "tokens", "version": TOKENS_VERSION, "shards": [list(s) for s in index.shards]}
    return json.dumps({**header, **values}, sort_keys=True)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every token of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def is_token_folder(folder: Path) -> bool:
    """Whether token shards lie in a folder (or are meant to: their index is there)."""
    return any(folder.glob("tokens-*.npy")) or _header_kind(folder / INDEX_NAME) == "tokens"


def _header_kind(path: Path) -> str:
    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {})["selfsup"]).get("kind", "images")
    except (SafetensorError, OSError, KeyError, ValueError):
        return "none"


def open_tokens(shards: str) -> TokenIndex:
    """A folder of token shards, checked against the files that are there.

    Raises ValueError, with the fix, for a missing folder, one that holds text or images instead, no or a
    broken index, a missing shard, one of another size than indexed, and another tokenizer than indexed.
    """
    folder = local_folder(shards)
    path = folder / INDEX_NAME
    if any(folder.glob("*.tar")) and not is_token_folder(folder):
        raise ValueError(
            f"{folder}: expected token shards (tokens-*.npy), got shards of text or images; make token shards "
            f"from text with: selfsup data tokenize {folder} {folder}-tokens --tokenizer TOKENIZER.json"
        )
    again = f"make the folder again: selfsup data tokenize TEXT {folder} --tokenizer TOKENIZER.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no {INDEX_NAME}: expected a folder of token shards; {again}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["selfsup"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        kind, version = header.pop("kind"), header.pop("version")
        if (kind, version) != ("tokens", TOKENS_VERSION):
            raise ValueError(f"kind {kind}, format version {version}, expected tokens, {TOKENS_VERSION}")
        header["shards"] = tuple(TokenShard(*fields) for fields in header["shards"])
        header["classes"] = tuple(header["classes"])
        index = TokenIndex(folder, **header, **tensors)
        _check_consistent(index)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a usable index of tokens ({error}); {again}") from None
    for shard in index.shards:
        file = folder / shard.name
        if not file.is_file():
            raise ValueError(f"{file}: shard missing; restore it, or {again}")
        if file.stat().st_size != shard.size:
            raise ValueError(
                f"{file}: truncated or altered: expected {shard.size} bytes as indexed, got "
                f"{file.stat().st_size}; restore it, or {again}"
            )
    _check_tokenizer(folder, index.tokenizer_sha256)
    return index


def _check_consistent(index: TokenIndex) -> None:
    n, offsets = len(index), index.offsets
    if n == 0 or len(offsets) != n + 1 or len(index.bytes) != n:
        raise ValueError("its columns differ in length, or are empty")
    if offsets[0] != 0 or (np.diff(offsets) < 1).any() or not np.isin(index._starts, offsets).all():
        raise ValueError("its documents do not add up")
    if index._starts[-1] != offsets[-1]:
        raise ValueError("its tokens per shard do not add up")


def _check_tokenizer(folder: Path, expected: str) -> None:
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        raise ValueError(f"{path}: missing; restore the tokenizer that made these tokens")
    if (got := json_sha256(path)) != expected:
        raise ValueError(
            f"{path}: not the tokenizer that made these tokens: expected SHA-256 {expected[:12]}..., got "
            f"{got[:12]}...; restore it, or tokenise the text again into another folder"
        )


def check_tokens(index: TokenIndex, all: bool) -> list[str]:
    """Hashes token shards again and compares with the index; returns the names of those hashed.

    `all`: every shard; otherwise those modified after the index was written. Raises ValueError naming
    every altered shard.
    """
    written = (index.folder / INDEX_NAME).stat().st_mtime_ns
    paths = {shard.name: index.folder / shard.name for shard in index.shards}
    hashed = [s for s in index.shards if all or paths[s.name].stat().st_mtime_ns > written]
    progress = tqdm(hashed, desc="check", unit="shard", disable=None)
    altered = [shard.name for shard in progress if sha256(paths[shard.name]) != shard.sha256]
    if altered:
        raise ValueError(
            f"{index.folder}: altered since written: {', '.join(altered)}; restore, or tokenise the text again"
        )
    return [shard.name for shard in hashed]
