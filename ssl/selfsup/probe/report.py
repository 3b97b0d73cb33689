"""What a probe found: means and spreads, a table for people, JSON and TensorBoard for everything else."""

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from selfsup.checkpoint import Weights, weights_suffix, weights_title
from selfsup.durable import write_atomically
from selfsup.probe.hparams import write_hparams
from selfsup.probe.sources import Probed, run_folder

ROWS = {
    "pixels": "raw pixels",
    "majority": "commonest class",
    "tfidf": "TF-IDF of the words",
    "random": "random initialisation",
    "scratch": "trained from scratch",
    "pretrained": "pretrained",
}
COLUMNS = {
    "logreg": "logistic regression",
    "knn": "kNN",
    "linear": "linear probe",
    "attentive": "attentive probe",
    "finetune": "fine-tuned",
    "constant": "one answer",
}

REPRESENTATION, PERPLEXITY = "representation-", "perplexity-"
"""What the names of results without accuracies begin with (`selfsup probe representation`, `perplexity`)."""

Mode = Literal["fast", "paper"]
"""fast: features computed once, no augmentation; paper: augmented views at every step (of text: dropout).
Numbers of different modes answer different questions and are never put side by side."""


@dataclass(frozen=True)
class Score:
    """Accuracies of one probe on one kind of feature."""

    values: tuple[float, ...]
    """0..1, a value per seed; see `ProbeResult.spread`."""
    details: tuple[dict[str, Any], ...] = ()
    """How each value came about: chosen C, iterations, loss; JSON values."""

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

    probe: str
    """frozen, linear, attentive, finetune or fewshot; text or text-finetune."""
    mode: Mode
    scores: dict[str, dict[str, Score]]
    """Kind of feature (see ROWS) -> probe (see COLUMNS; few-shot ones as logreg-5) -> score."""
    spread: str
    """What the values of a score stand for."""
    left_out: dict[str, str]
    """Kind of feature -> why it was not measured."""
    sources: tuple[dict[str, Any], ...]
    """Name, weights, description, seed, step of each pretrained model."""
    recipe: dict[str, Any]
    """Of the probes: settings, seeds, crop, number format."""
    data: dict[str, Any]
    """Shards, fingerprints and counts of train and test."""
    versions: dict[str, str]
    """Of libraries; device and threads of a supervised probe."""
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


def file_stem(result: ProbeResult, checkpoint: Path) -> str:
    """PROBE-MODE-step-N-DATA-RECIPE, then the number of runs and the weights: what differs never shares a file."""
    data = [result.data[part]["fingerprint"] for part in ("train", "test")]
    how = [result.recipe, [source["seed"] for source in result.sources]]
    stem = f"{result.probe}-{result.mode}-{checkpoint.name}-{short_hash(data)}-{short_hash(how)}"
    runs = len(result.sources)
    return stem + (f"-{runs}-seeds" if runs > 1 else "") + weights_suffix(_weights(result))


def _weights(result: ProbeResult) -> Weights:
    """Which were probed; results of earlier versions do not say, and knew only these."""
    return result.sources[0].get("weights", "trained")


def short_hash(content: Any) -> str:
    """Eight digits that tell JSON values apart."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def publish(result: ProbeResult, encoder: Probed, out: Path | None, console: Console) -> None:
    """Prints the table, writes the JSON (`out`, else into the run folder) and the run's HParams line.

    encoder: the first source. Says what was not written, and why. Raises ValueError where a file
    cannot be written.
    """
    print_results([result], console)
    folder = run_folder(encoder)
    stem = file_stem(result, encoder.checkpoint) if encoder.checkpoint else None
    path = out or (folder / "probe" / f"{stem}.json" if folder else None)
    if path is None:
        print("no JSON written: the model has no run folder; name a file with --out")
    else:
        save_result(result, path)
        print(f"written to {path}")
    if folder is not None:
        write_hparams(hyperparameters(result), metrics(result), folder / "tensorboard" / f"probe-{stem}")


def hyperparameters(result: ProbeResult) -> dict[str, Any]:
    """The probe's recipe, and that of the pretraining under `pretraining`; nested JSON values."""
    first = result.sources[0]
    mine = {"probe": result.probe, "mode": result.mode, "weights": first["weights"], **result.recipe}
    return {**mine, "pretraining": {"step": first["step"], "seed": first["seed"], **(first["recipe"] or {})}}


def metrics(result: ProbeResult) -> dict[str, float]:
    """probe/PROBE-MODE -> mean accuracy; with /KIND behind it for all but the pretrained encoder."""
    return {
        f"probe/{name}-{result.mode}" + (f"/{kind}" if kind != "pretrained" else ""): score.mean
        for kind, scores in result.scores.items()
        for name, score in scores.items()
    }


