"""What a run can be asked for beside its result: profile, histograms, monitor, checkpointing. None changes it."""

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from running import Server, final_state, first_gradients, losses, make_shards, metrics, write_config
from selfsup.metrics import MetricsLog

STEPS = 8


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("options"))
    yield bench
    bench.server.close()


class Bench:
    def __init__(self, folder):
        self.folder, self.server = folder, Server()
        self.config = write_config(folder, make_shards(folder / "shards"))

    def run(self, name, *options, ranks=1, resume=None, mutant=None):
        """The run folder; a name is run once."""
        run, log = self.folder / name, self.folder / f"{name}.log"
        if resume is not None:
            self.server.run(["--resume", resume, *options], log, ranks)
        elif not run.exists():
            arguments = [self.config, "--run.dir", run, "--optim.steps", STEPS, "--encoder.drop-path", 0.2]
            self.server.run([*arguments, *options], log, ranks, mutant=mutant)
        return run

    def said(self, name):
        return (self.folder / f"{name}.log").read_text()


def step_labels(trace):
    found = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in found]
    assert any(name.startswith("aten::") for name in names)
    assert any(
        name.startswith("autograd::engine::evaluate_function") for name in names
    )  # the backward pass too
    begun = [event for event in found if event.get("ph") == "X" and event["name"].startswith("ProfilerStep#")]
    assert all(event["dur"] > 0 for event in begun)
    return sorted({event["name"] for event in begun})


def test_a_profile_of_some_steps_changes_nothing(bench):
    plain, run = bench.run("plain"), bench.run("profiled", "--run.profile", "3:6")
    assert losses(run) == losses(plain) and final_state(run) == final_state(plain)
    folder = run / "profile"
    assert sorted(p.name for p in folder.iterdir()) == ["top-3-6.txt", "trace-3-6.json.gz"]
    assert step_labels(folder / "trace-3-6.json.gz") == ["ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"]
    table = (folder / "top-3-6.txt").read_text()
    assert "Self CPU" in table and "aten::" in table
    assert "profiled steps 3:6" in bench.said("profiled")
    assert not (plain / "profile").exists()


def test_a_profile_up_to_the_last_step_on_two_processes(bench):
    run = bench.run("profiled-two", "--run.profile", "7:8", ranks=2)
    assert step_labels(run / "profile" / "trace-7-8.json.gz") == ["ProfilerStep#7"]
    assert bench.said("profiled-two").count("profiled steps") == 1


def test_a_resumed_run_profiles_what_is_left(bench):
    run = bench.run("profiled-resumed", "--run.profile", "1:5")
    kept = run / "checkpoints" / "step-00000006"
    bench.run("profiled-resumed", "--run.profile", "5:7", resume=kept)
    assert sorted(p.name for p in (run / "profile").iterdir()) == [
        "top-1-5.txt",
        "top-6-7.txt",
        "trace-1-5.json.gz",
        "trace-6-7.json.gz",
    ]
    bench.run("profiled-resumed", resume=run)  # the range of the checkpoint's own recipe is long done
    assert "run.profile: steps 5:7 are done, this run goes on from 8: no profile" in bench.said(
        "profiled-resumed"
    )


def events(run):
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0})
    found.Reload()
    return found


def test_histograms_are_of_the_gradients_and_weights(bench):
    plain = bench.run("plain")
    options = ["--run.histogram-every", 1, "--run.checkpoint-every", 1, "--run.keep-checkpoints", STEPS]
    run = bench.run("histograms", *options)
    assert losses(run) == losses(plain)
    gradients, found = first_gradients(run), events(run)
    weights = load_file(run / "checkpoints" / "step-00000001" / "objective.safetensors")
    assert set(found.Tags()["histograms"]) == {
        f"{kind}/{k}" for k in gradients for kind in ("weights", "gradients")
    }
    for kind, tensors in (("gradients", gradients), ("weights", weights)):
        for name in gradients:
            first, *rest = found.Histograms(f"{kind}/{name}")
            value, exact = first.histogram_value, tensors[name].double()
            assert first.step == 1 and [event.step for event in rest] == list(range(2, STEPS + 1))
            assert value.num == exact.numel()
            assert value.sum_squares == pytest.approx(exact.square().sum().item(), rel=1e-4), name
            assert value.min == pytest.approx(exact.min().item(), rel=1e-4, abs=1e-9)
            assert value.max == pytest.approx(exact.max().item(), rel=1e-4, abs=1e-9)
    assert not events(plain).Tags()["histograms"]


