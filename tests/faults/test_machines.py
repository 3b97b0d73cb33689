"""A run goes on elsewhere: on another number of processes, split or not, with another accumulation.

The same samples and masks, losses within rounding; on the machine it came from bit for bit.
"""

import functools
import json
import shutil

import pytest

from ranks import on_ranks
from running import Server, final_state, losses, make_shards, read_trace, write_config
from selfsup import checkpoint, dist, start
from selfsup.checkpoint import TrainState
from text_runs import make_token_shards, write_text_config

STOP = 9  # the step that a run goes on from
ON = {  # name: (processes, options)
    "1": (1, []),
    "2": (2, []),
    "4": (4, []),
    "2, accumulated": (2, ["--run.micro-batch", 2]),
    "2, split": (2, ["--run.parallel", "fsdp2"]),
    "4, split": (4, ["--run.parallel", "fsdp2"]),
}
BACK = {"--run.parallel": "ddp", "--run.micro-batch": "none"}
"""What a resumed run must say where it no longer wants what the first one had."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("machines"))
    yield bench
    bench.server.close()


class Bench:
    def __init__(self, folder):
        self.folder, self.server = folder, Server()
        text = ("{name: mlm}", "", "packing: pad")
        self.configs = {
            "mae": write_config(folder, make_shards(folder / "shards")),
            "mlm": write_text_config(folder / "mlm.yaml", make_token_shards(folder / "tokens"), *text),
        }
        self.whole = functools.cache(self.whole)

    def whole(self, kind, where):
        """A run that nobody stopped, all its checkpoints kept."""
        ranks, options = ON[where]
        run = self.folder / f"{kind}-{where.replace(', ', '-')}"
        arguments = [self.configs[kind], "--run.dir", run, "--run.keep-checkpoints", 10, *options]
        self.server.run(arguments, self.folder / "log", ranks, trace=f"{run}.trace")
        return run

    def moved(self, kind, start, to):
        """The run of `start` as if it had been killed after step 9, gone on with on `to`."""
        source, (ranks, options) = self.whole(kind, start), ON[to]
        run = self.folder / f"{source.name}-to-{to.replace(', ', '-')}"
        shutil.copytree(source, run)
        for later in run.glob("checkpoints/step-*"):
            if int(later.name[5:]) > STOP:
                shutil.rmtree(later)
        given = {**BACK, **dict(zip(options[::2], options[1::2]))}
        flat = [part for pair in given.items() for part in pair]
        self.server.run(["--resume", run, *flat], self.folder / "log", ranks, trace=f"{run}.trace")
        return run


def seen(run, kind, where):
    ranks, options = ON[where]
    batch = 8 if run.name.startswith("mlm") else 16
    micro = options[options.index("--run.micro-batch") + 1] if "--run.micro-batch" in options else batch // ranks
    return read_trace(f"{run}.trace", kind, ranks, batch // ranks // micro)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "start", "to"),
    [
        ("mae", "2", "1"),
        ("mae", "2", "4"),
        ("mae", "2", "2, accumulated"),
        ("mae", "2", "2, split"),
        ("mae", "2, split", "1"),
        ("mae", "2, split", "4"),
        ("mae", "2, split", "4, split"),
        ("mlm", "2, split", "1"),
    ],
)
def test_goes_on_elsewhere(bench, kind, start, to):
    before, after = bench.whole(kind, start), bench.moved(kind, start, to)
    for what in ("batch", "noise") if kind == "mae" else ("batch",):
        full, rest = seen(before, what, start), seen(after, what, to)
        assert len(rest) == 20 - STOP and full[-len(rest) :] == rest
    ours, theirs = losses(after), losses(before)
    assert ours[:STOP] == theirs[:STOP] and [step for step, _, _ in ours] == list(range(1, 21))
    assert [loss for _, loss, _ in ours] == pytest.approx([loss for _, loss, _ in theirs], rel=1e-3)
    assert ours[STOP][1] == pytest.approx(theirs[STOP][1], rel=1e-5)  # the first step after: rounding alone
    parts = list((after / "checkpoints").glob("step-*/tensors"))
    assert json.loads((after / "outcome.json").read_text())["state"] == "finished"
    assert bool(parts) is ("split" in to or "split" in start)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["4", "2, split", "4, split"])
def test_on_the_same_machine_bit_for_bit(bench, where):
    before, after = bench.whole("mae", where), bench.moved("mae", where, where)
    assert losses(after) == losses(before) and final_state(after) == final_state(before)


def test_processes_that_see_different_checkpoints_are_refused(tmp_path, monkeypatch):
    """As on a network file system that shows one machine the newest checkpoint later than another."""

    def check(apart):
        monkeypatch.setattr(checkpoint, "restore", lambda source, state: state._replace(step=5 + apart * dist.rank()))
        try:
            return start.resume(tmp_path, TrainState(None, None, None, None, 0, 0, {})).step
        except ValueError as error:
            return str(error)

    assert on_ranks(2, functools.partial(check, 0), tmp_path) == [5, 5]
    for said in on_ranks(2, functools.partial(check, 1), tmp_path):
        assert "do not see the same checkpoint" in said
