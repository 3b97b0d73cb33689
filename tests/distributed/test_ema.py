"""The averaged weights of a run: the closed form over its checkpoints, once a step, the same on every rank."""

import pytest
from safetensors.torch import load_file

from running import Server, make_shards, metrics, write_config
from selfsup.optim import AdamWConfig

STEPS, DECAY = 5, 0.8
LAYOUTS = [(1, 1), (1, 2), (2, 2)]  # (processes, accumulation)
SCHEDULE = AdamWConfig(
    steps=STEPS, batch_size=16, base_lr=1e-2, schedule="wsd", warmup_fraction=0.4, decay_fraction=0.4
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages")
    config, server = write_config(folder, make_shards(folder / "shards")), Server()

    def run(ranks, accumulation, mutant=None):
        run = folder / f"{ranks}-{accumulation}-{mutant}"
        if run.exists():
            return run
        arguments = [config, "--run.dir", run, "--optim.steps", STEPS, "--optim.ema", DECAY]
        arguments += ["--optim.schedule", "wsd", "--run.micro-batch", 16 // ranks // accumulation]
        arguments += ["--optim.warmup-fraction", 0.4, "--optim.decay-fraction", 0.4]
        arguments += ["--run.checkpoint-every", 1, "--run.keep-checkpoints", STEPS]
        server.run(arguments, folder / "log", ranks, mutant=mutant, averages=f"{run}.averages")
        return run

    yield run
    server.close()


def saved(run, step, name):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def error(run):
    """Largest distance of a saved average from the closed form in float64, over the distance the weights moved."""
    history, worst = [saved(run, step, "objective") for step in range(1, STEPS + 1)], 0.0
    for n in range(1, STEPS + 1):
        average = saved(run, n, "ema")
        assert average.keys() == history[0].keys()
        for name, value in average.items():
            shares = [(1 - DECAY) * DECAY ** (n - i) / (1 - DECAY**n) for i in range(1, n + 1)]
            exact = sum(s * past[name].double() for s, past in zip(shares, history[:n], strict=True))
            moved = (history[-1][name] - history[0][name]).abs().max().item() or 1.0
            worst = max(worst, (value.double() - exact).abs().max().item() / moved)
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("ranks,accumulation", LAYOUTS)
def test_closed_form_on_every_rank(bench, ranks, accumulation):
    run = bench(ranks, accumulation)
    assert error(run) < 1e-4
    seen = [run.with_name(f"{run.name}.averages.{rank}").read_text().split() for rank in range(ranks)]
    assert len(seen[0]) == STEPS and len(set(seen[0])) == STEPS
    assert all(other == seen[0] for other in seen)
    ours, one = saved(run, STEPS, "ema"), saved(bench(1, 1), STEPS, "ema")
    assert sum((ours[k] - one[k]).square().sum() for k in one) < 1e-8 * sum(
        one[k].square().sum() for k in one
    )
    assert [line["lr"] for line in metrics(run)] == [SCHEDULE.lr(step) for step in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["average_per_micro_batch", "average_before_the_step"])
def test_planted_bugs_are_caught(bench, mutant):
    assert error(bench(1, 2, mutant)) > 1e-2


@pytest.mark.slow
def test_a_schedule_that_is_off_by_one_is_caught(bench):
    rates = [line["lr"] for line in metrics(bench(1, 1, "schedule_off_by_one"))]
    assert rates != [SCHEDULE.lr(step) for step in range(STEPS)]
