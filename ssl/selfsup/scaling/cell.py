"""One cell of a sweep, in a process of its own: trained as `selfsup train` trains, then measured on held-out data.

Everything is in its folder, CELLS/ID: the run folder, and result.json once it is over. Called again it goes on where it
was; called while another process has it, it waits for that one.
"""

import fcntl
import json
import math
import os
import socket
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from selfsup.carry_on import holds_run, state_of
from selfsup.checkpoint import load_objective
from selfsup.config import validate
from selfsup.durable import write_atomically
from selfsup.objectives.base import Objective
from selfsup.recipe import Recipe
from selfsup.scaling.grid import OFF_TARGET, Cell
from selfsup.scaling.held_out import measure_of, unique_samples
from selfsup.scaling.plan import read_plan
from selfsup.scaling.sweep_config import HeldOut
from selfsup.scaling.timing import cell_recipe
from selfsup.start import build_objective
from selfsup.train import go_on, train

PLAN, RESULT, ERROR, LOCK = "plan.json", "result.json", "error.json", ".cell.lock"


class Interrupted(Exception):
    """The cell was asked to stop: it has saved, and goes on when it is started again."""


def folder_of(sweep: Path, cell: str) -> Path:
    """Of a cell, by its id."""
    return sweep / "cells" / cell


def run_cell(sweep: str, name: str) -> None:
    """Trains and measures the cell `name` of the sweep in that folder.

    Its outcome is in result.json: state done or diverged, loss, initial loss, seconds. What else goes wrong is in
    error.json, and raised.
    """
    root = Path(sweep)
    folder = folder_of(root, name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as lock:  # not "w": whoever waits must not wipe out who it waits for
        fcntl.lockf(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=lock, flush=True)
        if (folder / RESULT).exists():
            return
        (folder / ERROR).unlink(missing_ok=True)
        try:
            result = _outcome(root, name, folder)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            _write(folder / ERROR, {"reason": reason, "kind": type(error).__name__, "trace": traceback.format_exc()})
            raise
        _write(folder / RESULT, result)


def _outcome(root: Path, name: str, folder: Path) -> dict[str, Any]:
    plan, began = read_plan(root / PLAN), time.monotonic()
    cell = next((cell for cell in plan.as_cells() if cell.id == name), None)
    if cell is None:
        raise ValueError(f"{root / PLAN}: has no cell {name}; another plan has replaced it")
    recipe, held = cell_recipe(cell, str(folder)), validate(HeldOut, plan.config["held_out"])
    # Before the training: their faults are cheap to find.
    measure, unique = measure_of(recipe, held), unique_samples(recipe)
    try:
        _train(root, cell, recipe, folder)
    except ValueError as error:
        if not spent(folder, recipe.run.skip_budget):
            raise
        return {"state": "diverged", "reason": str(error).splitlines()[0], "seconds": time.monotonic() - began}
    torch.set_num_threads(recipe.run.threads or torch.get_num_threads())
    objective, _, checkpoint, _ = load_objective(folder)
    did = _did(cell, objective, checkpoint)
    loss, initial = measure(objective), measure(build_objective(recipe, torch.device("cpu")))
    result = {"state": "done", "loss": loss, "initial_loss": initial, "unique": unique, **did}
    result["seconds"] = time.monotonic() - began
    if not math.isfinite(loss) or loss >= initial:
        result["state"] = "diverged"
        result["reason"] = f"held-out loss {loss:.4g} is not below the untrained model's {initial:.4g}"
        result["loss"] = None
    return result


def _train(root: Path, cell: Cell, recipe: Recipe, folder: Path) -> None:
    """To the last step, from wherever the cell is. Raises Interrupted where it was asked to stop before."""
    if list(folder.glob("checkpoints/step-*")):
        outcome = "finished" if state_of(folder) == "finished" else go_on(folder, [])
    elif cell.trunk is not None:  # never from step 0: a branch is its trunk's up to there
        stem = folder_of(root, cell.trunk) / "checkpoints" / f"step-{cell.branch_step:08d}"
        outcome = train(recipe, resume=stem)
    elif holds_run(folder):
        outcome = go_on(folder, [])
    else:
        outcome = train(recipe)
    if outcome != "finished":
        raise Interrupted("asked to stop; it goes on from its checkpoint")


def _did(cell: Cell, objective: Objective, checkpoint: Path) -> dict[str, Any]:
    """Steps and FLOPs that the run really did, by the samples in its last checkpoint and the model that it holds.

    Raises ValueError where they are over 1% off the cell's budget, or off what was planned where there is none.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    share = objective.flops_per_sample() * state["samples"] / cell.counts["flops_counted"]
    flops = cell.flops * share  # by the sweep's convention
    wanted = cell.budget or cell.flops
    if abs(flops / wanted - 1) > OFF_TARGET:
        raise ValueError(
            f"its run did {flops:.4g} FLOPs in {state['step']} steps, {flops / wanted - 1:+.1%} off the {wanted:.4g} "
            f"planned (at most {OFF_TARGET:.0%}): it is no run of this plan"
        )
    return {"steps_done": state["step"], "skipped": state.get("skipped", 0), "flops_done": flops}


def held_by(folder: Path) -> str | None:
    """Which process has the cell of this folder in hand, as `process 12 on HOST`; None where none has."""
    if not (folder / LOCK).exists():
        return None
    with (folder / LOCK).open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            return lock.read().strip() or "a process that is starting"
    return None


def spent(folder: Path, budget: int) -> bool:
    """Whether a run ended because more of its steps than run.skip_budget were not finite."""
    skipped = folder / "skipped.jsonl"
    return skipped.exists() and len({json.loads(line)["step"] for line in skipped.read_text().splitlines()}) > budget


def read_json(path: Path) -> dict[str, Any] | None:
    """The content, None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
