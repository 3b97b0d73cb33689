"""`selfsup train` as a user meets it: faults are one clear line, exit code 2, nothing left behind."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from running import Server, final_state, kill, losses, make_shards, metrics, wait_for, write_config
from selfsup.data.images import TrainImages
from selfsup.data.index import open_shards
from selfsup.look.pictures import grid
from selfsup.recipe import load_recipe
from selfsup.train import INTERRUPTED


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("train"))
    yield bench
    bench.server.close()


class Bench:
    def __init__(self, folder: Path):
        self.folder, self.server = folder, Server()
        self.shards = make_shards(folder / "shards")
        self.config = write_config(folder, self.shards)
        self.count = 0

    def call(self, *arguments, ranks=1) -> tuple[list[int], str]:
        """Exit codes and output of one call."""
        self.count += 1
        log = self.folder / f"log-{self.count}"
        request = {
            "arguments": [str(a) for a in arguments],
            "ranks": ranks,
            "port": 0,
            "options": {},
            "log": str(log),
        }
        codes = self.server.wait(self.server.ask(**request))
        return codes, log.read_text()

    def fault(self, *arguments) -> str:
        """The one line of a refused call."""
        codes, output = self.call(*arguments)
        assert codes == [2] and "Traceback" not in output, output
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, output
        return errors[0]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--objective.mask-ratio", "1.6"], "objective.mask_ratio: expected 0 < x < 1, got 1.6"),
        (["--optim.stesp", "3"], "optim.stesp: unknown key; perhaps you meant optim.steps"),
        (["--optim.steps", "few"], "optim.steps: expected a whole number, got 'few'"),
        (["--optim.batch-size", "15", "--run.micro-batch", "4"], "optim.batch_size: expected a multiple of"),
        (["--precision.mixed", "fp16"], "precision.mixed: fp16 needs a CUDA device"),
        (["--run.device", "cuda"], "run.device: expected a CUDA device"),
        (["--run.expect-processes", "3"], "run.expect_processes: expected 3, got 1 processes"),
        (["--data.shards", "nowhere"], "no such folder: nowhere"),
        (["--data.shards", "pipe:cat /etc/passwd"], "expected a local folder"),
        (["--data.shards", "s3://bucket/x"], "expected a local folder"),
        (["--init-from", "nowhere"], "no whole checkpoint"),
        (["--resume", "nowhere"], "expected a CONFIG for a new run, or --resume DIR"),
        (["--run.profile", "20:10"], "run.profile: expected FIRST:LAST, two steps with FIRST < LAST, like 10:20"),
        (["--run.profile", "10:30"], "run.profile: expected steps up to optim.steps 20, got 10:30"),
        (["stray"], "expected an option like"),
    ],
)  # fmt: skip
def test_faults_before_anything_is_written(bench, arguments, words):
    run = bench.folder / "refused"
    extra = [] if arguments[0] in ("--resume",) else ["--run.dir", run]
    assert words in bench.fault(bench.config, *arguments, *extra)
    assert not run.exists()


def damaged(bench, name) -> Path:
    folder = bench.folder / name
    shutil.copytree(bench.shards, folder)
    return folder


def test_damaged_data_is_refused_before_training(bench):
    run = bench.folder / "refused"

    def fault(folder):
        line = bench.fault(bench.config, "--data.shards", folder, "--run.dir", run)
        assert not run.exists()
        return line

    missing = damaged(bench, "missing")
    (missing / "shard-000001.tar").unlink()
    assert "shard-000001.tar: shard missing" in fault(missing)
    truncated = damaged(bench, "truncated")
    with (truncated / "shard-000000.tar").open("r+b") as file:
        file.truncate(5000)
    assert "shard-000000.tar: truncated or altered" in fault(truncated)
    altered = damaged(bench, "altered")
    content = bytearray((altered / "shard-000002.tar").read_bytes())
    content[600] ^= 1
    (altered / "shard-000002.tar").write_bytes(content)
    later = time.time() + 10
    os.utime(altered / "shard-000002.tar", (later, later))
    assert "altered since indexed: shard-000002.tar" in fault(altered)
    empty = bench.folder / "empty"
    empty.mkdir()
    assert "no shards" in fault(empty)
    no_index = damaged(bench, "no-index")
    (no_index / "index.safetensors").unlink()
    assert "selfsup data index" in fault(no_index)


def test_a_sample_altered_behind_the_index_stops_the_run(bench):
    folder = damaged(bench, "flipped")
    path = folder / "shard-000000.tar"
    content, before = bytearray(path.read_bytes()), path.stat()
    content[content.index(b"\x89PNG") + 50] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as bit rot does it
    line = bench.fault(
        bench.config, "--data.shards", folder, "--run.dir", bench.folder / "rotten", "--run.workers", 1
    )
    assert "shard-000000.tar" in line and "altered or damaged" in line


def test_a_run_folder_is_claimed_by_one_run(bench):
    run = bench.folder / "twice"
    pids = bench.server.start([bench.config, "--run.dir", run, "--optim.steps", 100000], bench.folder / "log")
    wait_for(lambda: list(run.glob("checkpoints/step-*")))
    assert "in use by another run" in bench.fault(bench.config, "--run.dir", run)
    kill(pids)
    bench.server.wait(pids)
    assert "already holds a run; continue it with" in bench.fault(bench.config, "--run.dir", run)


def test_a_run_folder_that_cannot_be_written(bench):
    (bench.folder / "file").write_text("")
    assert "run.dir: cannot write" in bench.fault(bench.config, "--run.dir", bench.folder / "file" / "run")


def test_the_run_folder_tells_everything(bench):
    run = bench.folder / "whole"
    codes, output = bench.call(
        bench.config, "--run.dir", run, "--optim.steps", 4, "--run.picture-every", 2, "--run.log-every", 2
    )
    assert codes == [0] and "finished at step 4 of 4" in output
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "outcome.json",
        "tensorboard",
        "checkpoints",
    }
    lines = metrics(run)
    assert [line["step"] for line in lines] == [2, 4] and lines[1]["samples"] == 64
    assert lines[0].keys() == {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "epoch",
        "samples",
        "images_per_s",
        "data_wait",
    }
    assert json.loads((run / "outcome.json").read_text()) == {
        "state": "finished",
        "step": 4,
        "reason": "",
        "skipped": 0,
        "collapsed_at": None,
    }
    versions = json.loads((run / "environment.json").read_text())["versions"]
    assert versions.keys() >= {"torch", "selfsup", "accelerate"}
    events = tensorboard_tags(run / "tensorboard")
    assert {"loss", "lr", "grad_norm", "images_per_s", "data_wait"} <= set(events["scalars"])
    reconstruction, views = sorted(events["images"])
    assert "TRUE patch mean" in reconstruction and views == "training views"
    assert torch.equal(last_picture(run / "tensorboard", views), views_of_cursors(run, 48, 64))
    # and the resolved config alone repeats the run
    again = bench.folder / "again"
    codes, _ = bench.call(run / "config.yaml", "--run.dir", again)
    assert codes == [0] and losses(again) == losses(run)


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def tensorboard_tags(folder: Path) -> dict:
    return events_of(folder).Tags()


def last_picture(folder: Path, tag: str) -> torch.Tensor:
    """uint8 (3, h, w)."""
    png = events_of(folder).Images(tag)[-1].encoded_image_string
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB"))).permute(2, 0, 1)


def views_of_cursors(run: Path, start: int, stop: int) -> torch.Tensor:
    """What the loader yields for samples start .. stop - 1 of the run, drawn as the run draws it."""
    recipe = load_recipe(run / "config.yaml", [])
    dataset = TrainImages(recipe.data, open_shards(recipe.data.shards), recipe.seed, 16, 1)
    return (grid(dataset.batch(np.arange(start, stop)).images, 8) * 255).to(torch.uint8)


def test_init_from_starts_a_new_run_with_the_weights(bench):
    first, second = bench.folder / "first", bench.folder / "second"
    bench.call(bench.config, "--run.dir", first, "--optim.steps", 3)
    codes, output = bench.call(
        bench.config, "--init-from", first, "--run.dir", second, "--optim.steps", 1, "--optim.base-lr", 1e-12
    )
    assert codes == [0] and "initialised all weights from" in output
    assert "monitor    off: run.monitor_every 1000 is beyond the last step 1" in output
    old = load_file(first / "checkpoints" / "step-00000003" / "objective.safetensors")
    new = load_file(second / "checkpoints" / "step-00000001" / "objective.safetensors")
    assert all((old[k] - new[k]).abs().max() < 1e-6 for k in old)
    assert metrics(second)[0]["samples"] == 16


def test_resume_refuses_other_data_and_other_recipes(bench):
    run = bench.folder / "moved"
    bench.call(bench.config, "--run.dir", run, "--optim.steps", 6)
    assert "optim: a resumed run keeps its recipe" in bench.fault("--resume", run, "--optim.steps", 9)
    shutil.rmtree(bench.folder / "data2", ignore_errors=True)
    config = write_config(bench.folder / "first", make_shards(bench.folder / "data2", samples=50))
    stopped = bench.folder / "moved2"
    bench.call(config, "--run.dir", stopped, "--optim.steps", 6)
    shutil.rmtree(bench.folder / "data2")
    make_shards(bench.folder / "data2", samples=60)
    assert "data.shards: this run was started with another index_fingerprint" in bench.fault(
        "--resume", stopped
    )
    codes, output = bench.call("--resume", run)
    assert codes == [0] and "finished at step 6 of 6" in output


def test_resume_from_an_older_checkpoint(bench):
    """By its own path, from anywhere; the later one is set aside, and the end is the same."""
    run = bench.folder / "older"
    bench.call(bench.config, "--run.dir", run, "--optim.steps", 6)
    before = final_state(run)
    codes, output = bench.call("--resume", run / "checkpoints" / "step-00000003")
    assert codes == [0] and "step-00000006 is set aside" in output
    assert final_state(run) == before and [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    codes, output = bench.call("--resume", run, "--run.dir", bench.folder / "other")
    assert codes == [2] and "run.dir: a resumed run stays in its folder" in output


def test_dry_run_writes_nothing(bench):
    run = bench.folder / "dry"
    codes, output = bench.call(bench.config, "--run.dir", run, "--dry-run")
    assert codes == [0] and not run.exists()
    for words in ("mask_ratio: 0.75", "trainable parameters", "FLOPs", "memory", "went through: loss"):
        assert words in output


def test_help_lists_every_key(bench):
    for arguments in (["--help"], [bench.config, "--help"]):
        codes, output = bench.call(*arguments)
        assert codes == [0]
        for words in (
            "--objective.mask-ratio",
            "Share of patches removed",
            "--run.expect-processes",
            "--run.activation-checkpointing",
            "--run.histogram-every",
            "--run.monitor-every",
            "--run.profile",
            "profile the steps after step FIRST up to step",
            "--optim.schedule",
            "--optim.decay-fraction",
            "--optim.ema",
            "selfsup train --resume DIR",
        ):
            assert words in output


@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_a_lost_run_stops_loudly(bench, checkpoint_every):
    run = bench.folder / f"lost-{checkpoint_every}"
    rates = [
        "--optim.base-lr",
        1e30,
        "--optim.warmup-fraction",
        0,
        "--run.checkpoint-every",
        checkpoint_every,
    ]
    line = bench.fault(bench.config, "--run.dir", run, *rates)
    assert "run.skip_budget: 10 steps may be skipped" in line or "NOT saved" in line
    assert json.loads((run / "outcome.json").read_text())["state"] == "failed"
    for path in run.glob("checkpoints/step-*/objective.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())


def test_a_fault_on_one_process_ends_all_with_one_line(bench):
    folder, run = damaged(bench, "one-rank"), bench.folder / "one-rank-run"
    for path in folder.glob("shard-*.tar"):  # one byte each: no matter which rank meets it first
        content, before = bytearray(path.read_bytes()), path.stat()
        content[content.index(b"\x89PNG") + 50] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    log = bench.folder / "one-rank.log"
    arguments = [bench.config, "--data.shards", folder, "--run.dir", run, "--run.workers", 1]
    assert bench.server.wait(bench.server.start(arguments, log, 2)) == [2, 2], log.read_text()
    assert "Traceback" not in log.read_text() and "altered or damaged" in log.read_text()


def test_a_signal_before_the_first_step_leaves_a_run_to_go_on_with(bench):
    run = bench.folder / "early"
    wait = ["--run.checkpoint-every", 100000, "--optim.steps", 100000]
    pids = bench.server.start([bench.config, "--run.dir", run, *wait], bench.folder / "log-early")
    wait_for(lambda: (run / "environment.json").exists())
    kill(pids, signal.SIGTERM)
    assert bench.server.wait(pids)[0] in (
        INTERRUPTED,
        -signal.SIGTERM,
    )  # the latter: before our handler stood
    if (run / "outcome.json").exists():
        assert list(run.glob("checkpoints/step-*"))


def test_accelerates_own_accumulation_is_refused(bench, monkeypatch):
    """It would divide every gradient behind the loop's back."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    code = (
        f"from selfsup.train import main; raise SystemExit(main([{str(bench.config)!r}, '--run.dir', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=bench.folder)
    assert done.returncode == 2 and "gradient_accumulation_steps: expected 1" in done.stderr


