"""The first 50 global batches (samples, crops, masks) and the losses on 1, 2 and 4 processes, any workers."""

import pytest

from running import Server, losses, make_shards, metrics, read_trace, write_config
from selfsup.optim import AdamWConfig

STEPS = 50
LAYOUTS = [
    (1, 1, 0),
    (1, 4, 2),
    (2, 1, 1),
    (2, 2, 0),
    (4, 1, 0),
    (4, 2, 1),
]  # processes, accumulation, workers


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    config, server = write_config(folder, make_shards(folder / "shards")), Server()

    def run(ranks, accumulation, workers, *overrides, mutant=None):
        name = f"{ranks}-{accumulation}-{workers}-{mutant}"
        arguments = [
            config,
            "--run.dir",
            folder / name,
            "--optim.steps",
            STEPS,
            "--run.checkpoint-every",
            STEPS,
        ]
        arguments += ["--run.micro-batch", 16 // ranks // accumulation, "--run.workers", workers, *overrides]
        server.run(arguments, folder / "log", ranks, trace=str(folder / f"{name}.trace"), mutant=mutant)
        return folder / name

    yield run
    server.close()


def seen(run, ranks, accumulation):
    """What the model was given, batch by batch: (epoch, position, row, pixels), and the mask noise."""
    batches = read_trace(run.with_name(run.name + ".trace"), "batch", ranks, accumulation)
    noise = read_trace(run.with_name(run.name + ".trace"), "noise", ranks, accumulation)
    return batches[:STEPS], noise[:STEPS]


@pytest.fixture(scope="module")
def whole(bench):
    run = bench(1, 1, 0)
    return run, *seen(run, 1, 1)


@pytest.mark.slow
def test_one_process_sees_every_sample_once_an_epoch(whole):
    _, batches, _ = whole
    rows = [(epoch, row) for batch in batches for epoch, _, row, _ in batch]
    assert [len(batch) for batch in batches] == [16] * STEPS
    for epoch in range(STEPS * 16 // 83):
        assert sorted(row for e, row in rows if e == epoch) == list(range(83))
    assert len({tuple(row for e, row in rows if e == epoch) for epoch in range(9)}) == 9  # shuffled anew


@pytest.mark.slow
@pytest.mark.parametrize("ranks,accumulation,workers", LAYOUTS[1:])
def test_same_samples_crops_masks_and_losses(bench, whole, ranks, accumulation, workers):
    run, batches, noise = whole
    other = bench(ranks, accumulation, workers)
    assert seen(other, ranks, accumulation) == (batches, noise)
    for (step, loss, norm), (_, other_loss, other_norm) in zip(losses(run), losses(other), strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-4), step
        assert other_norm == pytest.approx(norm, rel=1e-2), step
    assert [line["lr"] for line in metrics(other)] == [line["lr"] for line in metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["rank_in_the_key", "prepared_loader", "random_augmentation"])
def test_planted_bugs_are_caught(bench, whole, mutant):
    _, batches, noise = whole
    other = bench(2, 1, 0, mutant=mutant)
    assert seen(other, 2, 1) != (batches, noise)


@pytest.mark.slow
def test_a_schedule_stepped_per_process_is_caught(bench):
    config = AdamWConfig(steps=STEPS, batch_size=16, base_lr=1e-2)
    expected = [config.lr(step) for step in range(STEPS)]
    assert [line["lr"] for line in metrics(bench(2, 1, 0))] == expected
    assert [line["lr"] for line in metrics(bench(2, 1, 0, mutant="schedule_per_process"))] != expected
