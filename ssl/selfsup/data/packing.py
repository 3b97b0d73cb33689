"""Which tokens stand in which row: pure functions of the documents' lengths.

A row is `width` tokens wide. Everything here is arithmetic on lengths: no token is read, nothing is drawn.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

Packing = Literal["concat", "bestfit", "pad", "pairs"]
Wrap = Literal["bert", "gpt"]
"""What stands around a document: bert `[CLS] x [SEP]`, gpt `x [SEP]`."""

PACKING_VERSION = 1
"""Raised whenever the same lengths come to mean other rows."""


class Pieces(NamedTuple):
    """Stretches of documents."""

    document: Int64[np.ndarray, "p"]
    start: Int64[np.ndarray, "p"]
    """First token, on the axis of all tokens."""
    length: Int64[np.ndarray, "p"]
    """Tokens, specials not counted."""
    ends: Bool[np.ndarray, "p"]
    """[SEP] follows."""

    def take(self, order: np.ndarray) -> "Pieces":
        """The pieces at `order`."""
        return Pieces(*(column[order] for column in self))


def head(wrap: Wrap) -> int:
    """Special tokens before a document."""
    return 1 if wrap == "bert" else 0


def sizes(pieces: Pieces, wrap: Wrap) -> Int64[np.ndarray, "p"]:
    """int64 (p,): places that each piece takes in a row, specials counted."""
    return head(wrap) + pieces.length + pieces.ends


def stream_rows(tokens: int, length: int, width: int) -> tuple[int, int]:
    """(rows, shifts): how a stream of `tokens` is cut into rows of `width`, one every `length`, from any of
    `shifts` first tokens.

    The number of rows is the same for every shift. Fewer than `length + width` tokens are left off at both ends
    together. Raises ValueError for a stream shorter than a row.
    """
    if tokens < width:
        raise ValueError(f"expected at least the {width} tokens of one row, got {tokens}")
    shifts = min(length, tokens - width + 1)
    return (tokens - width - (shifts - 1)) // length + 1, shifts


def longest(wrap: Wrap, width: int) -> int:
    """Tokens of the longest document that a row holds whole, with what stands around it."""
    return width - head(wrap) - 1


def cut(offsets: Int64[np.ndarray, "borders"], wrap: Wrap, width: int) -> Pieces:
    """Documents that fit stay whole; longer ones are cut into pieces that fill a row, and what remains.

    bert: every piece has its own [CLS] and [SEP]. gpt: [SEP] ends the last piece, and is left out where that
    fills its row. Documents without a token make no piece.
    """
    lengths = np.diff(offsets)
    fits = longest(wrap, width)
    room = fits if wrap == "bert" else width
    full = np.where(lengths > fits, lengths // room, 0)
    count = full + (lengths - full * room > 0)
    document = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)  # within its document
    start = offsets[document] + number * room
    length = np.minimum(room, offsets[document + 1] - start)
    ends = length < width if wrap == "gpt" else np.ones(len(start), dtype=bool)
    return Pieces(document, start, length, ends)


def cut_for_pairs(offsets: Int64[np.ndarray, "borders"], width: int) -> Pieces:
    """Pieces of at most width - 3 tokens, which leaves room for [CLS] A [SEP] B [SEP]."""
    return cut(offsets, "bert", width - 1)


def best_fit(
    sizes: Int64[np.ndarray, "p"], width: int
) -> tuple[Int64[np.ndarray, "p"], Int64[np.ndarray, "borders"]]:
    """Best-fit decreasing: the largest first, each into the fullest row that still holds it.

    sizes: int64 (p,), 1 .. width. Returns the items row by row, int64 (p,), and the rows' borders in them,
    int64 (rows + 1,). Equal sizes go in the order given, and of rows equally full the last one touched is taken.
    Johnson 1973 ("Near-optimal bin packing algorithms"): at most 11/9 of the least number of rows, and a few.
    """
    order = np.argsort(-sizes, kind="stable")
    by_room: list[list[int]] = [[] for _ in range(width + 1)]  # rows by the places left in them
    rooms = 0  # bit r: some row has r places left; so the fullest row is found in a few machine words
    row_of, rows = np.empty(len(sizes), dtype=np.int64), 0
    for item, size in zip(order.tolist(), sizes[order].tolist()):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row, rows = width, rows, rows + 1
        row_of[item] = row
        if room > size:
            by_room[room - size].append(row)
            rooms |= 1 << (room - size)
    by_row = order[np.argsort(row_of[order], kind="stable")]
    counts = np.bincount(row_of, minlength=rows)
    return by_row, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
