"""The run folder: claimed by one run at a time, and enough to know what was run and to run it again."""

import fcntl
import functools
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from selfsup.config import dump_yaml
from selfsup.durable import write_atomically
from selfsup.recipe import Recipe


def claim(run_dir: Path, resume: bool) -> TextIO:
    """Makes the folder if needed and locks it until the returned file is closed or the process dies.

    Raises ValueError where the folder cannot be written, another run holds it, or it already holds
    checkpoints of a run that this is not the resumption of. A run that was killed before its first
    checkpoint left nothing worth keeping: its folder is used again.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise ValueError(
            f"run.dir: cannot write {run_dir}: {error.strerror}; choose another --run.dir"
        ) from None
    try:
        # lockf, not flock: loader workers, which are forks, must not inherit the lock and outlive us with it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        raise ValueError(
            f"run.dir: {run_dir} is in use by another run; wait for it or choose another"
        ) from None
    if not resume and list((run_dir / "checkpoints").glob("step-*")):
        lock.close()
        raise ValueError(
            f"run.dir: {run_dir} already holds a run; continue it with "
            f"`selfsup train --resume {run_dir}`, or choose another --run.dir"
        )
    for stale in (run_dir / "checkpoints").glob(".tmp-*"):  # a save that was killed; the lock is ours
        shutil.rmtree(stale)
    return lock


def describe(run_dir: Path, recipe: Recipe, processes: int, device: torch.device) -> None:
    """Writes config.yaml (resolved) and environment.json; removes an earlier outcome.json."""
    (run_dir / "outcome.json").unlink(missing_ok=True)
    write_atomically(run_dir / "config.yaml", dump_yaml(recipe).encode())
    facts = json.dumps(environment(processes, device), indent=1)
    write_atomically(run_dir / "environment.json", facts.encode())


def environment(processes: int, device: torch.device) -> dict[str, Any]:
    """What the run ran on: versions, machine, processes, git revision of this code (None if unknown)."""
    libraries = ("selfsup", "torch", "torchvision", "timm", "accelerate", "webdataset", "numpy", "safetensors")
    return {
        "versions": {name: version(name) for name in libraries},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "git_revision": git_revision(),
    }


@functools.cache
def git_revision() -> str | None:
    """The commit of the checkout this package is imported from; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


State = Literal["finished", "interrupted", "failed", "stalled"]


def write_outcome(
    run_dir: Path, state: State, step: int, collapsed_at: int | None = None, reason: str = "", skipped: int = 0
) -> None:
    """outcome.json: how the run ended, since a launcher's exit code does not tell.

    state: `interrupted` saved and can be resumed; `failed` and `stalled` cannot go on without somebody's care.
    reason: one line for people. skipped: steps left out because they were not finite. collapsed_at: the step from
    which on the online monitor found the features collapsed, if it did.
    """
    content = {"state": state, "step": step, "reason": reason, "skipped": skipped, "collapsed_at": collapsed_at}
    write_atomically(run_dir / "outcome.json", json.dumps(content).encode())
