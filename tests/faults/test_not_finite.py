"""A loss or gradient that is not finite: all ranks skip the step, within a budget, and nothing of it stays."""

import json

import pytest
import torch

from joint import make_colour_shards, write_joint_config
from running import Server, final_state, losses, make_shards, write_config
from selfsup.checkpoint import read_tensors
from selfsup.watchdog import STALLED

BAD = 4  # the step (0, 1, ...) that goes wrong
LAST = ["--optim.steps", BAD + 1]  # and is the last one, after which there is a checkpoint always


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("not-finite"))
    yield bench
    bench.server.close()


class Bench:
    def __init__(self, folder):
        self.folder, self.server = folder, Server()
        self.mae = write_config(folder, make_shards(folder / "grey"))
        self.byol = write_joint_config(folder, make_colour_shards(folder / "colour"), "byol")

    def run(self, name, config, ranks, *options, code=0, **instruments):
        """(run folder, what it printed)"""
        run, log = self.folder / name, self.folder / f"{name}.log"
        log.unlink(missing_ok=True)
        new = [] if config is None else [config, "--run.dir", run, "--optim.steps", 9, "--run.checkpoint-every", 1,
                                         "--run.keep-checkpoints", 20, "--optim.ema", 0.9]  # fmt: skip
        arguments = [*(new or ["--resume", run]), *options]
        codes = self.server.wait(self.server.start(arguments, log, ranks, **instruments))
        assert codes == [code] * ranks, log.read_text()
        return run, log.read_text()


def tensors(run, step):
    where = run / "checkpoints" / f"step-{step:08d}"
    state = json.loads((where / "state.json").read_text())
    named = {part: read_tensors(where, part) for part in ("objective", "optimizer", "ema")}
    return {f"{part}/{k}": v for part, found in named.items() for k, v in found.items()}, state


def left_alone(run):
    """Whether the bad step, the run's last, changed no weight, moment, average, target or statistic; the one before
    did."""
    (first, _), (before, _), (at, _) = (tensors(run, step) for step in (BAD - 1, BAD, BAD + 1))
    moved = [k for k in before if not torch.equal(before[k], at[k])]
    return not moved and sum(not torch.equal(first[k], before[k]) for k in first) > 0.9 * len(first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "what", "rank", "options"),
    [
        ("mae", "loss", 1, []),
        ("mae", "gradient", 0, []),
        ("byol", "loss", 0, []),
        ("mae", "loss", 1, ["--run.parallel", "fsdp2"]),
    ],
)
def test_the_step_is_skipped_by_all(bench, config, what, rank, options):
    name = f"{config}-{what}-{len(options)}"
    fault = ["not_finite", what, rank, BAD, BAD]
    run, said = bench.run(name, getattr(bench, config), 2, *options, fault=fault)
    cut, _ = bench.run(f"{name}-cut", getattr(bench, config), 2, *options, *LAST, fault=fault)
    assert left_alone(cut)
    assert not (run / "checkpoints" / f"step-{BAD + 1:08d}").exists()  # nothing new to save
    _, state = tensors(run, 9)
    assert (state["skipped"], state["samples"], state["step"]) == (1, 9 * 16, 9)  # its samples are consumed
    assert [step for step, _, _ in losses(run)] == [1, 2, 3, 4, 6, 7, 8, 9]
    where = f"loss not finite on process {rank}" if what == "loss" else "gradient norm"
    assert f"step {BAD + 1}: {where}" in said and "skipped, 1 of run.skip_budget 10" in said
    assert said.count("skipped, 1 of") == 1 and "1 steps skipped" in said
    line = json.loads((run / "skipped.jsonl").read_text())
    assert line["step"] == BAD and [r["rank"] for r in line["ranks"]] == [0, 1]
    places = [row[1] for r in line["ranks"] for batch in r["samples"] for row in batch]
    assert places == [(BAD * 16 + i) % 83 for i in range(16)]
    assert bool(line["ranks"][0]["parameters"]) is (what == "gradient")
    assert json.loads((run / "outcome.json").read_text())["skipped"] == 1


