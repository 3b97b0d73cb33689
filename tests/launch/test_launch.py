"""`selfsup launch`: what it refuses, what it prints, that what it prints is what runs, and the exit codes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from running import ROOT, Server, final_state, losses, make_shards, metrics, wait_for, write_config
from selfsup import carry_on, launch
from selfsup.recipe import load_recipe


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    return folder, write_config(folder, make_shards(folder / "shards"))


@pytest.fixture(scope="module")
def reference(bench):
    folder, config = bench
    server = Server()
    server.run([config, "--run.dir", folder / "reference"], folder / "log", ranks=2)
    server.close()
    return folder / "reference"


def call(*arguments) -> int:
    return launch.main([str(a) for a in arguments])


def start(*arguments, log: Path, **env) -> subprocess.Popen:
    command = [sys.executable, "-m", "selfsup.cli", "launch", *map(str, arguments)]
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def pretend(run: Path, config: Path, state: str | None = None) -> None:
    """A folder as a run leaves it, as far as the launcher looks."""
    (run / "checkpoints" / "step-00000006").mkdir(parents=True)
    recipe = load_recipe(config, ["--run.dir", str(run)])
    (run / "config.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    if state is not None:
        (run / "outcome.json").write_text(json.dumps({"state": state}))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--optim.stepz", 5], "optim.stepz: unknown key; perhaps you meant optim.steps"),
        (["--processes", 3], "optim.batch_size: expected a multiple of run.micro_batch x processes = 5 x 3 = 15, got 16"),
        (["--processes", 2, "--run.micro-batch", 5], "optim.batch_size: expected a multiple"),
        (["--processes", 0], "--processes, --nodes: expected values >= 1, got 0 and 1"),
        (["--nodes", 2], "--nodes: this machine is one"),
        (["--run.expect-processes", 3], "run.expect_processes: expected 1 = --processes x --nodes, got 3"),
        (["--resume"], "--resume: .* holds no run to go on with"),
    ],
)
def test_it_refuses_before_anything_starts(bench, capsys, options, fault):
    folder, config = bench
    with pytest.raises(ValueError, match=fault.replace("+", r"\+")):
        call(config, "--run.dir", folder / "none", *options)
    assert capsys.readouterr().out == "" and not (folder / "none").exists()


def test_a_folder_that_holds_a_run(bench, tmp_path, capsys):
    """Refused without --resume; with it another recipe's is refused, a finished one left alone."""
    _, config = bench
    run = tmp_path / "run"
    pretend(run, config)
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        call(config, "--run.dir", run, "--dry-run")
    with pytest.raises(ValueError, match="optim.steps: .* holds a run with 20, got 30"):
        call(config, "--run.dir", run, "--resume", "--dry-run", "--optim.steps", 30)
    assert call(config, "--run.dir", run, "--resume", "--dry-run", "--run.workers", 1) == 0
    assert "-m selfsup.carry_on" in capsys.readouterr().out
    (run / "outcome.json").write_text('{"state": "finished"}')
    assert call(config, "--run.dir", run, "--carry-on") == 0
    assert "finished before" in capsys.readouterr().out


def test_the_plain_command(bench, tmp_path, capsys, monkeypatch):
    """What is printed can be pasted into a shell, blanks and all."""
    _, config = bench
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    run = f"{tmp_path}/a b$(x)"
    assert call(config, "--processes", 4, "--dry-run", "--run.dir", run, "--run.device", "cpu") == 0
    threads, command = capsys.readouterr().out.splitlines()
    words = shlex.split(command)
    assert threads.startswith("threads    2 for each of 4 processes, 9 cores")
    assert words[:2] == ["OMP_NUM_THREADS=2", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300"]
    assert words[2:5] == [sys.executable, "-m", "torch.distributed.run"] and "SIGUSR2" in words[words.index("-m", 5) - 1]
    assert words[words.index("-m", 5) :] == ["-m", "selfsup.train", str(config), "--run.dir", run, "--run.device", "cpu",
                                             "--run.expect-processes", "4"]  # fmt: skip


def test_one_process(bench, tmp_path, capsys, monkeypatch):
    """No torchrun, no launcher: this process becomes the command that is printed."""
    _, config = bench

    def execv(path: str, arguments: list[str]) -> None:
        raise SystemExit(shlex.join([path, *arguments]))

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit) as became:
        call(config, "--run.dir", tmp_path / "a b")
    command = ["-m", "selfsup.train", str(config), "--run.dir", str(tmp_path / "a b"), "--run.expect-processes", "1"]
    assert shlex.split(capsys.readouterr().out) == [sys.executable, *command]
    assert shlex.split(became.value.code) == [sys.executable, sys.executable, *command]


