"""The real launchers start what they were asked for, and the run is the same under each."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from running import (
    ROOT,
    TESTS,
    Server,
    final_state,
    losses,
    make_shards,
    metrics,
    torchrun,
    wait_for,
    write_config,
)
from selfsup.recipe import load_recipe
from selfsup.stop import INTERRUPTED


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    config, server = write_config(folder, make_shards(folder / "shards")), Server()
    server.run([config, "--run.dir", folder / "reference"], folder / "log", ranks=2)
    server.close()
    return folder, config


def processes(run: Path) -> int:
    return json.loads((run / "environment.json").read_text())["processes"]


def accelerate(file: str, *arguments) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch" / file),
        "-m",
        "selfsup.train",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_torchrun(bench):
    folder, config = bench
    done = torchrun(2, [config, "--run.dir", folder / "torchrun"])
    assert done.returncode == 0, done.stderr
    assert processes(folder / "torchrun") == 2 and losses(folder / "torchrun") == losses(folder / "reference")
    assert done.stdout.count("finished at step 20 of 20") == 1  # one rank prints


@pytest.mark.slow
def test_accelerate_on_two_processes(bench):
    folder, config = bench
    done = accelerate(
        "cpu2.yaml", config, "--run.dir", folder / "cpu2", "--run.device", "cpu", "--run.expect-processes", 2
    )
    assert done.returncode == 0, done.stderr
    assert processes(folder / "cpu2") == 2 and losses(folder / "cpu2") == losses(folder / "reference")


@pytest.mark.slow
def test_accelerate_on_one_process(bench):
    folder, config = bench
    done = accelerate("cpu.yaml", config, "--run.dir", folder / "cpu", "--run.expect-processes", 1)
    assert done.returncode == 0, done.stderr
    assert processes(folder / "cpu") == 1 and len(metrics(folder / "cpu")) == 20


def is_free(run: Path) -> bool:
    """Whether no process holds the run folder."""
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


@pytest.mark.slow
def test_killed_and_resumed_under_accelerate(bench):
    """kill -9 of the launcher and its ranks in mid-run; the resumed run ends bit for bit as one never stopped."""
    folder, config = bench
    run, log = folder / "killed", folder / "killed.log"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch" / "cpu2.yaml"),
    ]
    command += [str(TESTS / "launcher.py"), str(config), "--run.dir", str(run), "--run.device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SELFSUP_TEST": '{"delay": 0.05}'}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=env)
    wait_for(lambda: list(run.glob("checkpoints/step-00000006")))
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        each.kill()  # every rank is in a session of its own: killing the launcher's group would spare them
    process.wait()
    wait_for(lambda: is_free(run))  # the launcher is gone, its ranks may take a moment longer
    assert not (run / "outcome.json").exists(), "killed too late"
    done = accelerate("cpu2.yaml", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(folder / "reference") and final_state(run) == final_state(
        folder / "reference"
    )


@pytest.mark.slow
def test_fewer_processes_than_expected_are_refused(bench):
    """The silent trap: this command starts one process."""
    folder, config = bench
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "-m",
        "selfsup.train",
    ]
    command += [str(config), "--run.dir", str(folder / "trap"), "--run.expect-processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "run.expect_processes: expected 2, got 1 processes" in done.stderr
    assert not (folder / "trap").exists()


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once_on_all_ranks(bench):
    """torchrun passes the signal to the whole group, loader workers included."""
    folder, config = bench
    run = folder / "terminated"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(TESTS / "launcher.py"),
    ]
    command += [
        str(config),
        "--run.dir",
        str(run),
        "--run.workers",
        "1",
        "--optim.steps",
        "5000",
        "--run.checkpoint-every",
        "10000",
    ]
    with (folder / "terminated.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 3)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["state"] == "interrupted"
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{outcome['step']:08d}"]
    text = (folder / "terminated.log").read_text()
    assert "selfsup/train.py" not in text and "DataLoader worker" not in text, (
        text
    )  # torchrun's own traceback is


RECIPES = ("kubernetes", "skypilot")  # not Accelerate's


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "launch").glob("*.yaml")) if p.stem not in RECIPES],
    ids=lambda p: p.stem,
)
def test_launch_files_parse(path):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    content = yaml.safe_load(path.read_text())
    assert loaded.num_processes == content["num_processes"] and path.read_text().startswith("#")
    assert content["mixed_precision"] == "no"  # precision belongs to the recipe


@pytest.mark.parametrize("name", ["gpu", "gpu8", "nodes", "fsdp2"])
def test_the_commands_in_launch_files_are_ones_that_train_takes(name, bench):
    """Their overrides make a recipe; the number of processes is the file's."""
    text = (ROOT / "launch" / f"{name}.yaml").read_text()
    joined = text.replace("\\\n#", " ")
    (command,) = [line for line in joined.splitlines() if "accelerate launch" in line]
    words = command.split(" -m selfsup.train CONFIG ")[1].split()
    recipe = load_recipe(bench[1], ["--run.dir", "r", *words])
    assert recipe.run.device == "cuda"
    assert recipe.run.expect_processes in (None, yaml.safe_load(text)["num_processes"])
    assert recipe.run.parallel == ("fsdp2" if name == "fsdp2" else "ddp")


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((ROOT / "launch" / f"{name}.yaml").read_text()))


def test_the_kubernetes_job():
    """Parsed only: names, numbers and limits that must agree do."""
    service, job = documents("kubernetes")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["restartPolicy"] == "Never" and spec["podReplacementPolicy"] == "Failed"  # as podFailurePolicy wants
    (container,) = pod["containers"]
    env = {item["name"]: item["value"] for item in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(env["NODES"])
    assert env["RDZV"].split(":")[0] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(env["PROCESSES"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    ignored, failing = spec["podFailurePolicy"]["rules"]
    assert (ignored["action"], ignored["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget"}])
    assert failing["onExitCodes"]["containerName"] == container["name"]
    script = ROOT / container["command"][0]
    assert os.access(script, os.X_OK) and all(f"${{{name}:-" in script.read_text() for name in env)
    grace = int(script.read_text().split("TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-")[1].split("}")[0])
    assert pod["terminationGracePeriodSeconds"] > grace
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert volumes.keys() == mounts.keys() and mounts["shm"] == "/dev/shm"
    assert container["args"][2].startswith(mounts["shared"] + "/")


def test_the_skypilot_job():
    """Parsed only."""
    (job,) = documents("skypilot")
    assert job["resources"]["use_spot"] and job["resources"]["job_recovery"]["recover_on_exit_codes"] == [INTERRUPTED]
    assert (ROOT / job["envs"]["CONFIG"]).exists() and (ROOT / job["setup"].strip()).exists()
    (folder,) = job["file_mounts"]
    words = shlex.split(job["run"].replace("\\\n", " "))
    assert words[:2] == [".venv/bin/selfsup", "launch"] and "--carry-on" in words
    assert words[words.index("--run.dir") + 1].startswith(folder + "/")


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch")))
def test_scripts_are_bash(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_the_readme_names_every_file():
    text = (ROOT / "launch" / "README.md").read_text()
    assert [p.name for p in (ROOT / "launch").iterdir() if p.name != "README.md" and p.name not in text] == []
