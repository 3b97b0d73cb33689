"""On W processes with accumulation A the gradient is that of one process on the global batch.

Through `train()` and Accelerate's wrapper, every parameter, 4 blocks deep. The gradients are read
out of Adam's first moment after one step.
"""

import pytest

from running import Server, first_gradients, make_shards, write_config

LAYOUTS = [(1, 4), (2, 1), (2, 2), (4, 1), (4, 2)]  # (processes, accumulation)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A server, a config, and weights in which nothing is at a special value."""
    folder = tmp_path_factory.mktemp("gradients")
    config, server = write_config(folder, make_shards(folder / "shards")), Server()
    server.run([config, "--run.dir", folder / "weights", "--optim.steps", 3], folder / "log")

    def gradients(name, ranks, accumulation, *overrides, **options):
        run = folder / f"{name}-{ranks}-{accumulation}"
        micro = 16 // ranks // accumulation
        arguments = [
            config,
            "--init-from",
            folder / "weights",
            "--run.dir",
            run,
            "--optim.steps",
            1,
            "--run.micro-batch",
            micro,
        ]
        server.run([*arguments, *overrides], folder / "log", ranks, **options)
        found = first_gradients(run)
        assert len(found) > 50 and all(g.norm() > 0 for g in found.values())
        return found

    yield gradients
    server.close()


def relative(ours: dict, theirs: dict) -> float:
    """The largest error of a tensor over that tensor's norm."""
    assert ours.keys() == theirs.keys()
    return max(((ours[k] - theirs[k]).norm() / theirs[k].norm()).item() for k in theirs)


@pytest.mark.slow
def test_float64(bench):
    whole = bench("float64", 1, 1, float64=True)
    for ranks, accumulation in LAYOUTS:
        assert relative(bench("float64", ranks, accumulation, float64=True), whole) < 1e-10, (
            ranks,
            accumulation,
        )


@pytest.mark.slow
def test_float32(bench):
    whole = bench("float32", 1, 1)
    for ranks, accumulation in LAYOUTS:
        assert relative(bench("float32", ranks, accumulation), whole) < 1e-5, (ranks, accumulation)


@pytest.mark.slow
def test_bf16_is_no_worse_than_one_process(bench):
    exact = bench("exact", 1, 1, float64=True)
    baseline = relative(bench("bf16", 1, 1, "--precision.mixed", "bf16"), exact)
    assert 1e-4 < baseline < 0.2  # bf16 really was on
    for ranks, accumulation in LAYOUTS:
        error = relative(bench("bf16", ranks, accumulation, "--precision.mixed", "bf16"), exact)
        assert error <= 2 * baseline, (ranks, accumulation, error, baseline)


@pytest.mark.slow
def test_clipping_takes_the_norm_of_the_whole_gradient(bench):
    whole = bench("whole", 1, 1, float64=True)
    norm = sum(g.square().sum() for g in whole.values()).sqrt()
    for ranks, accumulation in ((1, 1), (2, 2)):
        clip = ("--optim.clip-grad-norm", float(norm) / 4)
        clipped = bench("clipped", ranks, accumulation, *clip, float64=True)
        assert (
            relative(clipped, {name: g / 4 for name, g in whole.items()}) < 1e-5
        )  # torch adds 1e-6 to the norm


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant,ranks,accumulation",
    [("rank_in_the_key", 2, 1), ("mean_of_means", 2, 2), ("no_world_factor", 2, 1)],
)
def test_planted_bugs_are_caught(bench, mutant, ranks, accumulation):
    whole = bench(f"right-{mutant}", 1, 1, float64=True)
    wrong = bench(mutant, ranks, accumulation, float64=True, mutant=mutant)
    assert relative(wrong, whole) > 1e-3
