"""Documents of text shards: opened, and read as text in the order of the disk."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from selfsup.data.index import ShardIndex, local_folder, open_shards
from selfsup.data.order import sample_order
from selfsup.data.reader import ShardReader
from selfsup.data.tokens import is_token_folder

_CHUNK_BYTES = 4 << 20


def open_texts(shards: str, option: str = "data.shards") -> ShardIndex:
    """The index of a folder of text shards, checked against the files that are there.

    option: where the user named the folder. Raises ValueError, with the fix, as `open_shards`; for images; and
    for token shards, which hold no text.
    """
    folder = local_folder(shards, option)
    if is_token_folder(folder):
        raise ValueError(
            f"{folder}: expected shards of text (*.tar), got token shards; name the text they were made from, or "
            "pack it: selfsup data pack SOURCE FOLDER"
        )
    return open_shards(shards, "text")


def chunks(index: ShardIndex, rows: Int64[np.ndarray, "n"]) -> list[Int64[np.ndarray, "_"]]:
    """`rows` cut into stretches of some megabytes of text (or one long document), so that no more is held."""
    ends = np.cumsum(index.length[rows])
    part = ends // _CHUNK_BYTES
    return np.split(rows, 1 + np.flatnonzero(np.diff(part)))


class TextStream:
    """The texts at some rows, one after another, as often as it is iterated over; with a progress bar.

    Iterating raises ValueError naming shard and key for what cannot be read.
    """

    def __init__(self, index: ShardIndex, rows: Int64[np.ndarray, "n"]) -> None:
        self.index, self.rows = index, rows

    def __iter__(self) -> Iterator[str]:
        reader = ShardReader(self.index)
        with tqdm(total=len(self.rows), desc="read", unit="document", disable=None) as bar:
            for chunk in chunks(self.index, self.rows):
                yield from reader.texts(chunk)
                bar.update(len(chunk))


def sampled_rows(index: ShardIndex, sample: int | None) -> Int64[np.ndarray, "n"]:
    """Every row, or `sample` of them drawn by key: the same ones each time. In the order of the disk."""
    if sample is None or sample >= len(index):
        return np.arange(len(index))
    if sample < 1:
        raise ValueError(f"sample: expected a number of documents >= 1, got {sample}")
    return np.sort(sample_order(0, 0, np.arange(sample), len(index), "shuffled"))
