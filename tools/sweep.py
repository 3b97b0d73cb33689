"""A scaling-law experiment as one command: a pilot, the sweep that its fit centres, the law, the report.

    python tools/sweep.py configs/sweeps/clm-imdb-pilot.yaml configs/sweeps/clm-imdb.yaml runs/clm-imdb

Runs what a person would type, step by step, and prints it. Everything is in FOLDER; stopped anywhere and started again,
cells that are over are not run again. A refused pilot is gone on from: its law is nearer than a guess.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from selfsup.scaling.plan import read_plan
from selfsup.scaling.sweep import fit_command


def step(words: list[str], refused_is_fine: bool = False) -> None:
    """Runs one command. Exit code 1 of a fit is a refusal: it is written, and said."""
    print(f"\n$ {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "selfsup.cli", *words[1:]], check=False).returncode
    if code and not (refused_is_fine and code == 1):
        sys.exit(f"stopped: {shlex.join(words)} gave exit code {code}")


def fit(plan: Path, folder: Path, out: Path) -> None:
    """The fit that `run` prints, into a file of its own."""
    words = shlex.split(fit_command(read_plan(plan), folder))
    words[words.index("--json") + 1] = str(out)
    out.unlink(missing_ok=True)
    step(words, refused_is_fine=True)
    if not out.exists():
        sys.exit(f"stopped: no fit of {folder}")


def main(
    pilot: Annotated[Path, tyro.conf.arg(metavar="PILOT")],
    sweep: Annotated[Path, tyro.conf.arg(metavar="SWEEP")],
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")],
    /,
) -> None:
    """Plans and runs the pilot, fits it, plans and runs the sweep it centres, fits that, and writes FOLDER/report.

    Args:
        pilot: the pilot's YAML file.
        sweep: the sweep's.
        folder: of both; plans lie beside it.
    """
    began = time.monotonic()
    plans = [folder.with_name(f"{folder.name}-{name}.json") for name in ("pilot", "sweep")]
    folder.parent.mkdir(parents=True, exist_ok=True)
    step(["selfsup", "scaling", "plan", str(pilot), "--json", str(plans[0])], refused_is_fine=True)
    step(["selfsup", "scaling", "run", str(plans[0]), "--out", str(folder), "--anyway"])
    fit(plans[0], folder, folder / "pilot.json")
    step(["selfsup", "scaling", "plan", str(sweep), "--pilot", str(folder / "pilot.json"), "--json", str(plans[1])])
    step(["selfsup", "scaling", "run", str(plans[1]), "--out", str(folder)])
    fit(plans[1], folder, folder / "fit.json")
    report = ["--fit", str(folder / "fit.json"), "--sweep", str(folder), "--out", str(folder / "report")]
    step(["selfsup", "scaling", "report", *report])
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes; {folder / 'report'}")


if __name__ == "__main__":
    tyro.cli(main)
