"""A scaling-law experiment as one command: a pilot, the sweep that its fit centres, the law, the report.

    python tools/sweep.py configs/sweeps/clm-imdb-pilot.yaml configs/sweeps/clm-imdb.yaml runs/clm-imdb

Runs what a person would type, step by step, and prints it. Cells, table, fits and report are in FOLDER, the two plans beside
it; stopped anywhere and started again, cells that are over are not run again, and those that failed are tried anew.
A refused pilot is gone on from: its law is nearer than a guess. A refused sweep is not run.
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


def step(words: list[str], makes: Path | None = None, fine: tuple[int, ...] = (0, 1)) -> None:
    """Runs one command. Exit code 1 is a refusal, or of `run` a failed cell: it is said, and what was written is used.

    makes: the file that it writes anew. Ends the program where there is none, or for another exit code.
    """
    print(f"\n$ {shlex.join(words)}", flush=True)
    if makes is not None:
        makes.unlink(missing_ok=True)
    code = subprocess.run([sys.executable, "-m", "selfsup.cli", *words[1:]], check=False).returncode
    if code not in fine or (makes is not None and not makes.exists()):
        sys.exit(f"stopped: {shlex.join(words)} gave exit code {code}")


def run_and_fit(plan: Path, folder: Path, out: Path, more: list[str]) -> None:
    """The cells of a plan, and the fit that `run` prints, into a file of its own."""
    step(["selfsup", "scaling", "run", str(plan), "--out", str(folder), "--again", *more])
    words = shlex.split(fit_command(read_plan(plan), folder))
    words[words.index("--json") + 1] = str(out)
    step(words, out)


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
        folder: of both; the plans lie beside it.
    """
    began = time.monotonic()
    first, second = (folder.with_name(f"{folder.name}-{name}.json") for name in ("pilot", "sweep"))
    guess, law = folder / "pilot.json", folder / "fit.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    step(["selfsup", "scaling", "plan", str(pilot), "--json", str(first)], first)
    run_and_fit(first, folder, guess, ["--anyway"])
    step(["selfsup", "scaling", "plan", str(sweep), "--pilot", str(guess), "--json", str(second)], second, fine=(0,))
    run_and_fit(second, folder, law, [])
    step(["selfsup", "scaling", "report", "--fit", str(law), "--sweep", str(folder), "--out", str(folder / "report")])
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes; {folder / 'report'}")


if __name__ == "__main__":
    tyro.cli(main)
