"""launch/elastic.sh: a lost rank, and a lost machine; the run goes on by itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from running import ROOT, Server, final_state, free_port, losses, make_shards, metrics, wait_for, write_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    config, server = write_config(folder, make_shards(folder / "shards")), Server()
    server.run([config, "--run.dir", folder / "reference"], folder / "log", ranks=2)
    server.close()
    return folder, config


@pytest.fixture
def start():
    """Starts launchers; none of them, and none of their ranks, is left at the end."""
    launchers = []

    def start(*arguments, **env) -> subprocess.Popen:
        launchers.append(begin(*arguments, **env))
        return launchers[-1]

    yield start
    for launcher in launchers:
        if launcher.poll() is None:
            for process in [*ranks(launcher), launcher]:
                process.kill()
        launcher.wait()


def begin(folder: Path, config: Path, run: str, **env) -> subprocess.Popen:
    """One machine's torchrun; its ranks take 0.3 s a step while FOLDER/RUN.slow is there."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/launch/instrumented.py "$@"\n')
    python.chmod(0o755)
    slow = folder / f"{run}.slow"
    slow.touch()
    test = json.dumps({"slow": str(slow), "seconds": 0.3})
    env = {**os.environ, "SELFSUP_TEST": test, "PYTHON": sys.executable, "PYTHON_EXEC": str(python), **env}
    command = [str(ROOT / "launch" / "elastic.sh"), str(config), "--run.dir", str(folder / run), "--run.device", "cpu"]
    with (folder / f"{run}.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


def ranks(launcher: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(launcher.pid).children(recursive=True)


def steps(run: Path) -> int:
    return len(metrics(run)) if (run / "metrics.jsonl").exists() else 0


def test_a_lost_rank(bench, start):
    """kill -9 of one of two: torchrun starts both again, they go on, and the end is the same bit for bit."""
    folder, config = bench
    run = folder / "rank"
    launcher = start(folder, config, "rank", PROCESSES="2")
    wait_for(lambda: steps(run) >= 7)
    ranks(launcher)[1].kill()
    (folder / "rank.slow").unlink()
    assert launcher.wait(timeout=120) == 0, (folder / "rank.log").read_text()
    text = (folder / "rank.log").read_text()
    assert text.count("resuming") == 1 and text.count("finished at step 20 of 20") == 1
    assert losses(run) == losses(folder / "reference") and final_state(run) == final_state(folder / "reference")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "evicted"])
def test_a_lost_machine(bench, start, number):
    """Two launchers of one rank each are two machines. One and its rank are killed, or it is told to leave, and
    all ranks save: the other goes on alone."""
    folder, config = bench
    name = f"machine-{number}"
    run = folder / name
    options = {"NODES": "1:2", "RDZV": f"127.0.0.1:{free_port()}"}
    quick = "last_call_timeout={},keep_alive_interval=1,keep_alive_max_attempt=3,is_host={}"
    first = start(folder, config, name, **options, RDZV_CONF=quick.format(5, 1))
    time.sleep(1)
    second = start(folder, config, name, **options, RDZV_CONF=quick.format(5, 0))
    wait_for(lambda: steps(run) >= 7)
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    for process in [psutil.Process(second.pid), *(ranks(second) if number == signal.SIGKILL else [])]:
        process.send_signal(number)
    (folder / f"{name}.slow").unlink()
    assert first.wait(timeout=120) == 0, (folder / f"{name}.log").read_text()
    assert json.loads((run / "environment.json").read_text())["processes"] == 1
    found, expected = losses(run), losses(folder / "reference")
    assert [line[0] for line in found] == [line[0] for line in expected]
    assert [line[1] for line in found] == pytest.approx([line[1] for line in expected], rel=1e-5)
