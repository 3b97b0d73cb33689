"""FSDP2 on two processes equals one process: gradients, losses, trained and exported weights, for every objective.

That parameters really are split is asserted for each: on a CPU Accelerate's own FSDP plugin is ignored in silence,
and a test of losses alone would pass under DDP.
"""

import functools
import json

import pytest
import torch

from joint import RESNET, VIT, make_colour_shards, write_joint_config
from running import Server, first_gradients, losses, make_shards, off, write_config
from selfsup.checkpoint import find_checkpoint, load_encoder, read_tensors
from selfsup.export.timm import export_timm
from text_runs import make_token_shards, write_text_config

LARS = ["--optim.name", "lars", "--optim.base-lr", 1.0, "--optim.weight-decay", 1e-3]
STEADY = ["--optim.eps", 1e-2]
"""Adam divides by the root of the mean square gradient: where that is rounding, as of a key's bias, so is its step."""
KINDS = {  # name: (how its config is made, options)
    "mae": ("mae", []),
    "averaged": ("mae", ["--optim.ema", 0.9, "--run.activation-checkpointing", "true"]),
    "simclr": ("simclr", []),
    "chunked": ("simclr", ["--objective.chunk", 3]),
    "byol": ("byol", []),
    "resnet": ("resnet", []),
    "mlm": ("mlm", ["--optim.clip-grad-norm", 0.5]),
    "pairs": ("pairs", []),
    "clm": ("clm", ["--run.micro-batch", 2]),
}
TEXT = {
    "mlm": ("{name: mlm}", "", "packing: pad"),
    "clm": ("{name: clm, tied: false}", "causal: true, positions: rope, norm: rms", "packing: bestfit"),
    "pairs": ("{name: mlm, next_sentence: true}", "token_types: 2, post_norm: true", "packing: pairs"),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("fsdp"))
    yield bench
    bench.server.close()


class Bench:
    def __init__(self, folder):
        self.folder, self.server = folder, Server()
        self.grey, self.colour = make_shards(folder / "grey"), make_colour_shards(folder / "colour")
        self.tokens = make_token_shards(folder / "tokens")
        self.trained = functools.cache(self.trained)
        self.run = functools.cache(self.run)

    def config(self, kind):
        if kind == "mae":
            return write_config(self.folder, self.grey)
        if kind in TEXT:
            return write_text_config(self.folder / f"{kind}.yaml", self.tokens, *TEXT[kind])
        encoder = RESNET if kind == "resnet" else VIT
        return write_joint_config(self.folder, self.colour, "byol" if kind == "resnet" else kind, encoder)

    def trained(self, kind):
        """Arguments that begin with weights in which nothing is at a special value."""
        made, options = KINDS[kind]
        start, arguments = self.folder / f"{kind}-weights", [self.config(made), *options]
        self.server.run([*arguments, "--run.dir", start, "--optim.steps", 3], self.folder / "log")
        return [*arguments, "--init-from", start]

    def run(self, kind, ranks, steps, *options, parallel="fsdp2", float64=True, mutant=None):
        name = "-".join(map(str, (kind, ranks, steps, *options, parallel, float64, mutant)))
        run = self.folder / name
        arguments = [*self.trained(kind), "--run.dir", run, "--run.parallel", parallel, *options]
        arguments += ["--optim.steps", steps, "--run.checkpoint-every", 1]
        kinds = str(self.folder / f"{name}.kinds")
        self.server.run(arguments, self.folder / "log", ranks, float64=float64, mutant=mutant, kinds=kinds)
        return run

    def kinds(self, run, rank):
        return json.loads((self.folder / f"{run.name}.kinds.{rank}").read_text())


def weights(run, part="objective"):
    return read_tensors(find_checkpoint(run)[0], part)


