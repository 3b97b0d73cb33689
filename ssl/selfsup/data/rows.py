"""Rows of tokens: what a model reads at once, made from documents.

A row is a pure function of (data, seed, epoch, number of the row): whoever asks for it, a worker of any
rank or a person at a prompt, gets the same tokens. What does not fit is counted and said by `describe`.
"""

import hashlib
import json
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64
from pydantic import model_validator
from torch import device

from selfsup.batch import TextBatch
from selfsup.config import Section
from selfsup.data import packing
from selfsup.data.packing import PACKING_VERSION, Packing, Pieces, Wrap
from selfsup.data.source import Source, Texts, check_roles, open_source, wrapped
from selfsup.keyed import Purpose, TextView, random_bits


class TextData(Section):
    """Text in shards, as tokens."""

    name: Literal["text"] = "text"
    shards: str
    """The folder of token shards (selfsup data tokenize); or of text shards, where `tokenizer` is set."""
    tokenizer: str | None = None
    """A tokenizer.json, to tokenise text shards as they are read, with packing pad only."""
    packing: Packing = "concat"
    """How documents become rows. concat: end to end, cut wherever a row is full, elsewhere each epoch. bestfit:
    several to a row, none split that fits. pad: one a row. pairs: two pieces a row, for BERT's next sentence."""
    document_mask: bool = False
    """A token sees its own document only, and positions begin anew in each."""
    order: Literal["shuffled", "chunked", "sequential"] = "shuffled"
    """Of the rows: shuffled over everything; chunked for hard disks and network file systems; or as stored."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> "TextData":
        if self.tokenizer is not None and self.packing != "pad":
            raise ValueError(
                f"packing: {self.packing} must know every document's number of tokens beforehand, expected pad where "
                f"data.tokenizer is set; or tokenise once: selfsup data tokenize {self.shards} {self.shards}-tokens "
                f"--tokenizer {self.tokenizer}, then leave data.tokenizer out"
            )
        if self.packing == "pairs" and self.document_mask:
            raise ValueError(
                "document_mask: packing pairs is there for two segments to see each other; set it to false"
            )
        return self

    def to(self, batch: TextBatch, device: device) -> TextBatch:
        """The batch on the device."""
        return batch.to(device)


class Row(NamedTuple):
    """A row of `n` = length tokens, or length + 1 where the next token is to be predicted."""

    ids: Int64[np.ndarray, "n"]
    document: Int64[np.ndarray, "n"]
    """Number of the document within the row, from 0; -1 for padding, which is at the end."""
    second: Int64[np.ndarray, "n"] | None = None
    """pairs: 1 in the second segment."""
    random_next: int | None = None
    """pairs: 1 where the second segment is of another document."""


class Rows:
    """Rows of `length` tokens (one more with next_token) over documents. `len` counts rows."""

    def __init__(
        self, source: Source, how: Packing, document_mask: bool, length: int, wrap: Wrap, next_token: bool
    ) -> None:
        """Raises ValueError where the packing leaves no row. See `open_rows` for what else must fit."""
        self.source, self.packing, self.document_mask = source, how, document_mask
        self.length, self.wrap, self.next_token = length, wrap, next_token
        self.width = length + next_token
        self.tokenizer = source.tokenizer
        pad = self.tokenizer.pad
        self._pad = self.tokenizer.sep if pad is None else pad  # hidden by `document` in either case
        if how == "pad":
            self._count = len(source)
        elif how == "concat":
            self._borders = source.offsets + np.arange(len(source) + 1) * (packing.head(wrap) + 1)
            try:
                self._count, self._shifts = packing.stream_rows(int(self._borders[-1]), length, self.width)
            except ValueError as error:
                raise ValueError(
                    f"{source.folder}: {error}, special tokens counted; set encoder.max_length lower"
                ) from None
        elif how == "bestfit":
            pieces = packing.cut(source.offsets, wrap, self.width)
            order, self._rows = packing.best_fit(packing.sizes(pieces, wrap), self.width)
            self._pieces, self._count = pieces.take(order), len(self._rows) - 1
        else:
            self._pieces = self._pairs_pieces()
            self._count = len(self._pieces.start)

    def __len__(self) -> int:
        return self._count

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.tokenizer.vocab_size

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256: equal means the same rows."""
        parts = {
            "documents": self.source.fingerprint, "tokenizer": self.tokenizer.sha256, "packing": self.packing,
            "document_mask": self.document_mask, "length": self.length, "wrap": self.wrap,
            "next_token": self.next_token, "version": PACKING_VERSION,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """One line: how many rows of how many documents, the padding, and all that is cut or left out."""
        source, width, head = self.source, self.width, packing.head(self.wrap)
        rows = f"{len(self):,} rows of {self.length} tokens, packing {self.packing}, from {len(source):,} documents"
        if isinstance(source, Texts):
            return f"{rows}, tokenised as they are read: what is cut and padded is known only then"
        lengths, most = np.diff(source.offsets), packing.longest(self.wrap, width)
        long = lengths > most
        parts = [f"{rows} of {source.tokens:,} tokens"]
        if self.packing == "concat":
            left = int(self._borders[-1]) - (len(self) - 1) * self.length - width
            parts.append(f"no padding, {left:,} tokens left off at the ends, others each epoch")
        elif self.packing == "pad":
            filled = np.minimum(lengths + head + 1, width).sum()
            parts.append(f"{1 - filled / (len(self) * width):.1%} padding")
            lost = int((lengths[long] - (most if self.wrap == "bert" else width)).sum())
            parts.append(f"{int(long.sum()):,} documents cut off, {lost:,} of their tokens never seen")
        elif self.packing == "bestfit":
            filled = packing.sizes(self._pieces, self.wrap).sum()
            parts.append(f"{1 - filled / (len(self) * width):.1%} padding")
            parts.append(f"{int(long.sum()):,} documents longer than a row, in several pieces")
        else:
            kept = int(self._pieces.length.sum())
            parts.append(
                f"{1 - (kept + 3 * len(self)) / (len(self) * width):.1%} padding where a pair is of one piece"
            )
            parts.append(f"{source.tokens - kept:,} tokens left out, single ones that cannot be split")
        return "; ".join(parts)

    def rows(self, seed: int, epoch: Int64[np.ndarray, "b"], row: Int64[np.ndarray, "b"]) -> list[Row]:
        """The rows of those numbers in those epochs. Raises ValueError naming the file that cannot be read."""
        if self.packing == "pad":
            documents = wrapped(self.source, row, self.wrap, self.width)
            return [self._row([ids]) for ids in documents]
        if self.packing == "concat":
            starts = [shift(seed, int(e), self._shifts) + int(r) * self.length for e, r in zip(epoch, row)]
            return [self._from_stream(start) for start in starts]
        if self.packing == "bestfit":
            return [self._from_pieces(r) for r in row]
        bits = random_bits(seed, epoch, row, Purpose.TEXT, 4, TextView.PAIR)
        return [self._pair(r, drawn) for r, drawn in zip(row, bits)]

    def row(self, seed: int, epoch: int, row: int) -> Row:
        """One row; see `rows`."""
        return self.rows(seed, np.array([epoch]), np.array([row]))[0]

    def _row(self, parts: list[np.ndarray]) -> Row:
        """Parts of documents one after another, then padding."""
        ids = np.full(self.width, self._pad, dtype=np.int64)
        document = np.full(self.width, -1, dtype=np.int64)
        at = 0
        for number, part in enumerate(parts):
            ids[at : at + len(part)], document[at : at + len(part)] = part, number
            at += len(part)
        return Row(ids, document)

    def _from_stream(self, start: int) -> Row:
        """concat: a stretch of all documents put end to end, special tokens among them."""
        before, borders = packing.head(self.wrap), self._borders
        first = int(np.searchsorted(borders, start, side="right")) - 1
        last = int(np.searchsorted(borders, start + self.width, side="left"))  # one behind the last document
        inner = borders[first : last + 1] - start
        sep, cls = inner[1:] - 1, inner[:-1]
        ids, text = np.empty(self.width, dtype=np.int64), np.ones(self.width, dtype=bool)
        around = [(sep, self.tokenizer.sep), (cls, self.tokenizer.cls)]
        for places, special in around[: 1 + before]:  # a tokenizer for gpt rows may have no [CLS]
            inside = places[(places >= 0) & (places < self.width)]
            ids[inside], text[inside] = special, False
        # Of the first document, the tokens up to `start` (its [CLS] is none of them) are not in the row.
        begin = self.source.offsets[first] + max(0, start - int(borders[first]) - before)
        ids[text] = self.source.read(begin, begin + int(text.sum()))
        starts = np.zeros(self.width, dtype=np.int64)
        starts[cls[1:]] = 1
        return Row(ids, np.cumsum(starts))

    def _from_pieces(self, row: np.integer) -> Row:
        """bestfit: nothing is drawn."""
        pieces, parts = self._pieces, []
        before = [self.tokenizer.cls] * packing.head(self.wrap)
        for piece in range(self._rows[row], self._rows[row + 1]):
            start = pieces.start[piece]
            ids = self.source.read(start, start + pieces.length[piece])
            parts.append(np.concatenate([before, ids, [self.tokenizer.sep] * int(pieces.ends[piece])]))
        return self._row(parts)

    def _pairs_pieces(self) -> Pieces:
        """Raises ValueError where no piece can be split, or there is no other document to draw from."""
        pieces = packing.cut_for_pairs(self.source.offsets, self.width)
        pieces = pieces.take(np.flatnonzero(pieces.length >= 2))
        if len(self.source) < 2 or not len(pieces.start):
            raise ValueError(
                f"{self.source.folder}: packing pairs: expected at least two documents, one of two tokens or more, "
                f"got {len(self.source)} of at most {np.diff(self.source.offsets).max()} tokens"
            )
        return pieces

    def _pair(self, row: np.integer, bits: Int64[np.ndarray, "4"]) -> Row:
        """pairs: [CLS] A [SEP] B [SEP]; A and B are one piece split, or B is taken from another document."""
        piece, offsets = Pieces(*(column[row] for column in self._pieces)), self.source.offsets
        split = 1 + _below(bits[0], piece.length - 1)
        start, stop = piece.start + split, piece.start + piece.length
        random_next = int(bits[1] >> 31)
        if random_next:
            other = _below(bits[2], len(self.source) - 1)
            other += other >= piece.document  # any but its own
            length = min(stop - start, offsets[other + 1] - offsets[other])
            start = offsets[other] + _below(bits[3], offsets[other + 1] - offsets[other] - length + 1)
            stop = start + length
        cls, sep = [self.tokenizer.cls], [self.tokenizer.sep]
        first = np.concatenate([cls, self.source.read(piece.start, piece.start + split), sep])
        second = np.concatenate([self.source.read(start, stop), sep])
        made = self._row([np.concatenate([first, second])])
        segment = np.zeros(self.width, dtype=np.int64)
        segment[len(first) : len(first) + len(second)] = 1
        return made._replace(second=segment, random_next=random_next)


def open_rows(config: TextData, length: int, wrap: Wrap, next_token: bool) -> Rows:
    """The rows of a data set, its files checked. length: `encoder.max_length`; next_token: rows for a causal model.

    Raises ValueError, with the fix, for files that are missing, damaged or of another kind, for a tokenizer
    without a special token that is needed, for a length too short to hold one, for data shorter than a row, and
    for pairs elsewhere than with masks in bert rows.
    """
    if config.packing == "pairs" and (wrap != "bert" or next_token):
        raise ValueError(
            "data.packing: pairs are for a masked model ([CLS] A [SEP] B [SEP]), a causal one has no use for them; "
            "expected concat, bestfit or pad"
        )
    least = 5 if config.packing == "pairs" else packing.head(wrap) + 2
    if length + next_token < least:
        raise ValueError(
            f"encoder.max_length: expected at least {least - next_token} for text in rows, got {length}"
        )
    source = open_source(config.shards, config.tokenizer)
    check_roles(source.tokenizer, wrap, masks=not next_token)
    return Rows(source, config.packing, config.document_mask, length, wrap, next_token)


@lru_cache(maxsize=16)
def shift(seed: int, epoch: int, shifts: int) -> int:
    """concat: where the first row of an epoch begins, 0 .. shifts - 1."""
    row = np.zeros(1, dtype=np.int64)
    high, low = random_bits(seed, epoch, row, Purpose.TEXT, 2, TextView.SHIFT)[0].tolist()
    return (high << 32 | low) % shifts


def _below(bits: np.integer, n: int | np.integer) -> int:
    """32 random bits as a number below n < 2**31: biased by less than n / 2**32."""
    return int(bits) * int(n) >> 32