@pytest.mark.slow
def test_beyond_the_budget_it_stops_before_the_step_and_can_be_replayed(bench):
    fault = ["not_finite", "loss", 0, BAD, 100]
    run, said = bench.run("spent", bench.mae, 2, "--run.skip-budget", 2, code=2, fault=fault)
    assert "run.skip_budget: 2 steps may be skipped" in said and said.count("error:") == 1 and "Traceback" not in said
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["state"] == "failed" and "run.skip_budget" in outcome["reason"]
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*"))[-1] == f"step-{BAD + 2:08d}"
    assert tensors(run, BAD + 2)[1]["skipped"] == 2 and not list(run.glob("checkpoints/step-*7"))
    # The same step again, at once; and past it with a larger budget.
    _, again = bench.run("spent", None, 2, code=2, fault=fault)
    assert f"step {BAD + 3}: loss not finite on process 0" in again and f"step {BAD + 2}:" not in again
    run, on = bench.run("spent", None, 2, "--run.skip-budget", 4, fault=["not_finite", "loss", 0, BAD, BAD + 3])
    assert "finished at step 9 of 9, 4 steps skipped" in on


@pytest.mark.slow
def test_a_run_resumed_behind_a_skipped_step_is_the_same(bench):
    fault = ["not_finite", "loss", 1, BAD, BAD]
    whole, _ = bench.run("whole", bench.mae, 2, fault=fault)
    run, _ = bench.run("cut", bench.mae, 2, fault=["signalled_while", "saving", 15], code=75)
    assert json.loads((run / "outcome.json").read_text())["step"] < BAD
    bench.run("cut", None, 2, fault=fault)
    assert losses(run) == losses(whole) and final_state(run) == final_state(whole)


@pytest.mark.slow
def test_statistics_that_stay_are_caught(bench):
    fault = ["not_finite", "loss", 1, BAD, BAD]
    run, _ = bench.run("statistics", bench.byol, 2, *LAST, fault=fault, mutant="statistics_kept")
    assert not left_alone(run)


@pytest.mark.slow
def test_a_verdict_of_ones_own_is_caught(bench):
    """The rank that skips waits for the others, which do not."""
    run, log = bench.folder / "alone", bench.folder / "alone.log"
    arguments = [bench.mae, "--run.dir", run, "--run.stall-minutes", 0.1]
    fault = ["not_finite", "loss", 1, BAD, BAD]
    codes = bench.server.wait(bench.server.start(arguments, log, 2, fault=fault, mutant="a_verdict_of_ones_own"))
    assert STALLED in codes and 0 not in codes, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_under_a_gradient_scaler(bench, what):
    """fp16: a NaN loss is skipped and the scaler goes on; an infinite gradient is the scaler's own affair as long as it
    has a scale to lower, and counts against the budget after that."""
    last = BAD if what == "loss" else 8
    fault = [["half_precision", 4.0], ["not_finite", what, 0, BAD, last]]
    run, said = bench.run(f"scaled-{what}", bench.mae, 1, fault=fault)
    skipped = json.loads((run / "outcome.json").read_text())["skipped"]
    assert skipped == (1 if what == "loss" else 3)  # 4, 2 are lowered; at 1 the last three of five steps count
    assert said.count("of run.skip_budget 10") == skipped


@pytest.mark.slow
def test_what_is_broken_is_named_although_gradients_are_clipped(bench):
    """Clipping by a norm that is not finite would break every gradient before anybody looks."""
    options = ["--optim.clip-grad-norm", 0.5]
    run, _ = bench.run("clipped", bench.mae, 1, *options, fault=["one_broken_gradient", BAD])
    named = json.loads((run / "skipped.jsonl").read_text())["ranks"][0]["parameters"]
    assert named == ["encoder.norm.weight"]
    assert [step for step, _, _ in losses(run)] == [1, 2, 3, 4, 6, 7, 8, 9]
