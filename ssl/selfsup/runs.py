"""`selfsup runs`: the runs under a folder, how far each came, what it measured and what it cost. Reads only."""

import fcntl
import json
import math
import os
import struct
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from selfsup import cost
from selfsup.config import read_yaml
from selfsup.durable import write_atomically

_MARKS = ("environment.json", "metrics.jsonl", "outcome.json", "checkpoints", ".lock")
"""One of them makes a run folder; a config.yaml alone does not."""


@dataclass
class Run:
    """What a run folder tells; None where it does not."""

    name: str
    """Its path under the folder that was asked about."""
    state: str
    """running; as outcome.json has it (finished, interrupted, stalled, failed); died: no outcome, nobody at it."""
    objective: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    """Of the last line of metrics.jsonl."""
    knn: float | None = None
    """The online monitor's last, 0..1."""
    probe: tuple[str, float] | None = None
    """The best accuracy (0..1) of pretrained features in RUN/probe and whose it is; of a run on text that has
    none, its lowest perplexity."""
    collapsed_at: int | None = None
    cost: dict[str, Any] | None = None
    """As cost.total; None for runs made before costs were kept."""
    written: float = 0.0
    """Unix time of the last write."""
    problems: list[str] = field(default_factory=list)
    """What is damaged or missing, a line each."""


def held(lock: Path) -> bool:
    """Whether a process holds the run folder's lock (run_folder.claim), found out without taking it.

    A process does not see its own. Raises OSError where the file cannot be read. On a file system that does
    not carry locks between machines, those of other machines are not seen.
    """
    # struct flock: kind, whence, start, length, holder; macOS has the offsets first.
    form = "qqihh" if sys.platform == "darwin" else "hhqqi"
    asked = (0, 0, 0, fcntl.F_WRLCK, 0) if sys.platform == "darwin" else (fcntl.F_WRLCK, 0, 0, 0, 0)
    with lock.open("rb") as file:
        answer = struct.unpack(form, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(form, *asked)))
    return answer[3 if sys.platform == "darwin" else 0] != fcntl.F_UNLCK


