"""keyed.py against Random123's published vectors, NumPy against torch, and uniformity."""

import numpy as np
import pytest
import torch
from scipy import stats

from selfsup.keyed import Purpose, philox4x32, random_bits, uniform

# Random123, tests/kat_vectors: "philox4x32 10", counter, key, result.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter,key,result", PUBLISHED)
def test_published_vectors(counter, key, result):
    as_numpy = tuple(np.array([w], dtype=np.int64) for w in words(counter))
    as_torch = tuple(torch.tensor([w]) for w in words(counter))
    assert [int(w[0]) for w in philox4x32(as_numpy, tuple(words(key)))] == words(result)
    assert [int(w[0]) for w in philox4x32(as_torch, tuple(words(key)))] == words(result)


def test_numpy_and_torch_agree_bit_for_bit():
    position = np.array([0, 1, 2**31, 2**32, 2**40 + 7], dtype=np.int64)
    epoch = np.arange(5)
    ours = random_bits(5, epoch, position, Purpose.CROP, 11, view=3)
    theirs = random_bits(5, torch.from_numpy(epoch), torch.from_numpy(position), Purpose.CROP, 11, view=3)
    assert ours.shape == (5, 11) and np.array_equal(ours, theirs.numpy())
    assert np.array_equal(
        uniform(5, 0, position, Purpose.CROP, 3),
        uniform(5, 0, torch.from_numpy(position), Purpose.CROP, 3).numpy(),
    )


def test_a_draw_depends_on_its_key_alone():
    position = np.arange(1000)
    whole = random_bits(1, 2, position, Purpose.MASK, 9)
    assert np.array_equal(whole[300:400], random_bits(1, 2, position[300:400], Purpose.MASK, 9))
    assert np.array_equal(whole[:, :4], random_bits(1, 2, position, Purpose.MASK, 4))


def test_every_part_of_the_key_matters():
    position = np.arange(64)
    draws = [
        random_bits(0, 0, position, Purpose.MASK, 4),
        random_bits(1, 0, position, Purpose.MASK, 4),
        random_bits(0, 1, position, Purpose.MASK, 4),
        random_bits(0, 0, position + 64, Purpose.MASK, 4),
        random_bits(0, 0, position + 2**32, Purpose.MASK, 4),
        random_bits(0, 0, position, Purpose.CROP, 4),
        random_bits(0, 0, position, Purpose.MASK, 4, view=1),
    ]
    assert len({draw.tobytes() for draw in draws}) == len(draws)
    for other in draws[1:]:
        assert np.mean(draws[0] == other) < 0.01


def test_uniformity():
    x = uniform(3, 1, np.arange(50_000), Purpose.CROP, 4)
    assert 0 <= x.min() and x.max() < 1
    assert stats.kstest(x.ravel(), "uniform").pvalue > 1e-3
    counts = np.unpackbits(
        random_bits(3, 1, np.arange(20_000), Purpose.CROP, 1).astype(np.uint32).view(np.uint8)
    )
    assert abs(counts.mean() - 0.5) < 4 * 0.5 / np.sqrt(counts.size)
    correlation = np.corrcoef(x.T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(x))


@pytest.mark.parametrize("seed,view", [(-1, 0), (2**32, 0), (0, -1), (0, 2**16)])
def test_out_of_range_keys_are_refused(seed, view):
    with pytest.raises(ValueError, match="expected 0 <="):
        random_bits(seed, 0, np.arange(2), Purpose.CROP, 1, view)


@pytest.mark.gpu
def test_cuda_draws_the_same_bits():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    position = torch.arange(1000)
    here = random_bits(9, 4, position, Purpose.MASK, 64)
    there = random_bits(9, 4, position.cuda(), Purpose.MASK, 64)
    assert torch.equal(here, there.cpu())
