"""Counter-based random numbers: every draw is a pure function of what it is for.

A draw is named by (seed, epoch, position, view, purpose). Nothing else enters: no rank, no worker,
no clock, no earlier draw. Hence the same crops and masks on any number of processes, and a resume
that needs no generator state. The generator is Philox-4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), written in integer operations that NumPy and torch share,
so a draw made in a loader worker and one made on the device are the same bits.
"""

from enum import IntEnum
from typing import TypeVar

import numpy as np
import torch

IntArray = TypeVar("IntArray", np.ndarray, torch.Tensor)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Purpose(IntEnum):
    """What a draw is for. Values are part of the order law: append, never renumber."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    MASK = 3
    WINDOW = 4
    MODEL = 5
    COLOUR = 6
    TEXT = 7


class TextView(IntEnum):
    """Views of Purpose.TEXT. Values are part of the order law too."""

    SHIFT = 0
    """Where the first row of an epoch begins (data/rows.py)."""
    PAIR = 1
    """The second segment of a row (data/rows.py)."""
    GENERATE = 2
    """The next token of a text that is written (text/generate.py)."""
    BATCHES = 3
    """The order of batches sorted by length (probe/text_finetune.py)."""


def philox4x32(
    counter: tuple[IntArray, IntArray, IntArray, IntArray], key: tuple[int | IntArray, int | IntArray]
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Philox-4x32-10: four 32-bit words out of a 128-bit counter and a 64-bit key.

    `counter` and `key` are int64 arrays (NumPy or torch, any common shape) holding values in
    [0, 2**32). The 32x32-bit products wrap modulo 2**64 in int64, which leaves both halves right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        hi0, lo0 = (p0 >> 32) & _MASK, p0 & _MASK
        hi1, lo1 = (p1 >> 32) & _MASK, p1 & _MASK
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_bits(
    seed: int, epoch: int | IntArray, position: IntArray, purpose: Purpose, n: int, view: int = 0
) -> IntArray:
    """`n` random 32-bit words for each position.

    position: int64 (...), any sample position >= 0; epoch: int or int64 of the same shape, < 2**32.
    Returns int64 (..., n) with values in [0, 2**32), of the library and on the device of `position`.
    Raises ValueError for a seed, view or purpose outside its field of the key.
    """
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed: expected 0 <= seed < 2**32, got {seed}")
    if not 0 <= view < 2**16:
        raise ValueError(f"view: expected 0 <= view < 2**16, got {view}")
    position = position[..., None]
    if not isinstance(epoch, int):
        epoch = epoch[..., None]
    blocks = -(-n // 4)
    if isinstance(position, torch.Tensor):
        block = torch.arange(blocks, dtype=torch.int64, device=position.device)
    else:
        block = np.arange(blocks, dtype=np.int64)
    zero = position * 0 + block * 0  # (..., blocks): broadcasts every word of the counter
    counter = (zero + block, zero + (position & _MASK), zero + (position >> 32), zero + epoch)
    words = philox4x32(counter, (seed, int(purpose) << 16 | view))
    stack = torch.stack if isinstance(position, torch.Tensor) else np.stack
    bits = stack(words, -1)  # (..., blocks, 4)
    return bits.reshape(*bits.shape[:-2], blocks * 4)[..., :n]


def uniform(
    seed: int, epoch: int | IntArray, position: IntArray, purpose: Purpose, n: int, view: int = 0
) -> IntArray:
    """`n` float64 numbers in [0, 1) for each position, (..., n); exact multiples of 2**-32."""
    bits = random_bits(seed, epoch, position, purpose, n, view)
    if isinstance(bits, torch.Tensor):
        return bits.to(torch.float64) * 2.0**-32
    return bits.astype(np.float64) * 2.0**-32
