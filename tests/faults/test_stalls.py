"""Runs that hang or crawl, that are told to stop at an awkward moment, or whose time is over."""

import json
import os
import signal

import pytest

from running import Server, final_state, kill, losses, make_shards, metrics, wait_for, write_config
from selfsup.pace import slowest
from selfsup.stop import INTERRUPTED
from selfsup.watchdog import STALLED


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("stalls"))
    yield bench
    bench.server.close()


class Bench:
    def __init__(self, folder):
        self.folder, self.server = folder, Server()
        self.config = write_config(folder, make_shards(folder / "shards"))

    def begin(self, name, ranks, *options, **instruments):
        arguments = [self.config, "--run.dir", self.folder / name, *options]
        return self.server.start(arguments, self.folder / f"{name}.log", ranks, **instruments)

    def said(self, name):
        return (self.folder / f"{name}.log").read_text()

    def outcome(self, name):
        return json.loads((self.folder / name / "outcome.json").read_text())


@pytest.mark.slow
def test_a_stuck_rank_ends_the_run_with_every_stack(bench):
    pids = bench.begin("stuck", 2, "--run.stall-minutes", 0.1, fault=["stuck", 1, 4])
    assert bench.server.wait(pids) == [STALLED, STALLED]
    said = bench.said("stuck")
    for rank, where in ((0, "steps"), (1, "never_comes_back")):  # what it waits in, and what it does
        stacks = said.split(f"[rank {rank}] no step for")[1].split("[rank")[0]
        assert "run.stall_minutes" in stacks and f" in {where}" in stacks and "Thread 0x" in stacks
    outcome = bench.outcome("stuck")
    assert (outcome["state"], outcome["step"]) == ("stalled", 4) and "no step for" in outcome["reason"]


@pytest.mark.slow
def test_a_stopped_rank_does_not_hold_the_others_for_ever(bench):
    """SIGSTOP, as a node that swaps or a paused container: it can print nothing, the others do."""
    pids = bench.begin("paused", 2, "--run.stall-minutes", 0.1, delay=0.05)
    wait_for(lambda: (bench.folder / "paused/metrics.jsonl").exists() and len(metrics(bench.folder / "paused")) >= 2)
    os.kill(pids[1], signal.SIGSTOP)
    assert bench.server.wait(pids[:1]) == [STALLED]
    kill(pids[1:])
    bench.server.wait(pids[1:])
    assert "[rank 0] no step for" in bench.said("paused") and "[rank 1]" not in bench.said("paused")
    # What was saved is whole, and goes on.
    log = bench.folder / "paused.log"
    bench.server.run(["--resume", bench.folder / "paused"], log, 2)
    assert bench.outcome("paused")["state"] == "finished"


@pytest.mark.slow
def test_a_slow_rank_is_named(bench):
    assert bench.server.wait(bench.begin("slow", 2, fault=["slow", 1, 0.15])) == [0, 0]
    said = bench.said("slow")
    assert said.count("process 1 on ") == 1 and "is slow" in said and "process 0 on" not in said
    last = metrics(bench.folder / "slow")[-1]
    assert last["slowest_rank"] == 1 and last["slowest_ratio"] > 2


def test_slow_is_twice_the_median_of_the_others():
    assert slowest([0.1, 0.1, 0.25, 0.1]) == (2, 0.1, True)
    assert slowest([0.1, 0.19]) == (1, 0.1, False)
    assert slowest([0.3, 0.1]) == (0, 0.1, True)
    assert slowest([0.3, 0.1, 0.3])[2] is False  # half of them are slow: none stands out
    assert slowest([0.001, 0.006])[2] is False  # milliseconds are noise


