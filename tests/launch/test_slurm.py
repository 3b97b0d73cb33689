"""launch/slurm.sbatch on a real SLURM of one node: however it is interrupted, the run ends as one never stopped,
bit for bit."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from running import ROOT, Server, final_state, losses, make_shards, metrics, wait_for, write_config

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "launch" / "slurm.sbatch"


class Cluster:
    """A running SLURM, and a folder to submit from."""

    def __init__(self, slurm: Path, folder: Path) -> None:
        self.folder = folder
        self.config = write_config(folder, make_shards(folder / "shards"))
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/launch/instrumented.py "$@"\n')
        python.chmod(0o755)
        mine = {"SLURM_CONF": str(slurm / "slurm.conf"), "OMP_NUM_THREADS": "1", "PYTHON": str(python)}
        self.env = {**os.environ, **mine}

    def call(self, *command, **env) -> str:
        done = subprocess.run(
            [str(c) for c in command], env={**self.env, **env}, cwd=self.folder,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *options, run: str, overrides: tuple = (), seconds: float = 1) -> str:
        """Submits a run whose steps take `seconds` while the file FOLDER/RUN.slow is there; returns the job."""
        slow = self.folder / f"{run}.slow"
        slow.touch()
        test = json.dumps({"slow": str(slow), "seconds": seconds})
        arguments = [self.config, "--run.dir", run, "--run.device", "cpu", *overrides]
        return self.call("sbatch", "--parsable", *options, SCRIPT, *arguments, SELFSUP_TEST=test)

    def release(self, run: str) -> None:
        (self.folder / f"{run}.slow").unlink()

    def of(self, job: str, key: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)[key]

    def ends(self, job: str, seconds: float = 90) -> str:
        """The state in which a job ended."""
        going = ("PENDING", "RUNNING", "COMPLETING")
        wait_for(lambda: self.of(job, "JobState") not in going, seconds, pause=0.3)
        return self.of(job, "JobState")

    def steps(self, run: str) -> int:
        path = self.folder / run / "metrics.jsonl"
        return len(metrics(path.parent)) if path.exists() else 0

    def log(self, name: str) -> str:
        path = self.folder / f"slurm-{name}.out"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    here = ROOT / "tools" / "slurm_here.sh"
    slurm = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own folder: too long a name for munge's socket
    env = {**os.environ, "SLURM_HERE_CPUS": "16"}  # the jobs here mostly sleep
    start = [str(here), "start", str(slurm)]
    done = subprocess.run(start, env=env, capture_output=True, text=True, timeout=300)
    try:
        if done.returncode == 3:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stdout + done.stderr
        yield Cluster(slurm, tmp_path_factory.mktemp("slurm"))
    finally:
        daemons = [psutil.Process(int(p.read_text())) for p in slurm.glob("*.pid")]
        stopped = subprocess.run([str(here), "stop", str(slurm)], capture_output=True, text=True, timeout=120)
        shutil.rmtree(slurm)
        assert stopped.returncode == 0, stopped.stderr
        assert not [p for p in daemons if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def references(cluster):
    """Runs that were never stopped, of two processes and of one."""
    server = Server()
    for ranks in (1, 2):
        run = cluster.folder / f"reference-{ranks}"
        server.run([cluster.config, "--run.dir", run], cluster.folder / "log", ranks=ranks)
    server.close()
    return cluster.folder


@pytest.fixture(scope="module")
def jobs(cluster, references):
    """All jobs at once, of two processes or of one, and what happens to each in mid-run: what one waits for
    passes while the others are waited for."""
    two = ("--ntasks-per-node", "2")
    missing = ("--data.shards", str(cluster.folder / "missing"))
    jobs = {
        "limit": cluster.submit("--time", "1", "--signal", "USR2@20", run="limit", seconds=2.5),
        "requeued": cluster.submit(*two, run="requeued"),
        "cancelled": cluster.submit(run="cancelled"),
        "array": cluster.submit("--array", "3-4", run="array"),
        "fault": cluster.submit(run="fault", overrides=missing),
    }
    incidents = {
        "requeued": ["scontrol", "requeue", jobs["requeued"]],
        "cancelled": ["scancel", jobs["cancelled"]],
        "array/seed-4": ["scancel", "--signal=USR2", f"{jobs['array']}_4"],
    }
    deadline = time.monotonic() + 150
    while incidents:
        assert time.monotonic() < deadline, f"these do not train: {list(incidents)}\n{cluster.log(jobs['requeued'])}"
        for run in list(incidents):
            steps = cluster.steps(run)
            assert steps < 20, f"{run}: too late"
            if steps >= 2:
                cluster.call(*incidents.pop(run))
        time.sleep(0.05)
    return jobs


def same(run: Path, reference: Path) -> bool:
    return losses(run) == losses(reference) and final_state(run) == final_state(reference)


def test_a_requeue_in_mid_run(cluster, references, jobs):
    """scontrol requeue: SIGTERM to all, a new start some seconds later; two processes each time."""
    job = jobs["requeued"]
    wait_for(lambda: "start 1" in cluster.log(job), pause=0.2)
    assert cluster.steps("requeued") < 20, "requeued too late"
    cluster.release("requeued")
    assert cluster.ends(job) == "COMPLETED" and cluster.of(job, "Restarts") == "1"
    assert same(references / "requeued", references / "reference-2")
    log = cluster.log(job)
    assert "requeueing job" not in log, "it was being requeued and must not do so itself"
    assert log.count("finished at step 20 of 20") == 1 and "resuming requeued" in log


def test_a_fault_is_not_tried_again(cluster, jobs):
    job = jobs["fault"]
    assert cluster.ends(job) == "FAILED" and cluster.of(job, "Restarts") == "0"
    assert cluster.of(job, "ExitCode") == "2:0" and "error: data.shards" in cluster.log(job)


def test_cancelled_and_submitted_again(cluster, references, jobs):
    """scancel is final; the run is whole, and the same command goes on with it."""
    job = jobs["cancelled"]
    assert cluster.ends(job) == "CANCELLED" and cluster.of(job, "Restarts") == "0"
    assert json.loads((references / "cancelled" / "outcome.json").read_text())["state"] == "interrupted"
    again = cluster.submit(run="cancelled", seconds=0)
    assert cluster.ends(again) == "COMPLETED" and same(references / "cancelled", references / "reference-1")


def test_an_array_over_seeds(cluster, jobs):
    """One task of it is asked to stop: it alone starts again."""
    tasks = [f"{jobs['array']}_{seed}" for seed in (3, 4)]
    runs = [cluster.folder / "array" / f"seed-{seed}" for seed in (3, 4)]
    wait_for(lambda: "start 1" in cluster.log(tasks[1]), pause=0.2)
    cluster.release("array")
    assert [cluster.ends(task) for task in tasks] == ["COMPLETED", "COMPLETED"]
    assert [cluster.of(task, "Restarts") for task in tasks] == ["0", "1"]
    for run, seed in zip(runs, (3, 4)):
        assert f"\nseed: {seed}\n" in (run / "config.yaml").read_text() and len(losses(run)) == 20
    assert losses(runs[0]) != losses(runs[1])


def test_the_time_limit(cluster, references, jobs):
    """SIGUSR2 ahead of the limit: saved, left, requeued by itself, finished."""
    job = jobs["limit"]
    wait_for(lambda: "SIGUSR2: saving" in cluster.log(job), 150, pause=0.3)
    assert 0 < cluster.steps("limit") < 20
    cluster.release("limit")
    assert cluster.ends(job) == "COMPLETED" and int(cluster.of(job, "Restarts")) >= 1
    assert "requeueing job" in cluster.log(job) and same(references / "limit", references / "reference-1")