def test_the_slurm_command(bench, tmp_path, capsys, monkeypatch):
    _, config = bench
    monkeypatch.setenv("PYTHON", "py")
    options = ["--where", "slurm", "--processes", 4, "--nodes", 2, "--run.dir", tmp_path / "r", "--run.device", "cuda"]
    assert call(config, *options, "--dry-run") == 0
    script, run = str(ROOT / "launch" / "slurm.sbatch"), str(tmp_path / "r")
    expected = ["PYTHON=py", "sbatch", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", script]
    words = shlex.split(capsys.readouterr().out)
    assert words == [*expected, str(config), "--run.dir", run, "--run.device", "cuda"]
    for name in ("sbatch", "none"):  # a stand-in that queues nothing, then none at all
        (tmp_path / name).mkdir()
    (tmp_path / "sbatch" / "sbatch").write_text(f'#!/bin/bash\nprintf "%s\\n" "$PYTHON" "$@" > {tmp_path}/got\nexit 3\n')
    (tmp_path / "sbatch" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'sbatch'}:{os.environ['PATH']}")
    assert call(config, *options) == 3
    assert (tmp_path / "got").read_text().splitlines() == ["py", *words[2:]]
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="sbatch: not found"):
        call(config, *options)
    monkeypatch.setattr(launch, "SCRIPT", tmp_path / "none" / "slurm.sbatch")
    with pytest.raises(ValueError, match="--where slurm: .* is not there"):
        call(config, *options)


def test_what_carry_on_decides(bench, tmp_path, capsys):
    """A new run, the same again, as a seed of an array; only what may change is handed on."""
    _, config = bench
    run = tmp_path / "run"
    new = ["--run.dir", str(run), "--optim.steps", "20", "--run.workers", "1", "--optim.betas", "0.9", "0.95"]
    assert carry_on.command_for(config, new, Path("w")) == [str(config), *new, "--init-from", "w"]
    seeded = carry_on.command_for(config, new, seed=3)
    assert load_recipe(Path(seeded[0]), seeded[1:]).seed == 3 and seeded[-1] == str(run / "seed-3")
    pretend(run, config, "interrupted")
    same = ["--run.dir", str(run), "--run.workers", "1", "--optim.steps", "20", "--data.shards=x"]
    command = carry_on.command_for(config, same, Path("w"))
    assert command == ["--resume", str(run), "--data.shards", "x", "--run.workers", "1"]
    edited = tmp_path / "edited.yaml"  # what may change is taken from the YAML too, and said
    edited.write_text(config.read_text().replace("checkpoint_every: 3", "checkpoint_every: 7, max_hours: 2.5"))
    command = carry_on.command_for(edited, ["--run.dir", str(run)])
    assert command == ["--resume", str(run), "--run.checkpoint-every", "7", "--run.max-hours", "2.5"]
    assert f"{run}: going on with --run.checkpoint-every 7 --run.max-hours 2.5" in capsys.readouterr().out
    with pytest.raises(ValueError, match="seed: .* holds a run with 0, got 1\n.*choose another"):
        carry_on.command_for(config, [*same, "--seed", "1"])
    assert carry_on.main([str(config), *same, "--seed", "1"]) == 2


@pytest.mark.slow
def test_stopped_and_resumed_on_two_processes(bench, reference):
    """SIGTERM to the launcher: 75. The same with --resume: 0, and the end is that of a run never stopped."""
    folder, config = bench
    run, log = folder / "stopped", folder / "stopped.log"
    slow = folder / "slow"
    slow.touch()
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/launch/instrumented.py "$@"\n')
    python.chmod(0o755)
    held = {"PYTHON_EXEC": str(python), "SELFSUP_TEST": json.dumps({"slow": str(slow), "seconds": 0.3})}
    options = [config, "--processes", 2, "--run.dir", run, "--run.device", "cpu"]
    process = start(*options, log=log, **held)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 4)
    assert len(psutil.Process(process.pid).children()) == 2  # it is torchrun itself: no process between
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, log.read_text()
    assert "Traceback" not in log.read_text()
    assert start(*options, "--resume", log=log).wait(timeout=100) == 0, log.read_text()
    assert losses(run) == losses(reference) and final_state(run) == final_state(reference)


@pytest.mark.slow
def test_a_fault_on_two_processes(bench):
    """torchrun would say 1. The outcome of an earlier start does not count."""
    folder, config = bench
    run, log = folder / "faulty", folder / "faulty.log"
    run.mkdir()
    (run / "outcome.json").write_text('{"state": "interrupted"}')
    options = [config, "--processes", 2, "--run.dir", run, "--data.shards", folder / "missing"]
    assert start(*options, log=log).wait(timeout=100) == 2, log.read_text()
    assert "error: data.shards" in log.read_text() and "Traceback" not in log.read_text()
