"""`selfsup scaling plan | run`: what is typed, and what is printed."""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from selfsup.scaling.plan import make_plan, read_plan, show_plan, write_plan


def main_plan(
    config: Annotated[Path, tyro.conf.arg(metavar="CONFIG")],
    /,
    *,
    json: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None,
    pilot: Annotated[Path | None, tyro.conf.arg(metavar="FIT")] = None,
    flop_per_second: float | None = None,
) -> int:
    """Plans a sweep and says what a law fitted to it would know, before anything runs.

    Exit code 1 where the design is refused: no law could be identified from it (the reasons are printed and in OUT).

    Args:
        config: the sweep: a base recipe, a ladder of sizes, a grid, rules, a prior.
        json: the plan as a file, for selfsup scaling run.
        pilot: a chinchilla fit of runs made before (selfsup scaling fit --json): the grid is centred on its optimum.
        flop_per_second: what training reaches; without it a few steps of every size are timed here, in one thread.
    """
    if flop_per_second is not None and not 0 < flop_per_second < float("inf"):
        raise ValueError(f"--flop-per-second: expected a positive number, got {flop_per_second:g}")
    plan = replace(
        make_plan(config, pilot, flop_per_second), command="selfsup scaling plan " + shlex.join(sys.argv[3:])
    )
    show_plan(plan)
    if json is not None:
        write_plan(plan, json)
    return 1 if plan.refused else 0


def main_run(
    plan: Annotated[Path, tyro.conf.arg(metavar="PLAN")],
    /,
    *,
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    where: Literal["local", "slurm"] = "local",
    workers: int | None = None,
    retries: int = 1,
    again: bool = False,
    anyway: bool = False,
    minutes: int = 10080,
    gpus: int = 0,
    partition: str | None = None,
) -> int:
    """Runs the cells of a plan that are not over yet: start it again after whatever stopped it.

    Each cell is a run of its own process and one thread, with its own folder, DIR/cells/ID. DIR/state.json says what
    each is: pending, running, done, failed, diverged; DIR/results.csv has a row for every one. Exit code 1 where a cell
    failed.

    Args:
        plan: what selfsup scaling plan --json wrote.
        out: the sweep's folder; default: beside the plan, by its name. A later plan may go on in it: cells that both
            have are not run again.
        where: processes of this machine, or SLURM jobs.
        workers: cells at a time; default: one a core here, 64 on SLURM.
        retries: further attempts of a cell that fails; one that diverges has none.
        again: try cells anew that failed in an earlier start.
        anyway: run a design that was refused.
        minutes: the longest that one cell may take.
        gpus: of each cell; cells here then share the machine's first ones.
        partition: SLURM's.
    """
    from selfsup.scaling.sweep import OVER, TABLE, fit_command, make_executor, run_sweep

    wanted = read_plan(plan)
    if wanted.refused and not anyway:
        reasons = "\n".join(f"{found['check']}: {found['text']}" for found in wanted.refused)
        raise ValueError(f"{plan}: its design is refused; mend it, or run it with --anyway\n{reasons}")
    least_of = (("--workers", workers, 1), ("--retries", retries, 0), ("--minutes", minutes, 1), ("--gpus", gpus, 0))
    for flag, value, least in least_of:
        if value is not None and value < least:
            raise ValueError(f"{flag}: expected at least {least}, got {value}")
    folder = plan.with_suffix("") if out is None else out
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or (cores if where == "local" else 64)
    executor = make_executor(folder, where, minutes, gpus, partition)
    states = run_sweep(wanted, folder, executor, workers, retries, again=again)
    mine = [states[cell.id] for cell in wanted.as_cells()]
    for state in mine:
        if state["state"] in OVER[1:]:
            cell = state["cell"]
            print(f"{state['state']}: {cell['id']} {cell['role']} {cell['size']}: {state['reason']}")
    print(f"{folder / TABLE}\n{fit_command(wanted, folder)}")
    return 1 if any(state["state"] == "failed" for state in mine) else 0
