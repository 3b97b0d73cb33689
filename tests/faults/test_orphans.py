"""Ranks whose launcher dies: they save and leave, and the run goes on as if nobody had been killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from running import TESTS, final_state, losses, make_shards, metrics, torchrun, wait_for, write_config


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orphans")
    config = write_config(folder, make_shards(folder / "shards"))
    done = torchrun(2, [config, "--run.dir", folder / "whole"])
    assert done.returncode == 0, done.stderr
    return folder, config


def launch(folder, config, name, **instruments):
    """A run under torchrun in mid-course: (launcher, its ranks, run folder)."""
    run, command = folder / name, [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", TESTS / "launcher.py", config, "--run.dir", run, "--run.workers", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SELFSUP_TEST": json.dumps({"delay": 0.1, **instruments})}
    with (folder / f"{name}.log").open("w") as log:
        launcher = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=env)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 2)
    children = psutil.Process(launcher.pid).children()
    ranks = [child for child in children if "launcher.py" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    return launcher, ranks, run


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_orphans(bench):
    folder, config = bench
    launcher, ranks, run = launch(folder, config, "orphaned")
    workers = [worker for rank in ranks for worker in rank.children()]
    assert workers
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks + workers, timeout=60)
    assert not alive, (folder / "orphaned.log").read_text()
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["state"] == "interrupted" and outcome["step"] < 20
    done = torchrun(2, ["--resume", run])
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(folder / "whole") and final_state(run) == final_state(folder / "whole")


@pytest.mark.slow
def test_orphans_are_caught(bench):
    """Without the kernel's word of their parent's death they train to the end."""
    folder, config = bench
    launcher, ranks, run = launch(folder, config, "planted", mutant="orphans")
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    psutil.wait_procs(ranks, timeout=60)
    assert json.loads((run / "outcome.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_launcher_that_dies_while_its_ranks_still_import(bench):
    """The kernel is asked for its word before torch is loaded, which takes seconds."""
    folder, config = bench
    run, command = folder / "early", [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "selfsup.train", config, "--run.dir", run, "--run.device", "cpu"]
    # Or the ranks would miss the store that torchrun keeps for them, and end of that.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launcher = subprocess.Popen(list(map(str, command)), env=env)
    found = []

    def loading():
        found[:] = [c for c in psutil.Process(launcher.pid).children() if "selfsup.train" in c.cmdline()]
        return len(found) == 2 and all("libtorch" in Path(f"/proc/{c.pid}/maps").read_text() for c in found)

    wait_for(loading)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(found, timeout=60)
    assert not alive and not (run / "outcome.json").exists() and not list(run.glob("checkpoints/*"))
