"""The order law, against its definition and against chance."""

from itertools import islice

import numpy as np
import pytest
from scipy import stats

from selfsup.data import order
from selfsup.data.order import CHUNK, WINDOW, BatchPlan, micro_batches, sample_order

LAYOUTS = ["shuffled", "chunked", "sequential"]


def epoch_order(seed: int, epoch: int, n: int, layout: str) -> np.ndarray:
    return sample_order(seed, epoch, np.arange(n), n, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 1000, 64 * 64 + 5])
def test_every_epoch_has_every_sample_once(layout, n):
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**32 - 1, 2**32 - 1)]:
        assert sorted(epoch_order(seed, epoch, n, layout)) == list(range(n))


def test_the_order_is_pinned():
    """These change only together with ORDER_VERSION: a checkpoint's cursor means nothing otherwise."""
    assert order.ORDER_VERSION == 1
    assert epoch_order(0, 0, 10, "shuffled").tolist() == SHUFFLED
    assert epoch_order(7, 3, 5000, "shuffled")[:6].tolist() == SHUFFLED_5000
    assert epoch_order(7, 3, 5000, "chunked")[:6].tolist() == CHUNKED_5000


def test_against_a_slow_loop():
    """The definition once more, one sample at a time in Python's integers."""

    def draw(seed, epoch, position, view, radix):
        high, low = order.random_bits(seed, epoch, np.array(position), order.Purpose.ORDER, 2, view).tolist()
        return (high << 32 | low) % radix

    def permute(seed, epoch, x, n):
        a = next(a for a in range(1, n + 1) if a * a >= n)
        b = next(b for b in range(1, n + 1) if a * b >= n)
        while True:
            left, right = x // b, x % b
            for step in range(0, 8, 2):
                left = (left + draw(seed, epoch, right, step, a)) % a
                right = (right + draw(seed, epoch, left, step + 1, b)) % b
            x = left * b + right
            if x < n:
                return x

    for n in (1, 2, 3, 30, 47):
        assert epoch_order(5, 2, n, "shuffled").tolist() == [permute(5, 2, x, n) for x in range(n)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_subset_of_positions_and_epochs_at_once(layout):
    n = 300
    rng = np.random.default_rng(0)
    epochs, positions = rng.integers(0, 4, 100), rng.integers(0, n, 100)
    whole = [epoch_order(9, epoch, n, layout) for epoch in range(4)]
    expected = [whole[e][p] for e, p in zip(epochs, positions)]
    assert sample_order(9, epochs, positions, n, layout).tolist() == expected


@pytest.mark.parametrize("layout", ["shuffled", "chunked"])
def test_seed_and_epoch_change_the_order(layout):
    first = epoch_order(0, 0, 1000, layout)
    assert (epoch_order(0, 1, 1000, layout) != first).mean() > 0.9
    assert (epoch_order(1, 0, 1000, layout) != first).mean() > 0.9


def test_positions_outside_the_epoch_are_refused():
    with pytest.raises(ValueError, match="0 <= position < 5"):
        sample_order(0, 0, np.array([5]), 5, "shuffled")


def test_chunks_stay_together():
    n = 3 * WINDOW + 5
    rows = epoch_order(0, 0, n, "chunked")
    for start in range(0, n, WINDOW):
        window = rows[start : start + WINDOW]
        whole = np.unique(window // CHUNK)
        # At most 64 chunks, plus the few samples that walked out of the partial one.
        assert len(whole) <= WINDOW // CHUNK + 2
    mixed = rows[:CHUNK] // CHUNK
    assert len(np.unique(mixed)) > 30  # 64 samples come from many chunks
    assert np.ptp(rows[:WINDOW]) > 2 * WINDOW  # and a window's chunks from everywhere


def unevenness(n: int) -> float:
    """The least p-value of: every sample as often in every place, every pair as often in front."""
    trials = 2000
    epochs = np.repeat(np.arange(trials), n)
    rows = sample_order(3, epochs, np.tile(np.arange(n), trials), n, "shuffled").reshape(trials, n)
    places = [stats.chisquare(np.bincount(rows[:, p], minlength=n)).pvalue for p in range(n)]
    pairs = rows[:, 0] * n + rows[:, 1]
    seen = np.bincount(pairs, minlength=n * n)[[i * n + j for i in range(n) for j in range(n) if i != j]]
    return min(*places, stats.chisquare(seen).pvalue)


@pytest.mark.parametrize("n", [2, 3, 5, 7, 30])
def test_small_permutations_are_equally_likely(n):
    assert unevenness(n) > 1e-4


def test_too_few_rounds_are_caught(monkeypatch):
    monkeypatch.setattr(order, "_ROUNDS", 2)
    assert unevenness(7) < 1e-4


@pytest.mark.parametrize("layout", ["shuffled", "chunked"])
def test_large_permutations_look_random(layout):
    n, bins = 5000, 20
    counts = np.zeros((bins, bins))
    distance = []
    for epoch in range(12):
        rows = epoch_order(1, epoch, n, layout)
        np.add.at(counts, (np.arange(n) * bins // n, rows * bins // n), 1)
        distance.append(np.abs(np.diff(rows)))
    # Neighbours in time are as far apart as two random samples: a third of n on average.
    assert abs(np.concatenate(distance).mean() / (n / 3) - 1) < 0.05
    if layout == "shuffled":  # the chunks of the other are not independent
        assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def global_batches(world: int, micro: int, batches: int, size: int, start: int = 0) -> list[list[int]]:
    """Global batches put together again from all ranks' micro-batches, in the order of the law."""
    streams = [micro_batches(BatchPlan(size, micro, rank, world), start) for rank in range(world)]
    out = []
    for _ in range(batches):
        batch = []
        for _ in range(size // (micro * world)):
            batch += [cursor for stream in streams for cursor in next(stream).tolist()]
        out.append(batch)
    return out


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (1, 4), (2, 12), (2, 3), (4, 6), (4, 2), (3, 1)])
def test_ranks_and_micro_batches_only_slice_the_global_batch(world, micro):
    batches = global_batches(world, micro, 50, 24, start=48)
    assert batches == [list(range(48 + 24 * t, 72 + 24 * t)) for t in range(50)]


def test_a_resume_needs_only_the_cursor():
    plan = BatchPlan(12, 3, 1, 2)
    through = list(islice(micro_batches(plan, 0), 20))
    resumed = list(islice(micro_batches(plan, 5 * 12), 10))
    assert np.array_equal(through[10:], resumed)


def test_an_order_that_knows_its_rank_is_caught(monkeypatch):
    """The planted bug: the rank in the key. World 2 then disagrees with world 1."""

    def ids(world: int, with_rank: bool) -> set[int]:
        rows = []
        for rank in range(world):
            cursors = next(micro_batches(BatchPlan(8, 8 // world, rank, world), 0))
            rows += sample_order(rank if with_rank else 0, 0, cursors, 100, "shuffled").tolist()
        return set(rows)

    assert ids(1, False) == ids(2, False) == ids(4, False)
    assert ids(1, True) != ids(2, True)


@pytest.mark.parametrize(
    ("batch", "micro", "world", "fix"),
    [
        (256, 32, 3, "--optim.batch-size 288"),
        (10, 4, 1, "--run.micro-batch 2"),
        (1, 4, 2, "--optim.batch-size 8"),
        (32, 16, 4, "--run.micro-batch 8"),
    ],
)
def test_a_batch_that_does_not_divide(batch, micro, world, fix):
    with pytest.raises(ValueError) as error:
        BatchPlan(batch, micro, 0, world)
    message = str(error.value)
    assert "optim.batch_size" in message and "run.micro_batch" in message and "processes" in message
    assert message.endswith(fix)
    option, value = fix.split()
    batch, micro = (int(value), micro) if "batch-size" in option else (batch, int(value))
    assert BatchPlan(batch, micro, 0, world).accumulation >= 1  # the advice is good


def test_a_batch_of_nothing():
    with pytest.raises(ValueError, match=">= 1"):
        BatchPlan(0, 4, 0, 1)


SHUFFLED = [4, 5, 2, 1, 6, 8, 3, 9, 7, 0]
SHUFFLED_5000 = [3104, 1559, 3261, 781, 3438, 4786]
CHUNKED_5000 = [2656, 1072, 2831, 3572, 4211, 1426]
