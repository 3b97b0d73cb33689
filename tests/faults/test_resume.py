"""An interrupted run equals one never stopped, bit for bit: losses, weights, optimizer, samples, masks."""

import json
import random
import signal
import time

import pytest

from running import (
    Server,
    final_state,
    kill,
    losses,
    make_shards,
    metrics,
    read_trace,
    wait_for,
    write_config,
)
from selfsup.train import INTERRUPTED

SEEDS = range(20)
DELAY = 0.05  # seconds a step of a run that is to be killed: time to hit it in any state of the machine


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    bench = Bench(folder)
    yield bench
    bench.server.close()


class Bench:
    def __init__(self, folder):
        self.folder, self.server = folder, Server()
        self.config = write_config(folder, make_shards(folder / "shards"))
        self.references = {}

    def arguments(self, name, workers):
        # drop path needs torch's generator, so its state is put to the test too
        return [
            self.config,
            "--run.dir",
            self.folder / name,
            "--run.workers",
            workers,
            "--encoder.drop-path",
            0.2,
        ]

    def reference(self, ranks, mutant=None):
        """An uninterrupted run."""
        key = f"reference-{ranks}-{mutant}"
        if key not in self.references:
            trace = str(self.folder / f"{key}.trace")
            self.server.run(self.arguments(key, 0), self.folder / "log", ranks, trace=trace, mutant=mutant)
            self.references[key] = self.folder / key
        return self.references[key]

    def resume(self, name, ranks, **options):
        log = self.folder / "log"
        options.setdefault("trace", str(self.folder / f"{name}.resumed"))
        arguments = ["--resume", self.folder / name]
        self.server.run(arguments, log, ranks, **options)


def check_equal(bench, name, ranks, mutant=None):
    reference = bench.reference(ranks, mutant)
    run = bench.folder / name
    assert losses(run) == losses(reference)
    assert final_state(run) == final_state(reference)
    whole = [read_trace(f"{reference}.trace", kind, ranks, 1) for kind in ("batch", "noise")]
    tail = [read_trace(bench.folder / f"{name}.resumed", kind, ranks, 1) for kind in ("batch", "noise")]
    for full, rest in zip(whole, tail, strict=True):
        assert 0 < len(rest) <= 20 and full[-len(rest) :] == rest


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_kill_minus_nine_at_a_random_moment(bench, seed):
    """Workers 0, 1, 2; one process, every fourth time two; every third kill falls into a save."""
    ranks, workers, name = 2 if seed % 4 == 3 else 1, seed % 3, f"killed-{seed}"
    rng, run = random.Random(seed), bench.folder / name
    pids = bench.server.start(bench.arguments(name, workers), bench.folder / "log", ranks, delay=DELAY)
    if seed % 3 == 0:
        nth = rng.randrange(1, 6)
        wait_for(
            lambda: (
                list(run.glob(f"checkpoints/.tmp-{3 * nth:08d}"))
                or list(run.glob(f"checkpoints/step-{3 * nth:08d}"))
            ),
            pause=0,
        )
    else:
        wait_for(lambda: (run / "metrics.jsonl").exists())
        time.sleep(rng.random() * 15 * DELAY)
    kill(pids)
    bench.server.wait(pids)
    assert not (run / "outcome.json").exists(), "killed too late: it had finished"
    bench.resume(name, ranks)
    check_equal(bench, name, ranks)


SPLIT, BEHIND = ("--run.parallel", "fsdp2"), ("--run.background-checkpoints", "true")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "seed"),
    [(SPLIT, 0), (SPLIT, 1), (BEHIND, 0), (BEHIND, 1), (SPLIT + BEHIND, 1)],
    ids=["split-0", "split-1", "behind-0", "behind-1", "both-1"],
)
def test_kill_minus_nine_of_split_runs_and_of_those_that_save_behind(bench, options, seed):
    """On two processes; every other kill falls into a save."""
    name, rng = f"{'-'.join(options[1::2])}-{seed}", random.Random(seed)
    run, reference = bench.folder / name, bench.folder / f"{'-'.join(options[1::2])}-whole"
    if not reference.exists():
        bench.server.run([*bench.arguments(reference.name, 0), *options], bench.folder / "log", 2)
    pids = bench.server.start([*bench.arguments(name, 0), *options], bench.folder / "log", 2, delay=DELAY)
    nth = rng.randrange(2, 6)
    wait_for(lambda: list(run.glob(f"checkpoints/*-{3 * nth:08d}")), pause=0)
    time.sleep(0 if seed % 2 else rng.random() * 3 * DELAY)
    kill(pids)
    bench.server.wait(pids)
    assert not (run / "outcome.json").exists(), "killed too late: it had finished"
    bench.resume(name, 2)
    assert losses(run) == losses(reference) and final_state(run) == final_state(reference)
    assert not list(run.glob("checkpoints/.tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("weights", [False, True])
def test_killed_before_the_first_checkpoint(bench, weights):
    """It starts again from the seed, or from the weights it was given."""
    kind = "weights" if weights else "seed"
    extra = ["--run.checkpoint-every", 1000, *(["--init-from", bench.reference(1)] if weights else [])]
    whole, run = bench.folder / f"early-whole-{kind}", bench.folder / f"early-killed-{kind}"
    bench.server.run([*bench.arguments(whole.name, 0), *extra], bench.folder / "log")
    pids = bench.server.start([*bench.arguments(run.name, 0), *extra], bench.folder / "log", delay=DELAY)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3)
    kill(pids)
    bench.server.wait(pids)
    assert not (run / "outcome.json").exists(), "killed too late: it had finished"
    bench.resume(run.name, 1)
    assert losses(run) == losses(whole) and final_state(run) == final_state(whole)


@pytest.mark.slow
def test_killed_before_the_first_step_a_run_keeps_the_weights_it_was_given(bench):
    """Here while the monitor decodes its images, which takes seconds on photographs."""
    extra = ["--init-from", bench.reference(1), "--run.monitor-every", 10]
    whole, run = bench.folder / "given-whole", bench.folder / "given-killed"
    bench.server.run([*bench.arguments(whole.name, 0), *extra], bench.folder / "log")
    arguments = [*bench.arguments(run.name, 0), *extra]
    pids = bench.server.start(arguments, bench.folder / "log", mutant="killed_opening_the_monitor")
    assert bench.server.wait(pids) == [9] and not (run / "metrics.jsonl").read_text()
    bench.resume(run.name, 1)
    assert losses(run) == losses(whole) and final_state(run) == final_state(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number,ranks,workers",
    [(signal.SIGINT, 1, 2), (signal.SIGTERM, 1, 2), (signal.SIGINT, 2, 1), (signal.SIGTERM, 2, 1)]
    + [(signal.SIGUSR1, 2, 1), (signal.SIGUSR2, 2, 1)],
)
def test_a_signal_saves_at_the_end_of_the_step(bench, number, ranks, workers):
    name = f"stopped-{number}-{ranks}"
    run = bench.folder / name
    log = bench.folder / f"{name}.log"
    arguments = [*bench.arguments(name, workers), "--run.checkpoint-every", 1000]
    pids = bench.server.start(arguments, log, ranks, delay=DELAY)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 2)
    kill(
        pids[:1] if number == signal.SIGINT else pids, number
    )  # one rank's signal stops all of them together
    if number == signal.SIGTERM:
        kill(pids, number)  # as `timeout` does, which signals its child and then the child's group
    assert bench.server.wait(pids) == [INTERRUPTED] * ranks, log.read_text()
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["state"] == "interrupted" and 2 <= outcome["step"] < 20
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{outcome['step']:08d}"]
    assert f"{signal.Signals(number).name}: saving at the end of this step" in log.read_text()
    bench.resume(name, ranks)
    check_equal(bench, name, ranks)