@pytest.mark.slow
@pytest.mark.parametrize("doing", ["opening", "measuring", "saving"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_at_an_awkward_moment_is_not_lost(bench, doing, ranks):
    """It saves at the next step boundary, and the resumed run is the one never stopped."""
    watch = ["--run.monitor-every", 2]
    whole, run = bench.folder / f"whole-{ranks}", f"{doing}-{ranks}"
    if not whole.exists():
        assert bench.server.wait(bench.begin(whole.name, ranks, *watch)) == [0] * ranks
    pids = bench.begin(run, ranks, *watch, fault=["signalled_while", doing, int(signal.SIGUSR2)])
    assert bench.server.wait(pids) == [INTERRUPTED] * ranks, bench.said(run)
    outcome = bench.outcome(run)
    assert outcome["state"] == "interrupted" and outcome["reason"] == "SIGUSR2"
    assert outcome["step"] == {"opening": 0, "measuring": 4, "saving": 6}[doing]
    assert "SIGUSR2: saving at the end of this step" in bench.said(run)
    bench.server.run(["--resume", bench.folder / run], bench.folder / "log", ranks)
    assert losses(bench.folder / run) == losses(whole)
    assert final_state(bench.folder / run) == final_state(whole)


@pytest.mark.slow
def test_a_request_forgotten_is_caught(bench):
    fault = ["signalled_while", "opening", int(signal.SIGTERM)]
    assert bench.server.wait(bench.begin("deaf", 1, fault=fault, mutant="deaf_to_signals")) == [0]


@pytest.mark.slow
def test_hours_that_are_over(bench):
    pids = bench.begin("over", 2, "--run.max-hours", 2 / 3600, "--optim.steps", 2000, delay=0.05)
    assert bench.server.wait(pids) == [INTERRUPTED] * 2
    outcome = bench.outcome("over")
    assert outcome["state"] == "interrupted" and outcome["reason"].startswith("run.max_hours 0.00055")
    assert [p.name for p in (bench.folder / "over/checkpoints").glob("step-*")][-1:] and outcome["step"] < 2000


@pytest.mark.slow
@pytest.mark.parametrize("behind", ["false", "true"])
@pytest.mark.parametrize(("fault", "said"), [("cannot_flush", "Disk quota exceeded"), ("broken_part", "not finite")])
def test_a_split_save_that_fails_on_one_rank_ends_all_at_once(bench, fault, said, behind):
    """Nobody waits for the one that failed; it says why, and the checkpoint before is whole."""
    run = f"{fault}-{behind}"
    options = ["--run.parallel", "fsdp2", "--run.background-checkpoints", behind, "--run.stall-minutes", 0.5]
    assert bench.server.wait(bench.begin(run, 2, *options, fault=[fault, 1])) == [2, 2], bench.said(run)
    assert said in bench.said(run) and "[rank 1] error:" in bench.said(run) and "Traceback" not in bench.said(run)
    outcome = bench.outcome(run)
    assert (outcome["state"], outcome["step"]) == ("failed", 3) and "process 1: " in outcome["reason"]
    assert said in outcome["reason"]
    assert [p.name for p in (bench.folder / run / "checkpoints").glob("step-*")] == ["step-00000003"]


@pytest.mark.slow
def test_given_weights_are_on_the_disk_before_the_run_is_described(bench):
    """Or a run killed in its first save would go on from the seed, without a word."""
    whole = bench.folder / "giver"
    assert bench.server.wait(bench.begin(whole.name, 1)) == [0]
    options = ["--init-from", whole, "--run.background-checkpoints", "true"]
    pids = bench.begin("given", 1, *options, fault=["slow_writes", 2.0])
    run = bench.folder / "given"
    wait_for(lambda: (run / "environment.json").exists())
    kill(pids)
    bench.server.wait(pids)
    assert list(run.glob("checkpoints/step-00000000"))


@pytest.mark.slow
def test_the_last_save_is_watched_too(bench):
    options = ["--run.background-checkpoints", "true", "--run.stall-minutes", 0.05, "--optim.steps", 3]
    assert bench.server.wait(bench.begin("last", 1, *options, fault=["slow_writes", 30.0])) == [STALLED]
    assert "no step for" in bench.said("last") and bench.outcome("last")["state"] == "stalled"