def save_result(result: ProbeResult, path: Path) -> None:
    """Writes the JSON atomically, in place of an earlier one. Raises ValueError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, result.to_json().encode())
    except OSError as error:
        raise ValueError(f"{path}: cannot write the result: {error.strerror or error}") from error


def load_result(path: Path) -> ProbeResult:
    """A result read back. Raises ValueError for a file that is none."""
    try:
        content = json.loads(path.read_text())
        content["scores"] = {
            kind: {name: Score(tuple(s["values"]), tuple(s["details"])) for name, s in scores.items()}
            for kind, scores in content["scores"].items()
        }
        content["sources"] = tuple(content["sources"])
        return ProbeResult(**{field.name: content[field.name] for field in fields(ProbeResult)})
    except OSError as error:
        raise ValueError(f"{path}: cannot read it: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a probe's result: {error!r}; probe the run again") from error


def main_show(files: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")], /) -> None:
    """Print results of probes: a table for each mode and each data set, which are not compared.

    Args:
        files: JSON files from RUN/probe; those named representation-… and perplexity-… are passed over.
    """
    results = []
    for path in files:
        if path.name.startswith((REPRESENTATION, PERPLEXITY)):
            kind = path.name.partition("-")[0]
            print(f"{path}: passed over, it holds no accuracies; it is of selfsup probe {kind}")
        else:
            results.append(load_result(path))
    if not results:
        raise ValueError("probe show: expected JSON files of RUN/probe with accuracies, got none")
    apart: dict[tuple[str, ...], list[ProbeResult]] = {}
    for result in results:
        data = (result.data[part]["fingerprint"] for part in ("train", "test"))
        apart.setdefault((result.mode, *data), []).append(result)
    for comparable in apart.values():
        print_results(comparable, Console())


def print_results(results: Sequence[ProbeResult], console: Console) -> None:
    """The table: accuracy in per cent, mean ± standard deviation over seeds, and what was left out.

    Raises ValueError for results of different modes or on different data: they are not comparable.
    """
    first = results[0]
    for result in results[1:]:
        if result.mode != first.mode:
            raise ValueError(
                f"mode: {result.probe} is {result.mode}, {first.probe} is {first.mode}; augmented and cached "
                f"features are not compared: show them apart"
            )
        for part in ("train", "test"):
            if result.data[part]["fingerprint"] != first.data[part]["fingerprint"]:
                shards = f"{result.data[part]['shards']} and {first.data[part]['shards']}"
                raise ValueError(f"{part}: {shards} are different data; show the results apart")
    console.print(_table(results))
    for line in dict.fromkeys(line for result in results for line in _remarks(result)):
        console.print(line, markup=False, highlight=False)


def _table(results: Sequence[ProbeResult]) -> Table:
    """A row for each result, kind of feature and number of images a class; a column for each probe."""
    data, mode = results[0].data, results[0].mode
    unit = data["test"].get("unit", "images")
    used = data["train"].get("limited_to", data["train"]["samples"])
    counts = f"{used} training, {data['test']['samples']} test {unit}"
    table = Table(title=f"accuracy, %, mode {mode}", caption=f"{counts}, {data['train']['classes']} classes")
    table.add_column("features")
    names = [name for r in results for scores in r.scores.values() for name in scores]
    columns = list(dict.fromkeys(name.partition("-")[0] for name in names))
    for column in columns:
        table.add_column(COLUMNS[column], justify="right")
    for result in results:
        source = f"{result.sources[0]['name']}, " if len(results) > 1 else ""
        for kind, title in ROWS.items():
            if kind == "pretrained":
                title += weights_title(_weights(result))
            scores = result.scores.get(kind, {})
            for shots in dict.fromkeys(name.partition("-")[2] for name in scores):
                found = [scores.get(f"{column}-{shots}" if shots else column) for column in columns]
                cells = (_percent(score) if score else "-" for score in found)
                table.add_row(source + title + (f", {shots} a class" if shots else ""), *cells)
            if kind in result.left_out:
                table.add_row(source + title, *("-" for _ in columns))
    return table


def _percent(score: Score) -> str:
    assert all(math.isfinite(value) for value in score.values)
    if score.std is None:
        return f"{100 * score.mean:.1f}"
    return f"{100 * score.mean:.1f} ± {100 * score.std:.1f} (n={len(score.values)})"


def _remarks(result: ProbeResult) -> list[str]:
    """What the spread is over, what was left out, and which regressions did not converge."""
    several = any(len(score.values) > 1 for scores in result.scores.values() for score in scores.values())
    lines = [f"± standard deviation over {result.spread}"] if several else []
    lines += [f"{ROWS[kind]}: {reason}" for kind, reason in result.left_out.items()]
    for kind, scores in result.scores.items():
        for name, score in scores.items():
            stopped = sum(not details.get("converged", True) for details in score.details)
            if stopped:
                lines.append(
                    f"{ROWS[kind]}: {stopped} of {len(score.values)} fits ({name}) stopped at their "
                    "limit of iterations, not converged"
                )
    return lines
