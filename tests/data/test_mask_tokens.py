"""Masks as properties, checked by functions that planted bugs are fed to as well."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutants import exec_changed
from selfsup.data import mask_tokens as module
from selfsup.data.mask_tokens import Masking, mask_tokens

MASK, VOCAB = 4, 50
SPECIAL = 5  # ids below are special


def rows_of_text(seed: int, b: int, length: int):
    """[CLS] text [SEP] text [SEP] [PAD] ..., of any length down to nothing but special tokens."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(SPECIAL, VOCAB, (b, length))
    tokens[draw.random((b, length)) < 0.1] = 3
    tokens[:, 0] = 2
    real = np.arange(length) < draw.integers(1, length + 1, (b, 1))
    tokens[~real] = 0
    return tokens, real & (tokens >= SPECIAL), real


def masked(function, b=8, length=24, ratio=0.15, seed=0, epoch=0, first=0, text=0, words=None, **shares):
    tokens, maskable, real = rows_of_text(text, b, length)
    keys = np.full(b, epoch), np.arange(first, first + b)
    made = function(tokens, maskable, real, ratio, seed, *keys, MASK, VOCAB, **shares, word_starts=words)
    return tokens, maskable, real, made


def chosen_of(made, shape) -> np.ndarray:
    chosen = np.zeros(shape, dtype=bool)
    chosen.reshape(-1)[made.where] = True
    return chosen


# ---- the properties -------------------------------------------------------------------------------


def check_choice(function, text=0, length=24, ratio=0.15, seed=0, words=None) -> None:
    """Counts, never special tokens or padding, labels and places right, nothing else touched."""
    tokens, maskable, real, made = masked(function, 8, length, ratio, seed, text=text, words=words)
    assert (np.diff(made.where) > 0).all()
    chosen = chosen_of(made, tokens.shape)
    assert not (chosen & ~maskable).any(), "special tokens or padding chosen"
    assert np.array_equal(made.labels, tokens.reshape(-1)[made.where])
    assert np.array_equal(made.tokens[~chosen], tokens[~chosen])
    for row in range(len(tokens)):
        asked = int(np.floor(ratio * np.count_nonzero(real[row]) + 0.5))
        expected = min(np.count_nonzero(maskable[row]), max(1, asked))
        found = np.count_nonzero(chosen[row])
        assert found == expected if words is None else found <= expected


def check_shares(function, mask_share=0.8, random_share=0.1) -> None:
    """80/10/10 by itself for each target; random tokens uniform over the whole vocabulary."""
    hidden, random, n, instead = 0, 0, 0, []
    for first in range(0, 3000, 500):
        tokens, maskable, real, made = masked(
            function, 500, 32, 0.4, first=first, mask_share=mask_share, random_share=random_share
        )
        shown = made.tokens.reshape(-1)[made.where]
        other = shown != made.labels
        n += len(shown)
        hidden += np.count_nonzero(shown == MASK)
        random += np.count_nonzero(other & (shown != MASK))
        instead += shown[other & (shown != MASK)].tolist()
    # A random token is [MASK] once in VOCAB, and the right one once in VOCAB.
    for found, share in [
        (hidden, mask_share + random_share / VOCAB),
        (random, random_share * (VOCAB - 2) / VOCAB),
    ]:
        assert abs(found - n * share) < 5 * (n * share * (1 - share)) ** 0.5 + 1e-6, (found / n, share)
    if random_share:
        counts = np.bincount(instead, minlength=VOCAB)
        keep = np.arange(VOCAB) != MASK
        assert len(counts) == VOCAB and counts[keep].min() > 0, "part of the vocabulary is never drawn"
        expected = np.full(VOCAB, len(instead) / (VOCAB - 1), dtype=float)
        expected[SPECIAL:] *= 1 - 1 / (VOCAB - SPECIAL)  # where it is the right one it is not counted
        expected *= len(instead) / expected[keep].sum()
        chi = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
        assert chi < 48 + 5 * (2 * 48) ** 0.5, chi