def test_without_an_index(bench):
    run = bench.folder / "streamed"
    arguments = [
        bench.config,
        "--data.index",
        "none",
        "--run.dir",
        run,
        "--run.workers",
        2,
        "--optim.steps",
        12,
    ]
    codes, output = bench.call(*arguments)
    assert codes == [0] and "data.index: none" in output and "resume" in output
    assert metrics(run)[-1]["loss"] < metrics(run)[0]["loss"]
    assert "epoch" not in metrics(run)[0]


@pytest.mark.slow
@pytest.mark.parametrize("precision,ranks,tolerance", [("fp32", 1, 1e-4), ("bf16", 2, 2e-2)])
def test_compiled_equals_eager(bench, precision, ranks, tolerance):
    runs = []
    for compiled in ("false", "true"):
        run = bench.folder / f"compile-{compiled}-{precision}"
        arguments = [bench.config, "--run.dir", run, "--optim.steps", 5, "--run.compile", compiled]
        log = bench.folder / f"{run.name}.log"
        bench.server.run([*arguments, "--precision.mixed", precision], log, ranks)
        runs.append(losses(run))
    for (step, loss, _), (_, other, _) in zip(*runs, strict=True):
        assert other == pytest.approx(loss, rel=tolerance), step


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_loss_falls(bench, precision):
    run = bench.folder / f"falls-{precision}"
    codes, _ = bench.call(bench.config, "--run.dir", run, "--optim.steps", 60, "--precision.mixed", precision)
    assert codes == [0] and metrics(run)[-1]["loss"] < 0.9 * metrics(run)[0]["loss"]