def is_split(bench, run, ranks=2):
    """Whether every parameter is a DTensor, and the ranks' parts make up the whole."""
    seen = [bench.kinds(run, rank) for rank in range(ranks)]
    names = seen[0][1].keys()
    whole = all(sum(found[name][1] for _, found in seen) == seen[0][1][name][2] for name in names)
    kinds = {found[name][0] for _, found in seen for name in names}
    return whole and kinds == {"DTensor"} and all("FSDP" in wrapper for wrapper, _ in seen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_process(bench, kind):
    one, two = (bench.run(kind, ranks, 1) for ranks in (1, 2))
    assert is_split(bench, two)
    # A target network that is not trained is split too, and not in the optimizer.
    assert any(k.startswith("target_") for k in bench.kinds(two, 0)[1]) is (kind in ("byol", "resnet"))
    ours, theirs = first_gradients(two), first_gradients(one)
    assert len(theirs) > 20 and not any(k.startswith("target_") for k in theirs)
    typical = sorted(g.norm().item() for g in theirs.values())[len(theirs) // 2]
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():  # a bias that a batch norm takes out has no gradient but rounding
        size = g.norm().item()
        assert (ours[name] - g).norm() < 1e-10 * (size if size > 1e-5 * typical else typical), name
    (_, loss, norm), (_, other, its_norm) = losses(two)[0], losses(one)[0]
    assert loss == pytest.approx(other, rel=1e-12) and norm == pytest.approx(its_norm, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("float64", "tolerance"), [(True, 1e-9), (False, 1e-4)])
def test_trained_weights_equal(bench, kind, float64, tolerance):
    """After three steps, targets and averages too; losses on the way."""
    one, two = (bench.run(kind, ranks, 3, *STEADY, float64=float64) for ranks in (1, 2))
    for part in ["objective", "ema"] if kind == "averaged" else ["objective"]:
        assert off(weights(two, part), weights(one, part)) < tolerance
    ours, theirs = ([loss for _, loss, _ in losses(run)] for run in (two, one))
    assert ours == pytest.approx(theirs, rel=tolerance) and len(set(ours)) == 3


@pytest.mark.slow
def test_lars_takes_norms_of_whole_tensors(bench):
    one, two = (bench.run("byol", ranks, 2, *LARS) for ranks in (1, 2))
    wrong = bench.run("byol", 2, 2, *LARS, mutant="norms_of_parts")
    assert is_split(bench, two) and off(weights(two), weights(one)) < 1e-9
    assert off(weights(wrong), weights(one)) > 1e-6


@pytest.mark.slow
def test_mups_rates_are_those_of_whole_weights(bench):
    """Four groups of parts, each at its own rate; at one rate for all the weights would be others."""
    mup = [*STEADY, "--optim.mup-base-width", 16]
    one, two = (bench.run("mlm", ranks, 3, *mup) for ranks in (1, 2))
    assert is_split(bench, two) and off(weights(two), weights(one)) < 1e-9
    assert off(weights(bench.run("mlm", 1, 3, *STEADY, float64=True)), weights(one)) > 1e-3


@pytest.mark.slow
def test_an_export_of_parts_is_whole(bench, tmp_path):
    """The probe's and the export's encoder, from a checkpoint whose weights lie in two files."""
    run = bench.run("mae", 2, 3, *STEADY, float64=False)
    checkpoint = find_checkpoint(run)[0]
    assert len(list((checkpoint / "tensors").glob("*.safetensors"))) == 2
    assert not list(checkpoint.glob("*.safetensors")), "nothing is written twice"
    export_timm(run, tmp_path / "timm")  # reloads itself in timm and compares outputs
    encoder = load_encoder(run)[0].state_dict()
    theirs = weights(bench.run("mae", 1, 3, *STEADY, float64=False))
    assert off(encoder, {k.removeprefix("encoder."): v for k, v in theirs.items() if k.startswith("encoder.")}) < 1e-4
    assert torch.equal(encoder["norm.weight"], weights(run)["encoder.norm.weight"])


@pytest.mark.slow
def test_watched(bench):
    """Monitor and pictures look at whole weights and change nothing."""
    watch = ["--run.monitor-every", 2, "--run.picture-every", 2]
    plain, seen = bench.run("byol", 2, 3), bench.run("byol", 2, 3, *watch)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(seen).values(), strict=True))
    measured = [json.loads(line) for line in (seen / "metrics.jsonl").read_text().splitlines()][1]
    assert measured["feature_std"] > 0 and "knn" in measured


@pytest.mark.slow
def test_compiled(bench):
    found = []
    for compiled in ("false", "true"):
        run = bench.folder / f"compiled-{compiled}"
        small = ["--encoder.depth", 1, "--optim.steps", 3, "--run.parallel", "fsdp2", "--run.compile", compiled]
        bench.server.run([bench.config("mae"), "--run.dir", run, *small], bench.folder / "log", 2)
        found.append([loss for _, loss, _ in losses(run)])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] != found[1]


@pytest.mark.slow
def test_planted_bugs_are_caught(bench):
    assert not is_split(bench, bench.run("mae", 2, 1, mutant="parts_ignored"))
    wrong = bench.run("mae", 2, 1, mutant="parts_summed")
    assert off(first_gradients(wrong), first_gradients(bench.run("mae", 2, 1))) > 0.5


@pytest.mark.slow
def test_what_does_not_go_with_parts_is_refused(bench, tmp_path):
    arguments = [bench.config("mae"), "--run.dir", tmp_path / "run", "--run.parallel", "fsdp2"]
    for key, value in (("--precision.mixed", "fp16"), ("--run.histogram-every", 5)):
        log = tmp_path / "log"
        assert bench.server.wait(bench.server.start([*arguments, key, value], log)) == [2]
        assert f"{key[2:].replace('-', '_')}: " in log.read_text() and "run.parallel ddp only" in log.read_text()