def check_places(function) -> None:
    """Every maskable place is as likely as any other, the first and the last too."""
    b, length = 4000, 16
    tokens = np.full((b, length), 7)
    everywhere = np.ones((b, length), dtype=bool)
    keys = np.zeros(b, dtype=np.int64), np.arange(b)
    made = function(tokens, everywhere, everywhere, 0.25, 0, *keys, MASK, VOCAB)
    counts = chosen_of(made, tokens.shape).sum(0)
    assert counts.sum() == b * 4
    assert (abs(counts - 1000) < 5 * (1000 * 0.75) ** 0.5).all(), counts


def check_keys(function) -> None:
    """Another mask for another seed, epoch and position; the same for the same, however it is sliced."""
    where = [masked(function, **key)[3] for key in ({}, {"seed": 1}, {"epoch": 1}, {"first": 8})]
    again = masked(function)[3]
    assert all(np.array_equal(a, b) for a, b in zip(where[0], again))
    for other in where[1:]:
        assert not np.array_equal(where[0].where, other.where)
    # Not only the places: among rows of the same places, what becomes of them.
    everything = [masked(function, ratio=0.999, epoch=epoch)[3].tokens for epoch in (0, 1)]
    assert not np.array_equal(*everything)

    tokens, maskable, real = rows_of_text(3, 12, 24)
    epoch, position = np.arange(12) // 5, np.arange(12) * 7 % 12

    def run(rows: slice):
        ratio = np.linspace(0.1, 0.6, 12)[rows]
        made = function(
            tokens[rows], maskable[rows], real[rows], ratio, 5, epoch[rows], position[rows], MASK, VOCAB
        )
        return made.tokens, made.where, made.labels

    whole = run(slice(0, 12))
    for size in (1, 3, 4, 6):
        parts = [run(slice(i, i + size)) for i in range(0, 12, size)]
        assert np.array_equal(np.concatenate([p[0] for p in parts]), whole[0])
        assert np.array_equal(np.concatenate([p[1] + i * size * 24 for i, p in enumerate(parts)]), whole[1])
        assert np.array_equal(np.concatenate([p[2] for p in parts]), whole[2])


def check_words(function, text=0, ratio=0.3) -> None:
    """Words whole or not at all; as many as fit: no word left over would still fit in."""
    starts = np.random.default_rng(text + 99).random((8, 24)) < 0.5
    tokens, maskable, real, made = masked(function, ratio=ratio, text=text, words=starts)
    chosen = chosen_of(made, tokens.shape)
    for row in range(8):
        words: list[list[int]] = []
        for place in range(24):
            if not maskable[row, place]:
                continue
            if starts[row, place] or not words or words[-1][-1] != place - 1:
                words.append([])
            words[-1].append(place)
        count = min(int(maskable[row].sum()), max(1, int(np.floor(ratio * real[row].sum() + 0.5))))
        left = count - int(chosen[row].sum())
        assert left >= 0
        for word in words:
            assert len(set(chosen[row, word])) == 1, "part of a word"
            assert chosen[row, word[0]] or len(word) > left


CHECKS = [check_choice, check_shares, check_places, check_keys, check_words]


@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_choice(text, length, ratio, seed):
    check_choice(mask_tokens, text, length, ratio, seed)
    check_choice(
        mask_tokens, text, length, ratio, seed, np.random.default_rng(text).random((8, length)) < 0.6
    )


@pytest.mark.parametrize("shares", [(0.8, 0.1), (1.0, 0.0), (0.5, 0.5), (0.0, 0.0)])
def test_shares(shares):
    check_shares(mask_tokens, *shares)


def test_places():
    check_places(mask_tokens)


def test_keys():
    check_keys(mask_tokens)


