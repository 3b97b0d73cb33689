"""The order law: which sample stands at position p of epoch e, and how a global batch is sliced.

The order is a permutation evaluated where it is asked for, never written out: O(1) memory however
many samples there are, and a pure function of (seed, epoch, position), so that it is the same on
any number of processes and workers, and a resume needs only a counter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import numpy as np
from jaxtyping import Int64

from selfsup.keyed import Purpose, random_bits

ORDER_VERSION = 1
"""Raised whenever the same (seed, epoch, position) comes to mean another sample."""

Layout = Literal["shuffled", "chunked", "sequential"]

CHUNK = 64
"""Consecutive samples that `chunked` keeps together: one stretch of a shard."""
WINDOW = 64 * CHUNK
"""Samples over which `chunked` mixes: what a page cache has to hold."""
_ROUNDS = 8

# Views of Purpose.ORDER: one independent permutation each, `_ROUNDS` views apart.
_EVERYTHING, _CHUNKS, _IN_WINDOW = 0, 16, 32


def sample_order(
    seed: int, epoch: int | Int64[np.ndarray, "n"], positions: Int64[np.ndarray, "n"], n: int, layout: Layout
) -> Int64[np.ndarray, "n"]:
    """The rows of the shard index that stand at `positions` of `epoch`, of `n` samples.

    positions: int64 (k,), each in [0, n); epoch: one for all, or int64 (k,), because a micro-batch
    can straddle epochs. Returns int64 (k,). `shuffled` is one permutation over everything.
    `chunked`, for hard disks and network file systems, permutes chunks of 64 consecutive samples,
    then the samples within each window of 64 chunks. `sequential` is the order of the shards.
    Raises ValueError for a position outside the epoch.
    """
    if len(positions) and not 0 <= positions.min() <= positions.max() < n:
        raise ValueError(f"positions: expected 0 <= position < {n}, got {positions.min()}..{positions.max()}")
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.int64), positions.shape)
    if layout == "sequential":
        return positions.copy()
    rows = positions
    outside = np.ones(len(rows), dtype=bool)
    # Cycle walking: both permutations act on a domain a little larger than n; whoever lands
    # outside [0, n) walks on until it is inside, which leaves a permutation of [0, n).
    while outside.any():
        walk = _shuffled if layout == "shuffled" else _chunked
        rows = rows.copy()
        rows[outside] = walk(seed, epochs[outside], rows[outside], n)
        outside = rows >= n
    return rows


def _shuffled(seed: int, epoch: np.ndarray, x: np.ndarray, n: int) -> np.ndarray:
    a, b = _radices(np.array([n]))
    return _feistel(seed, epoch, x, a, b, np.zeros_like(x), _EVERYTHING)


def _chunked(seed: int, epoch: np.ndarray, x: np.ndarray, n: int) -> np.ndarray:
    """A permutation of [0, chunks * CHUNK): samples within windows, then whole chunks."""
    chunks = -(-n // CHUNK)
    window, inside = np.divmod(x, WINDOW)
    size = np.minimum(chunks * CHUNK - window * WINDOW, WINDOW)  # the last window can be short
    inside = _walk(seed, epoch, inside, size, window, _IN_WINDOW)
    chunk, offset = np.divmod(window * WINDOW + inside, CHUNK)
    everywhere = np.full_like(x, chunks)
    return _walk(seed, epoch, chunk, everywhere, np.zeros_like(x), _CHUNKS) * CHUNK + offset


def _walk(
    seed: int, epoch: np.ndarray, x: np.ndarray, size: np.ndarray, stream: np.ndarray, view: int
) -> np.ndarray:
    """Element by element a permutation of [0, size), one for each stream."""
    x = x.copy()
    todo = np.ones(len(x), dtype=bool)
    while todo.any():
        a, b = _radices(size[todo])
        x[todo] = _feistel(seed, epoch[todo], x[todo], a, b, stream[todo], view)
        todo = x >= size
    return x


def _radices(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with a * b >= n > a * b - a and a = ceil(sqrt(n)), exactly."""
    sizes, inverse = np.unique(n, return_inverse=True)
    a = np.array([isqrt(int(size) - 1) + 1 for size in sizes], dtype=np.int64)[inverse]
    return a, -(-n // a)


def _feistel(
    seed: int, epoch: np.ndarray, x: np.ndarray, a: np.ndarray, b: np.ndarray, stream: np.ndarray, view: int
) -> np.ndarray:
    """A keyed permutation of [0, a * b): x = left * b + right; each round shifts one part, modulo
    its radix, by a random function of the other, which can always be undone."""
    left, right = np.divmod(x, b)
    key = stream << 32
    for step in range(0, _ROUNDS, 2):
        left = (left + _draw(seed, epoch, key | right, view + step, a)) % a
        right = (right + _draw(seed, epoch, key | left, view + step + 1, b)) % b
    return left * b + right


def _draw(seed: int, epoch: np.ndarray, position: np.ndarray, view: int, radix: np.ndarray) -> np.ndarray:
    """64 random bits modulo `radix`: biased by less than radix / 2**64."""
    bits = random_bits(seed, epoch, position, Purpose.ORDER, 2, view).astype(np.uint64)
    return ((bits[:, 0] << np.uint64(32) | bits[:, 1]) % radix.astype(np.uint64)).astype(np.int64)


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: `accumulation` micro-batches of `micro_batch` on each of `world` ranks.

    Raises ValueError where the global batch does not divide.
    """

    global_batch: int
    micro_batch: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world, (self.rank, self.world)
        if self.global_batch < 1 or self.micro_batch < 1:
            raise ValueError(
                "optim.batch_size, run.micro_batch: expected values >= 1, "
                f"got {self.global_batch} and {self.micro_batch}"
            )
        step = self.micro_batch * self.world
        if self.global_batch % step:
            share = self.global_batch // self.world
            if share * self.world == self.global_batch:
                micro = max(m for m in range(1, share + 1) if share % m == 0 and m <= self.micro_batch)
                fix = f"--run.micro-batch {micro}"
            else:
                nearest = max(1, (2 * self.global_batch + step) // (2 * step)) * step
                fix = f"--optim.batch-size {nearest}"
            raise ValueError(
                f"optim.batch_size: expected a multiple of run.micro_batch x processes = {self.micro_batch} x "
                f"{self.world} = {step}, got {self.global_batch}; nearest valid: {fix}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step."""
        return self.global_batch // (self.micro_batch * self.world)


def micro_batches(plan: BatchPlan, start_cursor: int) -> Iterator[Int64[np.ndarray, "micro"]]:
    """This rank's micro-batches without end: int64 (micro_batch,) global cursors.

    Global batch t is cursors [start + t * GB, start + (t + 1) * GB); micro-batch a of rank r is the
    slice [(a * world + r) * m : +m] of it. A cursor counts samples from the start of training:
    (epoch, position) = divmod(cursor, n), so that epochs join without padding or loss.
    """
    batch_start = start_cursor
    while True:
        for micro in range(plan.accumulation):
            first = batch_start + (micro * plan.world + plan.rank) * plan.micro_batch
            yield np.arange(first, first + plan.micro_batch, dtype=np.int64)
        batch_start += plan.global_batch
