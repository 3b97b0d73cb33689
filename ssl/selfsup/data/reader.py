"""Random access to the samples of an index: one positioned read and one CRC a sample."""

import os
import zlib
from collections import OrderedDict

import numpy as np
from jaxtyping import Int64

from selfsup.data.index import ShardIndex

_MOST_OPEN_FILES = 128


class ShardReader:
    """Reads samples by row. Safe to fork: files are opened where they are used, reads carry their offset."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, least recently used first

    def read(self, rows: Int64[np.ndarray, "n"]) -> list[bytes]:
        """The encoded images (or texts) at `rows`, in that order; read in the order of the disk.

        Raises ValueError naming shard and key where the bytes are not those that were indexed.
        """
        index = self.index
        blobs = [b""] * len(rows)
        for place in np.lexsort((index.offset[rows], index.shard[rows])):
            row = rows[place]
            length = int(index.length[row])
            blob = os.pread(self._open(int(index.shard[row])), length, int(index.offset[row]))
            if len(blob) != length or zlib.crc32(blob) != index.crc32[row]:
                raise ValueError(
                    f"{index.name(row)}: shard altered or damaged: not the bytes that were indexed; "
                    f"find all with: selfsup data check {index.folder}"
                )
            blobs[place] = blob
        return blobs

    def texts(self, rows: Int64[np.ndarray, "n"]) -> list[str]:
        """The documents at `rows` of an index of text, in that order.

        Raises ValueError as `read`, and for bytes that are not UTF-8.
        """
        texts = []
        for row, data in zip(rows, self.read(rows)):
            try:
                texts.append(data.decode())
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.index.name(row)}: not UTF-8 text ({error.reason} at byte {error.start}); "
                    f"find all with: selfsup data check {self.index.folder}"
                ) from None
        return texts

    def _open(self, shard: int) -> int:
        descriptor = self._files.pop(shard, None)
        if descriptor is None:
            path = self.index.folder / self.index.shards[shard].name
            try:
                descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                raise ValueError(f"{path}: cannot open the shard: {error.strerror}") from None
            if len(self._files) == _MOST_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files[shard] = descriptor
        return descriptor

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()