@given(st.integers(0, 10**6), st.floats(0.05, 0.9))
def test_whole_words(text, ratio):
    check_words(mask_tokens, text, ratio)


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("_least(noise, maskable, count)", "_least(noise, real, count)", check_choice),
        ("ratio * real.sum(1)", "ratio * maskable.sum(1)", check_choice),
        ("np.maximum(1, count)", "np.maximum(1, count + 1)", check_choice),
        ("np.maximum(1, count)", "count", check_choice),
        ("ratio * real.sum(1) + 0.5", "ratio * real.sum(1)", check_choice),
        ("[where]\n", "[where] * 0\n", check_choice),
        ("* vocab_size >> 32", "* tokens.max() >> 32", check_shares),  # ModernBERT's packer
        ("* vocab_size >> 32", "* (vocab_size - 5) // 2**32 + 5", check_shares),
        ("mask_share + random_share", "1.0", check_shares),
        ("how < mask_share,", "how < 0.75,", check_shares),
        ("Purpose.MASK, most, _INSTEAD", "Purpose.MASK, most, _HOW", check_shares),  # small numbers only
        ("random_bits(seed, epoch, position", "random_bits(seed, epoch * 0, position", check_keys),
        ("random_bits(seed, epoch, position", "random_bits(seed, epoch, position * 0", check_keys),
        ("random_bits(seed, epoch, position", "random_bits(0, epoch, position", check_keys),
        ("position, Purpose", "np.arange(b), Purpose", check_keys),  # the place in the micro-batch
        ("bits * length + np.arange(length)", "bits * 0 + np.arange(length)", check_places),
        ("_words(noise, maskable, count, word_starts)", "_least(noise, maskable, count)", check_words),
    ],
)  # fmt: skip
def test_planted_bugs_are_caught(old, new, check):
    mutant = exec_changed(module, "mask_tokens", old, new)
    with pytest.raises(AssertionError):
        for text in range(5):
            check(mutant, text) if check in (check_choice, check_words) else check(mutant)


def test_a_passed_over_word_does_not_end_the_search(monkeypatch):
    changed = exec_changed(module, "_words", "if not left:", "else:")
    monkeypatch.setattr(module, "_words", changed)
    with pytest.raises(AssertionError):
        for text in range(20):
            check_words(module.mask_tokens, text)


def test_nothing_maskable_has_no_target():
    tokens = np.array([[2, 3, 0], [2, 9, 3]])
    real = tokens > 0
    made = mask_tokens(tokens, tokens > 4, real, 0.15, 0, np.zeros(2, int), np.arange(2), MASK, VOCAB)
    assert made.where.tolist() == [4] and made.labels.tolist() == [9]


def test_halves_are_rounded_up():
    tokens = np.full((1, 30), 9)
    everywhere = tokens > 0
    made = mask_tokens(
        tokens, everywhere, everywhere, 0.15, 0, np.zeros(1, int), np.zeros(1, int), MASK, VOCAB
    )
    assert len(made.labels) == 5  # 4.5


def test_the_masks_are_pinned():
    """A resumed run draws them again."""
    tokens = np.arange(48).reshape(2, 24) % 40 + SPECIAL
    everywhere = tokens > 0
    made = mask_tokens(
        tokens, everywhere, everywhere, 0.2, 1, np.array([0, 3]), np.array([5, 6]), MASK, VOCAB
    )
    assert made.where.tolist() == WHERE
    assert made.tokens.reshape(-1)[made.where].tolist() == SHOWN


def test_the_rate_follows_a_straight_line():
    masking = Masking(0.3, 0.15, 100, False)
    assert [masking.at(step) for step in (0, 50, 100, 1000)] == pytest.approx([0.3, 0.225, 0.15, 0.15])
    assert Masking(0.15, 0.15, 0, False).at(7) == 0.15


def test_a_batch_takes_little_time():
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 30000, (32, 128))
    everywhere = np.ones_like(tokens, dtype=bool)
    arguments = (tokens, everywhere, everywhere, 0.15, 0, np.zeros(32, int), np.arange(32), MASK, 30000)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        mask_tokens(*arguments)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.002  # 0.5 ms


WHERE = [8, 13, 15, 17, 18, 25, 28, 33, 36, 43]
SHOWN = [4, 4, 4, 4, 4, 4, 4, 4, 34, 4]
