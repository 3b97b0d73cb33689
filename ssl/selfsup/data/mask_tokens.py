"""Which tokens are to be guessed, and what stands in their place (Devlin et al. 2019, BERT, sec. 3.1).

Every draw is keyed by (seed, epoch, position): masks are new in each epoch, and the same for any number of
workers and processes, after a resume too.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from selfsup.keyed import Purpose, random_bits

# Views of Purpose.MASK: which tokens, what becomes of each, which token instead.
_WHICH, _HOW, _INSTEAD = 0, 1, 2


class Masking(NamedTuple):
    """How tokens are masked, from the first step to the last."""

    ratio: float
    """Share of a row's tokens to predict, at step 0."""
    last_ratio: float
    """The same at step `steps`."""
    steps: int
    whole_word: bool
    """All tokens of a word, or none."""
    mask_share: float = 0.8
    """Of the chosen tokens, those replaced by [MASK]."""
    random_share: float = 0.1
    """Of the chosen tokens, those replaced by a random one; the rest stay as they are."""

    def at(self, step: int) -> float:
        """The share at a step: a straight line from `ratio` to `last_ratio`, which it reaches at `steps`."""
        return self.ratio + (self.last_ratio - self.ratio) * min(1.0, step / max(1, self.steps))


class Masked(NamedTuple):
    """Rows with masks, and what they hide."""

    tokens: Int64[np.ndarray, "b l"]
    where: Int64[np.ndarray, "t"]
    """Places in `tokens.reshape(-1)`, ascending."""
    labels: Int64[np.ndarray, "t"]
    """What stood there."""


def mask_tokens(
    tokens: Int64[np.ndarray, "b l"],
    maskable: Bool[np.ndarray, "b l"],
    real: Bool[np.ndarray, "b l"],
    ratio: float | Float[np.ndarray, "b"],
    seed: int,
    epoch: Int64[np.ndarray, "b"],
    position: Int64[np.ndarray, "b"],
    mask_id: int,
    vocab_size: int,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    word_starts: Bool[np.ndarray, "b l"] | None = None,
) -> Masked:
    """Chooses tokens of each row at random and hides them.

    maskable: False for special tokens and padding, which are never chosen; real: False for padding. As in
    google-research/bert, create_pretraining_data.py, a row has as many targets as the ratio asks of all its real
    tokens, [CLS] and [SEP] among them, rounded (halves up), at least one, at most what is maskable; a row with
    nothing maskable has none. Of the targets `mask_share` become `mask_id`, `random_share` a token drawn from
    the whole vocabulary, special ones and the right one among them; each by itself.

    word_starts: where words begin; then words are chosen whole, in random order, and one that would go beyond the
    number of targets is passed over, so that a row can have fewer, or none where each word alone is too long.
    """
    b, length = tokens.shape
    count = np.floor(ratio * real.sum(1) + 0.5).astype(np.int64)
    count = np.minimum(maskable.sum(1), np.maximum(1, count))
    bits = random_bits(seed, epoch, position, Purpose.MASK, length, _WHICH)
    noise = bits * length + np.arange(length)  # no two alike, so that a count is met exactly
    chosen = (
        _least(noise, maskable, count) if word_starts is None else _words(noise, maskable, count, word_starts)
    )

    where = np.flatnonzero(chosen)
    per_row = chosen.sum(1)
    row = np.repeat(np.arange(b), per_row)
    nth = np.arange(len(where)) - np.repeat(np.cumsum(per_row) - per_row, per_row)  # target of its row
    most = max(1, int(per_row.max(initial=0)))
    how = random_bits(seed, epoch, position, Purpose.MASK, most, _HOW)[row, nth] * 2.0**-32
    instead = random_bits(seed, epoch, position, Purpose.MASK, most, _INSTEAD)[row, nth] * vocab_size >> 32
    labels = tokens.reshape(-1)[where]
    shown = np.where(how < mask_share + random_share, instead, labels)
    shown = np.where(how < mask_share, mask_id, shown)
    masked = tokens.copy()
    masked.reshape(-1)[where] = shown
    return Masked(masked, where, labels)


def _least(noise: np.ndarray, maskable: np.ndarray, count: np.ndarray) -> np.ndarray:
    """In each row the `count` maskable places with the least noise."""
    noise = np.where(maskable, noise, np.iinfo(np.int64).max)
    border = np.take_along_axis(np.sort(noise, axis=1), np.maximum(count - 1, 0)[:, None], axis=1)
    return (noise <= border) & maskable & (count > 0)[:, None]


def _words(noise: np.ndarray, maskable: np.ndarray, count: np.ndarray, word_starts: np.ndarray) -> np.ndarray:
    """In each row whole words, those with the least noise at their first token first, at most `count` tokens."""
    before = np.zeros_like(maskable)
    before[:, 1:] = maskable[:, :-1]
    chosen = np.zeros_like(maskable)
    # What follows a special token, or opens a row, begins a word whatever it is.
    firsts = maskable & (word_starts | ~before)
    for row in range(len(noise)):
        first = np.flatnonzero(firsts[row])
        last = np.flatnonzero(maskable[row] & ~np.append(maskable[row, 1:] & ~firsts[row, 1:], False))
        order = np.argsort(noise[row, first])
        left = int(count[row])
        for start, stop in zip(first[order].tolist(), (last[order] + 1).tolist()):
            if stop - start <= left:
                chosen[row, start:stop] = True
                left -= stop - start
            if not left:
                break
    return chosen
