"""Running a plan: cells through submitit, here or on SLURM, one state file, one table; killed anywhere, it goes on."""

import csv
import fcntl
import io
import json
import shlex
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TextIO, runtime_checkable

import submitit

from selfsup.durable import write_atomically
from selfsup.scaling.cell import ERROR, PLAN, RESULT, folder_of, held_by, read_json, run_cell
from selfsup.scaling.grid import Cell
from selfsup.scaling.plan import Plan, fitted, read_plan, write_plan

STATE, TABLE, JOBS = "state.json", "results.csv", "jobs"
OVER = ("done", "failed", "diverged")
COLUMNS = (
    "cell", "role", "fit", "state", "size", "params", "samples", "flops", "budget", "steps", "warmup", "batch", "lr",
    "seed", "cluster", "params_matrices", "params_all", "params_no_embedding", "flops_counted", "flops_parameters",
    "unique", "loss", "initial_loss", "steps_done", "skipped", "flops_done", "seconds", "reason",
)  # fmt: skip
States = dict[str, dict[str, Any]]


@runtime_checkable
class Executor(Protocol):
    """What is asked of submitit."""

    def submit(self, function: Callable[..., Any], *arguments: str) -> Any:
        """Starts function(*arguments) somewhere; the job has `done()`, `cancel()` and `paths`."""


class Left:
    """A cell at work in a process that an earlier start left when it was killed: waited for as a job of ours is."""

    paths = SimpleNamespace(stderr=Path("that of an earlier start"))

    def __init__(self, folder: Path):
        self.folder = folder

    def done(self) -> bool:
        return held_by(self.folder) is None

    def cancel(self, check: bool = True) -> None:
        """It goes on: it is no child of ours, and perhaps of another machine."""


