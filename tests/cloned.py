"""A copy of the repository to run the README's commands in."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from running import ROOT

needs_setup = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "selfsup").exists(), reason="needs ./launch/setup.sh"),
]


def copy_repository(folder: Path) -> Path:
    """What the commands need, in a folder that shares the installed .venv."""
    for name in ("launch", "configs", "tools"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def run(clone: Path, *command: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
