"""What launch/slurm.sbatch decides, without a SLURM: srun and scontrol are stand-ins that write down how they were
called. The real one is in test_slurm.py."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from running import ROOT

SCRIPT = ROOT / "launch" / "slurm.sbatch"
SRUN = """#!/bin/bash
printf '%s\\n' "$MASTER_ADDR $MASTER_PORT" "$@" > srun
exit "$SRUN_CODE"
"""
SCONTROL = """#!/bin/bash
case "$*" in
    "--oneliner show job "*) echo "JobId=7 JobState=$STATE Reason=None" ;;
    "show hostnames "*) printf 'n1\\nn2\\n' ;;
    *) echo "$@" >> scontrol ;;
esac
"""


class Batch:
    """One start of the script as sbatch would make it."""

    def __init__(self, folder: Path, *arguments: str, script: str | None = None, code: int = 0, **env) -> None:
        folder.mkdir()
        (folder / "bin").mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "job").write_text(script or SCRIPT.read_text())
        job = {"SLURM_JOB_ID": 7, "SLURM_JOB_NUM_NODES": 1, "SLURM_NTASKS": 2, "SLURM_JOB_NODELIST": "n1"}
        variables = {**job, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SRUN_CODE": code, "STATE": "RUNNING", **env}
        self.done = subprocess.run(
            ["bash", str(folder / "job"), *arguments], capture_output=True, text=True, cwd=folder, timeout=60,
            env={key: str(value) for key, value in variables.items()},
        )  # fmt: skip
        called = folder / "srun"
        self.where, *self.srun = called.read_text().splitlines() if called.exists() else [""]
        requeued = folder / "scontrol"
        self.requeued = requeued.read_text().splitlines() if requeued.exists() else []

    @property
    def program(self) -> list[str]:
        """What each rank runs."""
        return self.srun[self.srun.index("rank") + 1 :]


@pytest.mark.parametrize(
    ("code", "env", "requeues"),
    [
        (0, {}, []),  # finished
        (75, {}, ["requeue 7"]),  # interrupted
        (140, {}, ["requeue 7"]),  # SIGUSR2 before it could listen
        (2, {}, []),  # a fault of the user's
        (1, {}, []),  # a traceback
        (137, {}, []),  # kill -9, out of memory
        (75, {"STATE": "COMPLETING"}, []),  # scancel, preemption, a requeue by hand
        (75, {"STATE": "CANCELLED"}, []),
        (75, {"SLURM_RESTART_COUNT": 99}, ["requeue 7"]),
        (75, {"SLURM_RESTART_COUNT": 100}, []),
        (75, {"SLURM_RESTART_COUNT": 3, "MAX_RESTARTS": 3}, []),
        (75, {"SLURM_ARRAY_JOB_ID": 7, "SLURM_ARRAY_TASK_ID": 4}, ["requeue 7_4"]),  # never the whole array
    ],
)
def test_when_it_requeues_itself(tmp_path, code, env, requeues):
    batch = Batch(tmp_path / "a", "a.yaml", code=code, **env)
    assert batch.requeued == requeues and batch.done.returncode == code


MUTANTS = {
    "requeues after finished": ('[ "$code" = 75 ] || [ "$code" = 140 ] || exit "$code"', ""),
    "requeues a cancelled job": ('[ "$state" != JobState=RUNNING ]', "false"),
    "requeues for ever": ('[ "$restarts" -ge "${MAX_RESTARTS:-100}" ]', "false"),
    "requeues the whole array": ('job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$task}"', 'job=""'),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bugs_show(tmp_path, mutant):
    """Each of them changes what the cases above look at."""
    good, bad = MUTANTS[mutant]
    text = SCRIPT.read_text()
    assert text.count(good) == 1
    cases = [
        (0, {}),
        (75, {"STATE": "COMPLETING"}),
        (75, {"SLURM_RESTART_COUNT": 100}),
        (75, {"SLURM_ARRAY_JOB_ID": 7, "SLURM_ARRAY_TASK_ID": 4}),
    ]
    differ = 0
    for number, (code, env) in enumerate(cases):
        right = Batch(tmp_path / f"right{number}", "a.yaml", code=code, **env)
        wrong = Batch(tmp_path / f"wrong{number}", "a.yaml", script=text.replace(good, bad), code=code, **env)
        differ += right.requeued != wrong.requeued
    assert differ == 1


def test_what_the_ranks_run(tmp_path):
    """Arguments arrive as they are, blanks and quotes too; the number of processes is checked."""
    awkward = "a b'c\"$(touch x);*"
    batch = Batch(tmp_path / "a", "a b.yaml", "--run.dir", awkward, PYTHON="py", SLURM_CPUS_PER_TASK=3)
    expected = ["py", "-m", "selfsup.carry_on", "a b.yaml", "--run.dir", awkward, "--run.expect-processes", "2"]
    assert batch.program == expected and not (tmp_path / "a" / "x").exists()
    assert "--cpus-per-task=3" in batch.srun and batch.where.startswith("127.0.0.1 ")


def test_arrays(tmp_path):
    third = {"SLURM_ARRAY_JOB_ID": 7, "SLURM_ARRAY_TASK_ID": 2}
    configs = ["a.yaml", "b.yaml", "c.yaml"]
    assert Batch(tmp_path / "a", *configs, "--seed", "1", **third).program[3:6] == ["c.yaml", "--seed", "1"]
    assert Batch(tmp_path / "b", "a.yaml", **third).program[3:6] == ["a.yaml", "--as-seed", "2"]
    for name, arguments, env, fault in [
        ("c", configs[:2], third, "array task 2 has no config: 2 given"),
        ("d", configs, {}, "3 configs need an array: sbatch --array 0-2"),
        ("e", ["--seed", "1"], {}, "expected a CONFIG first"),
        ("f", ["a.yaml"], {"SLURM_JOB_ID": ""}, "submit it: sbatch"),
    ]:
        batch = Batch(tmp_path / name, *arguments, **env)
        assert batch.done.returncode == 2 and fault in batch.done.stderr and not batch.srun


def test_where_the_ranks_meet(tmp_path):
    """Jobs that start at once differ by their numbers, and a port in use is passed over."""
    ports = [Batch(tmp_path / f"a{job}", "a.yaml", SLURM_JOB_ID=job).where.split()[1] for job in (7, 8)]
    assert ports[0] != ports[1]
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(ports[0])))
        taken.listen()
        assert Batch(tmp_path / "b", "a.yaml").where.split()[1] not in (ports[0], "")
    nodes = Batch(tmp_path / "c", "a.yaml", SLURM_JOB_NUM_NODES=2, SLURM_JOB_NODELIST="n[1-2]")
    assert nodes.where.startswith("n1 ")


@pytest.mark.parametrize("tasks", [1, 4])
def test_the_rank_of_a_task(tmp_path, tasks):
    """The one program that bash runs for every task: its variables, and its arguments handed on."""
    srun = Batch(tmp_path / "a", "a.yaml").srun
    program = srun[srun.index("-c") + 1 : srun.index("rank")]
    env = {"PATH": os.environ["PATH"], "SLURM_NTASKS": str(tasks), "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(program), "rank", "env"], capture_output=True, text=True, env={**env, "SLURM_NNODES": "2"}
    )
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    expected = ["3", "1", "4", "2"] if tasks > 1 else [None] * 4  # one process needs no group
    assert [found.get(name) for name in names] == expected


def here(folder: Path, apt: str | None = None, **options) -> str:
    """What tools/slurm_here.sh says when it must refuse, on a machine with nothing but the commands it needs."""
    programs = folder / "programs"
    programs.mkdir(parents=True)
    for name in ("id", "env", "nproc", "hostname", "realpath", "mkdir", "chmod", "tail"):
        (programs / name).symlink_to(shutil.which(name))
    if apt is not None:
        (programs / "apt-get").write_text(f"#!/bin/bash\n{apt}\n")
        (programs / "apt-get").chmod(0o755)
    with (ROOT / "tools" / "slurm_here.sh").open() as script:
        done = subprocess.run(
            [shutil.which("bash"), "-s", "start", str(folder / "here")], stdin=script, capture_output=True, text=True,
            timeout=60, **{"env": {"PATH": str(programs)}, **options},
        )  # fmt: skip
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1, done
    return done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can go on to where packages are missing")
def test_where_slurm_cannot_be_installed(tmp_path):
    packages = "munge slurmctld slurmd slurm-client"
    assert f"{packages} not found, and no apt-get" in here(tmp_path / "a")
    offline = "echo 'E: Could not resolve deb.debian.org'; exit 100"
    assert f"cannot install {packages} (no network?): E: Could not resolve" in here(tmp_path / "b", apt=offline)
    tmp_path.parent.parent.chmod(0o755)
    assert "must be root" in here(tmp_path / "c", user=65534, group=65534, env=None)