def open_sweep(plan: Plan, folder: Path) -> tuple[TextIO, States]:
    """The folder, locked, with the plan in it, and the state of each of its cells.

    A plan may replace the one before it (after a pilot): cells that both have keep their results, those that only the
    earlier one had stay in the state file and the table, marked as left. Raises ValueError where another process has
    the folder, or where it is of something else.
    """
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if there - {JOBS, ".lock"} and PLAN not in there:
        raise ValueError(f"--out {folder}: is there and is no sweep; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        raise ValueError(f"--out {folder}: another process runs this sweep; wait for it") from None
    states: States = read_json(folder / STATE) or {}
    if (folder / PLAN).exists():
        for cell in read_plan(folder / PLAN).as_cells():
            states.setdefault(cell.id, {"state": "pending", "failures": 0, "reason": ""})["cell"] = cell._asdict()
    now = {cell.id for cell in plan.as_cells()}
    for cell in plan.as_cells():
        states.setdefault(cell.id, {"state": "pending", "failures": 0, "reason": ""})["cell"] = cell._asdict()
    for name, state in states.items():
        state["planned"] = name in now
        if state["state"] == "running":  # whoever watched it is gone
            state["state"] = "pending"
    write_plan(plan, folder / PLAN)
    return lock, states


def run_sweep(
    plan: Plan, folder: Path, executor: Executor, workers: int, retries: int, pause: float = 0.5,
    again: bool = False, say: Callable[[str], None] = print,
) -> States:  # fmt: skip
    """Runs every cell of the plan that is not over, at most `workers` at a time; returns the states.

    retries: attempts beyond the first that a cell is given. again: cells that failed before are tried anew. One that
    fails or diverges stops no other. The state file and the table are written at every change.
    """
    lock, states = open_sweep(plan, folder)
    flying: dict[str, Any] = {}
    try:
        for name, state in states.items():  # also those of an earlier plan alone
            _take(folder, states, name)
            who = held_by(folder_of(folder, name))
            if who is not None and state["state"] == "pending":
                flying[name], state["state"] = Left(folder_of(folder, name)), "running"
                say(f"{name}: still at work since an earlier start ({who}); waiting for it")
            if again and state["planned"] and state["state"] == "failed":
                state.update(state="pending", failures=0, reason="")
        _save(folder, states)
        while True:
            ended = False
            for name, job in list(flying.items()):
                if job.done():
                    del flying[name]
                    _ended(folder, states, name, job, retries)
                    _save(folder, states)
                    ended = True
            for cell in plan.as_cells():
                if states[cell.id]["state"] == "pending" and len(flying) < workers and _ready(states, cell):
                    flying[cell.id] = executor.submit(run_cell, str(folder.absolute()), cell.id)
                    states[cell.id]["state"] = "running"
                    _save(folder, states)
            _save(folder, states)
            if ended:
                say(_progress(plan, states, workers))
            if not flying and not any(states[cell.id]["state"] == "pending" for cell in plan.as_cells()):
                return states
            time.sleep(pause)
    finally:
        for name, job in flying.items():  # only where we leave early: they save, and go on next time
            job.cancel(check=False)
            states[name]["state"] = "pending"
        _save(folder, states)
        lock.close()


def _ready(states: States, cell: Cell) -> bool:
    """Whether a pending cell can start: a branch when its trunk is done. Without one it fails, and says so."""
    if cell.trunk is None or states[cell.trunk]["state"] == "done":
        return True
    if states[cell.trunk]["state"] in OVER:
        states[cell.id].update(state="failed", reason=f"its trunk {cell.trunk} {states[cell.trunk]['state']}")
    return False


def _take(folder: Path, states: States, name: str) -> bool:
    """The outcome that a cell has written, if it has."""
    result = read_json(folder_of(folder, name) / RESULT)
    if result is None:
        return False
    states[name].update(state=result["state"], reason=result.get("reason", ""), result=result)
    return True


def _ended(folder: Path, states: States, name: str, job: Any, retries: int) -> None:
    """What became of an attempt: an outcome, or a failure that is counted."""
    if _take(folder, states, name):
        return
    error = read_json(folder_of(folder, name) / ERROR) or {"reason": "its process ended without a word (killed?)"}
    failures = states[name]["failures"] + 1
    over = failures > retries
    reason = f"{error['reason']} (attempt {failures}; log: {job.paths.stderr.name} in jobs)"
    states[name].update(state="failed" if over else "pending", failures=failures, reason=reason)


def _save(folder: Path, states: States) -> None:
    write_atomically(folder / STATE, (json.dumps(states, indent=1) + "\n").encode())
    write_atomically(folder / TABLE, table(states).encode())


def table(states: States) -> str:
    """Every cell as a row of CSV, whatever its state; what has no loss has an empty one."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for state in states.values():
        cell, result = Cell(**state["cell"]), state.get("result", {})
        row = {
            **state, **result, **cell._asdict(), **cell.counts, "cell": cell.id,
            "fit": int(fitted(cell) and state["planned"]), "cluster": cell.trunk or cell.id,
            "warmup": round(cell.steps * cell.recipe["optim"]["warmup_fraction"]),
        }  # fmt: skip
        row["reason"] = " ".join(str(row.get("reason") or "").split())
        writer.writerow({name: "" if row.get(name) is None else row[name] for name in COLUMNS})
    return out.getvalue()


def _progress(plan: Plan, states: States, workers: int) -> str:
    """How far it is, and how long it will take: planned hours left, at the pace of those that are over."""
    names = [cell.id for cell in plan.as_cells()]
    counts = Counter(states[name]["state"] for name in names)
    over = [name for name in names if states[name]["state"] in OVER]
    spent = sum(states[name].get("result", {}).get("seconds", 0.0) for name in over) / 3600
    planned = sum(plan.hours[name] for name in over)
    left = sum(plan.hours[name] for name in names if name not in over)
    pace = spent / planned if planned and spent else 1.0
    said = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return f"{len(over)} of {len(names)} cells over: {said}; about {left * pace / workers * 60:.1f} minutes left"


def make_executor(
    folder: Path, where: str, minutes: int, gpus: int, partition: str | None
) -> submitit.AutoExecutor:
    """submitit's, for processes here or for SLURM: one CPU a cell. Raises ValueError where there is no SLURM."""
    try:
        executor = submitit.AutoExecutor(folder / JOBS, cluster=where)
    except RuntimeError as error:
        raise ValueError(f"--where {where}: {error}; use --where local, or start this on a login node") from None
    executor.update_parameters(
        timeout_min=minutes, cpus_per_task=1, tasks_per_node=1, nodes=1, gpus_per_node=gpus, name="selfsup-cell",
        **({"slurm_partition": partition} if partition else {}),
    )  # fmt: skip
    return executor


def fit_command(plan: Plan, folder: Path) -> str:
    """What fits the law to the table. Rates are judged by its `--lr` only where the sweep probes none: probes are not
    fitted, and `report --sweep` has them."""
    vocab = "" if plan.vocab is None else f" --initial-loss initial_loss --vocab {plan.vocab}"
    budget = " --budget budget" if plan.config["grid"]["name"] == "isoflop" else ""
    columns = "--params params --samples samples --flops flops --loss loss"
    rates = "" if plan.config["probe_lr"] else " --lr lr"
    more = f"--unique unique --cluster cluster{rates} --steps steps --warmup warmup"
    return (
        f"selfsup scaling fit {shlex.quote(str(folder / TABLE))} --where fit=1 {columns}{budget} {more}{vocab} "
        f"--json {shlex.quote(str(folder / 'fit.json'))}"
    )