def find_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """All runs in `folder` or below it, by the time of their last write, and what could not be looked into.

    Links to folders are not followed. Raises ValueError where `folder` is none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with runs, found none; runs are written to --run.dir")
    runs: list[Run] = []
    closed: list[str] = []
    walk = os.walk(folder, onerror=lambda e: closed.append(f"{e.filename}: cannot look inside: {e.strerror}"))
    for here, below, files in walk:
        if any(mark in files or mark in below for mark in _MARKS):
            below.clear()  # checkpoints and exports hold configs too
            runs.append(read_run(Path(here), os.path.relpath(here, folder)))
        below.sort()
    return sorted(runs, key=lambda run: (run.written, run.name)), closed


def read_run(folder: Path, name: str) -> Run:
    """What one run folder tells. Whatever is damaged in it is among the run's problems; the rest is read."""
    run = Run(name, "died")
    for read in (
        _read_config,
        _read_metrics,
        _read_outcome,
        _read_lock,
        _read_probes,
        _read_cost,
        _read_times,
    ):
        try:
            read(folder, run)
        except OSError as error:
            run.problems.append(f"{error.filename or folder}: cannot read it: {error.strerror or error}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            text = " ".join(str(error).split()) if isinstance(error, ValueError) else repr(error)
            about = "" if str(folder) in text else f"{folder}: in {read.__name__.removeprefix('_read_')}: "
            run.problems.append(about + text)
    return run


def _read_config(folder: Path, run: Run) -> None:
    content = read_yaml(folder / "config.yaml")
    run.objective, run.steps = str(content["objective"]["name"]), int(content["optim"]["steps"])


def _read_metrics(folder: Path, run: Run) -> None:
    """Steps as logged and as checkpointed, whichever is later; the last loss; the last kNN accuracy."""
    path = folder / "metrics.jsonl"
    saved = sorted(folder.glob("checkpoints/step-*"))
    run.step = int(saved[-1].name.removeprefix("step-")) if saved else 0
    if not path.exists():
        return
    content = path.read_bytes()
    content = content[: content.rfind(b"\n") + 1]  # a last line without its end was cut off in a kill
    try:
        last = _line_at(content, len(content) - 1)
        run.step = max(run.step, last.get("step", 0))
        run.loss = last.get("loss")
        run.knn = _line_at(content, content.rfind(b'"knn"')).get("knn")
    except ValueError:
        raise ValueError(f"{path}: damaged: expected one JSON object a line") from None


def _line_at(content: bytes, place: int) -> dict[str, Any]:
    """The JSON object of the line with the byte at `place`; an empty one for -1."""
    if place < 0:
        return {}
    return dict(json.loads(content[content.rfind(b"\n", 0, place) + 1 : content.find(b"\n", place)]))


def _read_outcome(folder: Path, run: Run) -> None:
    path = folder / "outcome.json"
    if path.exists():
        run.state = "unknown"  # until the file says it
        content = _json(path)
        run.state, run.step = str(content["state"]), int(content["step"])
        run.collapsed_at = content.get("collapsed_at")


def _read_lock(folder: Path, run: Run) -> None:
    if (folder / ".lock").exists() and held(folder / ".lock"):
        run.state = "running"


def _read_probes(folder: Path, run: Run) -> None:
    """Files that are damaged are named; the others are read."""
    accuracies: dict[str, float] = {}
    perplexities: dict[str, float] = {}
    for path in sorted(folder.glob("probe/*.json")):
        try:
            content = _json(path)
            if path.name.startswith("perplexity-"):
                kind, value = str(content["measure"]), content["perplexity"]
                if value is not None:  # beyond what a float holds
                    perplexities[kind] = min(perplexities.get(kind, math.inf), value)
            elif not path.name.startswith("representation-"):
                for probe, score in content["scores"]["pretrained"].items():
                    accuracies[probe] = max(accuracies.get(probe, 0.0), score["mean"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            run.problems.append(f"{path}: damaged, not a probe's result: {error!r}")
    if accuracies:
        run.probe = max(accuracies.items(), key=lambda item: item[1])
    elif perplexities:
        run.probe = min(perplexities.items(), key=lambda item: item[1])


def _read_cost(folder: Path, run: Run) -> None:
    if (folder / cost.COST_FILE).exists():
        run.cost = cost.total(cost.read_parts(folder / cost.COST_FILE))


def _read_times(folder: Path, run: Run) -> None:
    names = (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "outcome.json",
        "checkpoints",
        "probe",
        cost.COST_FILE,
    )
    found = [(folder / name).stat().st_mtime for name in names if (folder / name).exists()]
    run.written = max(found, default=folder.stat().st_mtime)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged: expected one JSON object")
    return content


def table(runs: list[Run]) -> Table:
    """A row a run."""
    result = Table()
    result.add_column("run", overflow="fold")
    for title in ("objective", "state"):
        result.add_column(title)
    for title in ("step", "loss", "best", "hours", "device-hours", "kWh", "FLOPs"):
        result.add_column(title, justify="right")
    result.add_column("last written")
    for run in runs:
        state = run.state if run.collapsed_at is None else f"{run.state}, COLLAPSED"
        result.add_row(
            run.name,
            run.objective or "?",
            state,
            f"{_or(run.step, '?')}/{_or(run.steps, '?')}",
            "-" if run.loss is None else f"{run.loss:.4g}",
            _best(run),
            *_costs(run),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.written)),
        )
    return result


def _or(value: int | None, otherwise: str) -> str:
    return otherwise if value is None else str(value)


def _best(run: Run) -> str:
    """A probe's result goes before the online monitor's, which is on training images."""
    if run.probe is not None:
        name, value = run.probe
        return f"{value:.4g} {name}" if name.endswith("perplexity") else f"{100 * value:.1f}% {name}"
    return "-" if run.knn is None else f"{100 * run.knn:.1f}% online knn"


def _costs(run: Run) -> tuple[str, str, str, str]:
    """Hours, device-hours, energy, FLOPs."""
    if run.cost is None:
        return ("unknown",) * 4
    gpu, cpu = run.cost["gpu_kwh"], run.cost["cpu_kwh"]
    known = [f"{gpu:.3g} GPU"] if gpu else []
    known += [] if cpu is None else [f"{cpu:.3g} CPU"]
    hours = f"{run.cost['wall_hours']:.3g}", f"{run.cost['device_hours']:.3g}"
    return *hours, " + ".join(known) or "unknown", f"{run.cost['flops']:.3g}"


def main_runs(
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs"),
    /,
    *,
    json_file: Annotated[str | None, tyro.conf.arg(name="json", metavar="FILE")] = None,
) -> None:
    """List the runs under a folder: state, step, loss, probe, time and cost; the newest last.

    The state of a run without an outcome is `running` where a process holds its folder, else `died`. kWh are
    those that the devices counted: GPUs the run's own, CPU packages with all else that ran on the machine.

    Args:
        folder: looked through with all folders below it.
        json_file: also write all of it as JSON to FILE; -: print that, and no table.
    """
    runs, closed = find_runs(folder)
    if json_file is not None:
        text = json.dumps(
            {"folder": str(folder), "runs": [asdict(run) for run in runs], "closed": closed}, indent=1
        )
        if json_file == "-":
            print(text)
            return
        try:
            write_atomically(Path(json_file), text.encode())
        except OSError as error:
            raise ValueError(f"--json {json_file}: cannot write it: {error.strerror or error}") from error
    problems = [problem for run in runs for problem in run.problems] + closed
    if runs:
        console = Console()
        if not console.is_terminal:  # a file or pipe has no width to keep to
            console = Console(width=200)
        console.print(table(runs))
    else:
        print(f"{folder}: no runs in it or below it")
    for problem in problems:
        print(f"damaged    {problem}")
