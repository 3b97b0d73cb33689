"""BYOL's target through whole runs: the closed form over a run's checkpoints, once a step, and after a kill."""

import math

import pytest
from safetensors.torch import load_file

from joint import RESNET, VIT, make_colour_shards, write_joint_config
from running import Server, final_state, kill, losses, wait_for

STEPS, MOMENTUM = 6, 0.7


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A server, and a function that gives the arguments of a run."""
    folder = tmp_path_factory.mktemp("target")
    shards, server = make_colour_shards(folder / "shards"), Server()

    def arguments(name, objective="byol", encoder=VIT, **options):
        config = write_joint_config(folder, shards, objective, encoder)
        pairs = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
        return [config, "--run.dir", folder / name, *pairs], folder / name, folder / "log"

    yield server, arguments
    server.close()


def error(bench, ranks: int, accumulation: int, mutant: str | None = None) -> float:
    """Of the target after the last step against its closed form, over its norm: the worst tensor."""
    server, arguments = bench
    every = {"optim.steps": STEPS, "run.checkpoint_every": 1, "run.keep_checkpoints": 10, "objective.momentum": MOMENTUM}
    start, weights, log = arguments(f"start-{ranks}-{accumulation}-{mutant}", **{**every, "optim.steps": 1})
    server.run(start, log)
    micro = {"init_from": weights, "run.micro_batch": 16 // ranks // accumulation}
    options, run, log = arguments(f"run-{ranks}-{accumulation}-{mutant}", **every, **micro)
    server.run(options, log, ranks, mutant=mutant)
    saved = [load_file(run / f"checkpoints/step-{i:08d}/objective.safetensors") for i in range(STEPS + 1)]
    keep = [1 - (1 - MOMENTUM) * (math.cos(math.pi * k / STEPS) + 1) / 2 for k in range(STEPS)]
    worst = 0.0
    averaged = [k for k in saved[0] if k.startswith("target_") and not k.split(".")[-1].startswith(("running", "num_"))]
    assert len(averaged) > 50
    for name in averaged:
        online = [weights[name.removeprefix("target_")] for weights in saved]
        expected = math.prod(keep) * saved[0][name]
        for i in range(STEPS):
            expected = expected + (1 - keep[i]) * math.prod(keep[i + 1 :]) * online[i + 1]
        worst = max(worst, ((saved[-1][name] - expected).norm() / expected.norm()).item())
    return worst


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_the_target_is_the_closed_form(bench, ranks, accumulation):
    assert error(bench, ranks, accumulation) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["target_per_micro_batch", "target_before_the_step", "target_momentum_at_the_end"])
def test_planted_bugs_are_caught(bench, mutant):
    assert error(bench, 1, 2, mutant) > 1e-4


def watched(bench, name: str, ranks: int, every: int, mutant: str | None = None) -> tuple[dict, list]:
    """What is left of a run with batch norms, measured and drawn every so many steps."""
    server, arguments = bench
    options = {"optim.steps": 4, "run.monitor_every": every, "run.picture_every": every}
    command, run, log = arguments(f"watched-{name}-{ranks}-{every}", encoder=RESNET, **options)
    server.run(command, log, ranks, mutant=mutant)
    return final_state(run), losses(run)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_watching_changes_nothing(bench, ranks):
    """Batch norms that look at other processes: the first alone measures, so in eval mode, or it would wait."""
    assert watched(bench, "off", ranks, 0) == watched(bench, "on", ranks, 2)


@pytest.mark.slow
def test_measuring_in_training_mode_is_caught(bench):
    assert watched(bench, "right", 1, 2) != watched(bench, "wrong", 1, 2, "monitor_in_training_mode")


def killed_and_resumed(bench, name: str, ranks: int, mutant: str | None = None, **options):
    """(a run never stopped, the same killed with -9 and resumed)."""
    server, arguments = bench
    whole, reference, log = arguments(f"{name}-whole", **options)
    server.run(whole, log, ranks)
    broken, run, log = arguments(f"{name}-killed", **options)
    pids = server.start(broken, log, ranks, delay=0.1)
    wait_for(lambda: (run / "checkpoints" / "step-00000006").exists())
    kill(pids)
    server.wait(pids)
    assert not (run / "outcome.json").exists(), "killed too late"
    server.run(["--resume", run], log, ranks, mutant=mutant)
    return reference, run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "encoder", "optim", "ranks"),
    [("byol", RESNET, "lars", 1), ("byol", VIT, "adamw", 2), ("simclr", VIT, "lars", 2)],
)
def test_a_killed_run_equals_one_never_stopped(bench, objective, encoder, optim, ranks):
    """Bit for bit: losses, weights and running statistics of both networks, momentum, optimizer."""
    name = f"{objective}-{optim}"
    options = {"objective": objective, "encoder": encoder, "optim.name": optim, "optim.steps": 12, "run.workers": 1}
    reference, run = killed_and_resumed(bench, name, ranks, **options)
    assert losses(run) == losses(reference)
    assert final_state(run) == final_state(reference)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["forgotten_target", "momentum_from_the_resume"])
def test_a_wrong_resume_is_caught(bench, mutant):
    reference, run = killed_and_resumed(bench, mutant, 1, mutant, **{"optim.steps": 12})
    assert final_state(run) != final_state(reference)
