"""What a probe found: means and spreads, a table for people, JSON for everything else."""

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfsup.durable import write_atomically

ROWS = {
    "pixels": "raw pixels",
    "random": "random initialisation",
    "pretrained": "pretrained",
}


@dataclass(frozen=True)
class Score:
    """Accuracies of one probe on one kind of feature, a value per seed."""

    values: tuple[float, ...]
    """0..1."""
    details: tuple[dict[str, Any], ...] = ()
    """How each value came about: chosen C, iterations; JSON values."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds (n - 1); none for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class ProbeResult:
    """Everything a probe measured and how."""

    scores: dict[str, dict[str, Score]]
    """Kind of feature (pixels, random, pretrained) -> probe (logreg, knn) -> score."""
    left_out: dict[str, str]
    """Kind of feature -> why it was not measured."""
    sources: tuple[dict[str, Any], ...]
    """Name, description, seed, step of each pretrained model."""
    recipe: dict[str, Any]
    """Of the probes: settings, crop, number format."""
    data: dict[str, Any]
    """Shards, fingerprints and counts of train and test."""
    versions: dict[str, str]
    seconds: float
    """Wall time."""

    def to_json(self) -> str:
        """All of it, with mean and spread written out."""
        content = asdict(self)
        content["scores"] = {
            kind: {
                probe: {
                    "mean": score.mean,
                    "std": score.std,
                    "values": score.values,
                    "details": score.details,
                }
                for probe, score in probes.items()
            }
            for kind, probes in self.scores.items()
        }
        return json.dumps(content, indent=1, allow_nan=False)


def save_result(result: ProbeResult, path: Path) -> None:
    """Writes the JSON atomically, in place of an earlier one. Raises ValueError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, result.to_json().encode())
    except OSError as error:
        raise ValueError(f"{path}: cannot write the result: {error.strerror or error}") from error


def print_result(result: ProbeResult, console: Console) -> None:
    """The table: accuracy in per cent, mean ± standard deviation over seeds, and what was left out."""
    train, test = result.data["train"], result.data["test"]
    table = Table(
        title="accuracy on frozen features, %",
        caption=f"{train['samples']} training, {test['samples']} test images, {train['classes']} classes",
    )
    table.add_column("features")
    for name in ("logistic regression", "kNN"):
        table.add_column(name, justify="right")
    for kind, title in ROWS.items():
        if kind in result.scores:
            scores = result.scores[kind]
            table.add_row(title, _percent(scores["logreg"]), _percent(scores["knn"]))
        else:
            table.add_row(title, "-", "-")
    console.print(table)
    for kind, reason in result.left_out.items():
        console.print(f"{ROWS[kind]}: {reason}", markup=False, highlight=False)
    for line in _warnings(result):
        console.print(line, markup=False, highlight=False)


def _percent(score: Score) -> str:
    assert all(math.isfinite(value) for value in score.values)
    if score.std is None:
        return f"{100 * score.mean:.1f}"
    return f"{100 * score.mean:.1f} ± {100 * score.std:.1f} (n={len(score.values)})"


def _warnings(result: ProbeResult) -> list[str]:
    """A line for each kind of feature whose regression was stopped before it converged."""
    lines = []
    for kind, scores in result.scores.items():
        stopped = sum(not details["converged"] for details in scores["logreg"].details)
        if stopped:
            limit = result.recipe["logreg"]["max_iterations"]
            lines.append(
                f"{ROWS[kind]}: {stopped} of {len(scores['logreg'].values)} logistic regressions stopped at "
                f"{limit} iterations, not converged"
            )
    return lines