@pytest.mark.slow
def test_a_second_signal_later_leaves_at_once(bench):
    run = bench.folder / "impatient"
    pids = bench.server.start(bench.arguments(run.name, 0), bench.folder / "log", delay=60)
    wait_for(lambda: (run / "metrics.jsonl").exists())
    time.sleep(0.5)
    kill(pids, signal.SIGTERM)
    time.sleep(1.2)
    kill(pids, signal.SIGTERM)
    assert bench.server.wait(pids) == [128 + signal.SIGTERM] and not (run / "outcome.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [None, "reordered_buckets"])
def test_four_processes(bench, mutant):
    """DDP reorders its buckets after the first backward pass unless told not to."""
    name = f"stopped-four-{mutant}"
    run = bench.folder / name
    pids = bench.server.start(bench.arguments(name, 0), bench.folder / "log", 4, mutant=mutant, delay=DELAY)
    wait_for(lambda: list(run.glob("checkpoints/step-00000006")))
    kill(pids)
    bench.server.wait(pids)
    bench.resume(name, 4, mutant=mutant)
    if mutant is None:
        check_equal(bench, name, 4)
    else:
        with pytest.raises(AssertionError):
            check_equal(bench, name, 4, mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [None, "forgotten_average"])
def test_averaged_weights_and_a_schedule_with_a_decay(bench, mutant):
    options = ["--optim.ema", 0.9, "--optim.schedule", "wsd", "--optim.decay-fraction", 0.5]
    whole, run = bench.folder / f"average-whole-{mutant}", bench.folder / f"average-killed-{mutant}"
    bench.server.run([*bench.arguments(whole.name, 0), *options], bench.folder / "log", mutant=mutant)
    pids = bench.server.start(
        [*bench.arguments(run.name, 0), *options], bench.folder / "log", mutant=mutant, delay=DELAY
    )
    wait_for(lambda: list(run.glob("checkpoints/step-00000006")))
    kill(pids)
    bench.server.wait(pids)
    assert not (run / "outcome.json").exists(), "killed too late: it had finished"
    bench.resume(run.name, 1, mutant=mutant)
    assert losses(run) == losses(whole) and final_state(run) == final_state(whole)
    assert [line["lr"] for line in metrics(run)] == [line["lr"] for line in metrics(whole)]
    averages = [(r / "checkpoints" / "step-00000020" / "ema.safetensors").read_bytes() for r in (run, whole)]
    assert (averages[0] == averages[1]) == (mutant is None)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_batches(bench):
    reference = bench.reference(1)
    name = "elastic"
    pids = bench.server.start(bench.arguments(name, 0), bench.folder / "log", 2, delay=DELAY)
    wait_for(lambda: list((bench.folder / name).glob("checkpoints/step-00000006")))
    kill(pids)
    bench.server.wait(pids)
    bench.resume(name, 4)
    whole = read_trace(f"{reference}.trace", "batch", 1, 1)
    rest = read_trace(bench.folder / f"{name}.resumed", "batch", 4, 1)
    assert 0 < len(rest) < 20 and whole[-len(rest) :] == rest


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant", ["counting_in_workers", "random_augmentation", "unseeded_model", "forgotten_optimizer"]
)
def test_planted_bugs_are_caught(bench, mutant):
    name = f"mutant-{mutant}"
    run = bench.folder / name
    pids = bench.server.start(bench.arguments(name, 0), bench.folder / "log", mutant=mutant, delay=DELAY)
    wait_for(lambda: list(run.glob("checkpoints/step-00000006")))
    kill(pids)
    bench.server.wait(pids)
    bench.resume(name, 1, mutant=mutant)
    with pytest.raises(AssertionError):
        check_equal(bench, name, 1, mutant)