def test_a_gradient_that_is_not_finite_has_no_histogram(tmp_path, capsys):
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad, layer.bias.grad = torch.full((2, 2), torch.inf), torch.ones(2)
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    log = MetricsLog(tmp_path, 0, 30)
    log.histograms(10, torch.nn.ModuleDict({"a": layer, "b": frozen}))
    log.close()
    assert "step 10: 1 of 4 tensors are not finite: no histogram" in capsys.readouterr().out
    assert set(events(tmp_path).Tags()["histograms"]) == {
        "weights/a.weight",
        "weights/a.bias",
        "gradients/a.bias",
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_monitor_measures_at_its_steps_and_changes_nothing(bench, ranks):
    plain = bench.run(f"plain-{ranks}", "--run.log-every", 4, ranks=ranks)
    run = bench.run(f"monitored-{ranks}", "--run.log-every", 4, "--run.monitor-every", 3, ranks=ranks)
    lines = {line["step"]: line for line in metrics(run)}
    assert list(lines) == [3, 4, 6, 8]  # a step that is measured is logged
    assert [step for step, line in lines.items() if "rankme" in line] == [3, 6]
    assert all(lines[3][name] > 0 for name in ("feature_std", "knn", "monitor_share"))
    assert [found for found in losses(run) if found[0] in (4, 8)] == losses(plain)
    assert final_state(run) == final_state(plain)
    assert "monitor    83 training images" in bench.said(f"monitored-{ranks}")


def kept_bytes(output):
    """The dry run's two figures in MiB: state, and what is kept for the backward pass."""
    line = next(line for line in output.splitlines() if line.startswith("memory"))
    words = line.split()
    return int(words[1]), int(words[words.index("+") + 1])


def dry_run(bench, name, *options):
    log = bench.folder / f"{name}.log"
    sizes = ["--encoder.embed-dim", 256, "--encoder.depth", 6, "--run.micro-batch", 16]
    bench.server.run([bench.config, "--run.dir", bench.folder / name, *sizes, "--dry-run", *options], log)
    return kept_bytes(log.read_text())


def test_dry_run_counts_averaged_weights(bench):
    state, kept = dry_run(bench, "dry")
    with_average, same = dry_run(bench, "dry-ema", "--optim.ema", 0.9)
    assert same == kept and with_average / state == pytest.approx(5 / 4, abs=0.02)


def test_dry_run_counts_what_checkpointing_leaves(bench):
    state, kept = dry_run(bench, "dry")
    same, less = dry_run(bench, "dry-checkpointing", "--run.activation-checkpointing")
    assert same == state and less <= kept / 2


@pytest.mark.parametrize("ranks,micro_batch,precision", [(1, 16, "fp32"), (2, 4, "fp32"), (1, 8, "bf16")])
def test_activation_checkpointing_changes_nothing(bench, ranks, micro_batch, precision):
    """Drop path is on, so the random numbers of the second forward pass are put to the test too."""
    options = ["--run.micro-batch", micro_batch, "--precision.mixed", precision]
    name = f"{ranks}-{micro_batch}-{precision}"
    plain = bench.run(f"kept-{name}", *options, ranks=ranks)
    run = bench.run(f"again-{name}", "--run.activation-checkpointing", "true", *options, ranks=ranks)
    assert losses(run) == losses(plain) and final_state(run) == final_state(plain)


@pytest.mark.slow
def test_activation_checkpointing_under_compile(bench):
    """Without drop path: compiled, the two programs draw other random numbers."""
    options = ["--run.compile", "true", "--encoder.depth", 2, "--optim.steps", 3, "--encoder.drop-path", 0]
    plain = bench.run("compiled", *options)
    run = bench.run("compiled-again", "--run.activation-checkpointing", "true", *options)
    for (step, loss, norm), (_, other, other_norm) in zip(losses(run), losses(plain), strict=True):
        assert (other, other_norm) == pytest.approx((loss, norm), rel=1e-4), step
