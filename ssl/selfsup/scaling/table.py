"""Reading anybody's table of runs: columns by their names, dropped rows counted by reason.

A run is one row or, with a cluster column, several (checkpoints of one training, seeds): rows of one cluster are
resampled together.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from selfsup.scaling.cells import number, read_cells, refuse_decimal_commas
from selfsup.scaling.cost import CONSTANT, Cost, fit_cost

FLOPS_PER = 6.0
"""FLOPs per parameter and sample where the table does not say: 2 forward, 4 backward."""
SAME = 0.01
"""Sizes, data and learning rates that differ by less are one cell's."""


@dataclass(frozen=True)
class Columns:
    """Names of the table's columns. Of `samples` and `flops` at least one.

    samples: data processed (tokens, images), repeats counted; unique: distinct samples, for repeated data.
    flops: of the whole training. budget: the nominal compute of an isoFLOP grid. cluster: names the run a row
    belongs to. lr, steps, warmup (in steps), initial_loss: for the checks that need them.
    also_params: parameters counted otherwise (without embeddings), to see what that changes.
    sigma: measured standard deviation of the row's log loss, for its weight.
    """

    params: str | None
    loss: str
    samples: str | None = None
    flops: str | None = None
    budget: str | None = None
    cluster: str | None = None
    unique: str | None = None
    lr: str | None = None
    steps: str | None = None
    warmup: str | None = None
    initial_loss: str | None = None
    also_params: str | None = None
    sigma: str | None = None


@dataclass(frozen=True)
class Runs:
    """n usable rows. `cost` says what C / (N D) is: 6 where only one of samples and FLOPs was given, else measured.
    `line` is the row's line in the file."""

    params: Float[np.ndarray, " n"]
    samples: Float[np.ndarray, " n"]
    flops: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]
    cluster: Int[np.ndarray, " n"]
    line: Int[np.ndarray, " n"]
    cost: Cost = Cost(FLOPS_PER)
    budget: Float[np.ndarray, " n"] | None = None
    unique: Float[np.ndarray, " n"] | None = None
    lr: Float[np.ndarray, " n"] | None = None
    steps: Float[np.ndarray, " n"] | None = None
    warmup: Float[np.ndarray, " n"] | None = None
    initial_loss: Float[np.ndarray, " n"] | None = None
    also_params: Float[np.ndarray, " n"] | None = None
    sigma: Float[np.ndarray, " n"] | None = None
    clustered: bool = False
    measured_flops: bool = False
    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def weights(self) -> Float[np.ndarray, " n"]:
        """Of each row in the sum of Huber losses: 1 / sigma over its median, one without measured noise. Beyond its
        threshold Huber's loss is linear, and 1 / sigma is its best weight (1 / sigma^2 that of squares)."""
        return np.ones(len(self)) if self.sigma is None else np.median(self.sigma) / self.sigma

    def take(self, keep: Bool[np.ndarray, " n"], reason: str | None = None) -> "Runs":
        """The rows where `keep`; with a reason the others are counted among the dropped ones."""
        parts = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                parts[item.name] = value[keep]
        parts["cluster"] = np.unique(parts["cluster"], return_inverse=True)[1].astype(np.int64)
        gone = int((~keep).sum())
        if reason is not None and gone:
            parts["dropped"] = {**self.dropped, reason: self.dropped.get(reason, 0) + gone}
        return replace(self, **parts)


def runs_of(
    params: Float[np.ndarray, " n"], samples: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"],
    cluster: Int[np.ndarray, " n"] | None = None,
) -> Runs:  # fmt: skip
    """Runs from arrays, with C = 6 N D: what a simulation has."""
    n = len(loss)
    codes = np.arange(n) if cluster is None else np.unique(cluster, return_inverse=True)[1].astype(np.int64)
    return Runs(
        params, samples, FLOPS_PER * params * samples, loss, codes, np.arange(n) + 2, read=n,
        clustered=cluster is not None,
    )  # fmt: skip


def same_cell(*keys: Float[np.ndarray, " n"] | None, within: float = SAME) -> Int[np.ndarray, " n"]:
    """A code for each row, equal where all keys agree within 1%: N and D that were counted or rounded in two ways are
    one cell. A key that is None (no such column) is left out.

    Each key is sorted and cut where it exceeds the least of its group by more than that, within the groups of the
    keys before it: by steps from one row to the next, a table of many sizes would be one cell.
    """
    given = [np.log(key) for key in keys if key is not None]
    codes = np.zeros(len(given[0]), dtype=np.int64)
    for key in given:
        order = np.lexsort((key, codes))
        group, start, code = -1, -np.inf, -1
        split = np.empty_like(codes)
        for index in order:
            if codes[index] != group or key[index] > start + np.log1p(within):
                group, start, code = codes[index], key[index], code + 1
            split[index] = code
        codes = split
    return codes


def read_table(
    path: Path, columns: Columns, where: Sequence[str] = (), flops_per: float | None = None
) -> Runs:
    """The usable rows of a CSV, TSV or semicolon-separated file.

    Args:
        where: `COLUMN=VALUE` conditions; a row must meet all of them.
        flops_per: FLOPs per parameter and sample, 6 where not given.

    Raises ValueError where the file, a column, or every row is unusable, with what was found instead.
    """
    if columns.samples is None and columns.flops is None and columns.params is not None:
        raise ValueError("give --samples COL (tokens or images) or --flops COL, or both: neither was given")
    header, rows = read_cells(path)
    for item in fields(columns):
        _require(path, header, getattr(columns, item.name), f"--{item.name.replace('_', '-')}")
    kept, dropped = _meet(path, header, rows, where)
    cells = {
        item.name: _column(path, header, kept, name, item.name)
        for item in fields(columns)
        if (name := getattr(columns, item.name)) is not None and item.name != "cluster"
    }
    lines = np.array([line for line, _ in kept], dtype=np.int64)
    labels = [row[header.index(columns.cluster)].strip() if columns.cluster else "" for _, row in kept]
    fine = np.ones(len(kept), dtype=bool)
    for reason, bad in _faults(cells, columns, labels):
        count = int((bad & fine).sum())
        fine &= ~bad
        if count:
            dropped[reason] = count
    if not fine.any():
        said = "; ".join(f"{count} {reason}" for reason, count in dropped.items()) or "it has none"
        raise ValueError(f"{path}: not one of its {len(rows)} rows can be used: {said}")
    cells = {name: values[fine] for name, values in cells.items()}
    codes = [label for label, good in zip(labels, fine) if good] if columns.cluster else lines[fine]
    cluster = np.unique(codes, return_inverse=True)[1].astype(np.int64)
    return _complete(cells, cluster, lines[fine], columns, flops_per, len(rows), dropped)


def _complete(
    cells: dict[str, np.ndarray], cluster: np.ndarray, lines: np.ndarray, columns: Columns,
    flops_per: float | None, read: int, dropped: dict[str, int],
) -> Runs:  # fmt: skip
    """Fills in whichever of samples and FLOPs the table lacks."""
    per = FLOPS_PER if flops_per is None else flops_per
    ones = np.ones(len(cluster))
    params, samples, flops = (cells.pop(name, None) for name in ("params", "samples", "flops"))
    measured = samples is not None and flops is not None and params is not None
    if params is None:  # a law of one axis
        params, samples = ones, (samples if samples is not None else flops)
        flops = flops if flops is not None else samples
    elif samples is None:
        samples = flops / (per * params)
    elif flops is None:
        flops = per * params * samples
    cost = Cost(float(per))
    if measured:
        cost = _measured(params, samples, flops, flops_per)
    return Runs(
        params, samples, flops, cells.pop("loss"), cluster, lines, cost, **cells,
        clustered=columns.cluster is not None, measured_flops=measured, read=read, dropped=dropped,
    )  # fmt: skip


def _measured(
    params: np.ndarray, samples: np.ndarray, flops: np.ndarray, flops_per: float | None
) -> Cost:  # fmt: skip
    """The cost where the table gives C, N and D. Raises ValueError where --flops-per says something else."""
    ratio = flops / (params * samples)
    middle = float(np.median(ratio[flops >= np.median(flops)]))
    if flops_per is not None and abs(flops_per / middle - 1) > CONSTANT:
        raise ValueError(
            f"--flops-per {flops_per:g}: the table's own C / (N D) is {middle:.4g} (median over the larger half of the "
            "compute); leave out --flops-per, or one of --flops and --samples"
        )
    return fit_cost(params, samples, flops, middle)


def _require(path: Path, header: list[str], name: str | None, flag: str) -> None:
    if name is not None and name not in header:
        lower = {column.lower(): column for column in header}
        near = difflib.get_close_matches(name.lower(), lower, 1, 0.5)
        perhaps = f" Perhaps {lower[near[0]]!r}." if near else ""
        raise ValueError(f"{path}: {flag}: no column {name!r}.{perhaps} Its columns: {', '.join(header)}")


def _meet(
    path: Path, header: list[str], rows: list[tuple[int, list[str]]], where: Sequence[str]
) -> tuple[list[tuple[int, list[str]]], dict[str, int]]:
    """Rows that meet the conditions, without exact copies."""
    dropped: dict[str, int] = {}
    for condition in where:
        name, equals, value = condition.partition("=")
        if not equals:
            raise ValueError(f"--where {condition}: expected COLUMN=VALUE")
        _require(path, header, name, "--where")
        place = header.index(name)
        met = [(line, row) for line, row in rows if _same(row[place], value)]
        if not met:
            seen = ", ".join(sorted({row[place] for _, row in rows})[:8])
            raise ValueError(f"--where {condition}: no row has it; {name} holds {seen}")
        if len(met) < len(rows):
            dropped[f"not {condition}"] = len(rows) - len(met)
        rows = met
    single = {tuple(row): (line, row) for line, row in reversed(rows)}
    if len(single) < len(rows):
        dropped["exact copies of another row"] = len(rows) - len(single)
    return sorted(single.values()), dropped


def _same(cell: str, value: str) -> bool:
    return cell.strip() == value.strip() or number(cell) == number(value)


def _column(
    path: Path, header: list[str], rows: list[tuple[int, list[str]]], name: str, field_name: str
) -> np.ndarray:
    place = header.index(name)
    refuse_decimal_commas(path, [(line, row[place].strip().strip("$%").strip()) for line, row in rows], name, field_name)
    values = np.array([number(row[place]) for _, row in rows])
    if len(values) and np.isnan(values).all():
        shown = ", ".join(repr(row[place]) for _, row in rows[:3])
        raise ValueError(
            f"{path}: --{field_name.replace('_', '-')}: not one cell of {name!r} is a number; it holds {shown}"
        )
    return values


def _faults(
    cells: dict[str, np.ndarray], columns: Columns, labels: list[str]
) -> list[tuple[str, np.ndarray]]:
    """(reason, rows), in the order in which a row is judged."""
    loss = cells["loss"]
    faults = [
        (f"{columns.loss} missing or NaN (diverged, or not finished)", np.isnan(loss)),
        (f"{columns.loss} infinite (diverged)", np.isinf(loss)),
        (f"{columns.loss} zero or negative", loss <= 0),
    ]
    for name in ("params", "samples", "flops", "unique", "budget", "lr", "also_params", "sigma"):
        if name in cells:
            column = getattr(columns, name)
            faults.append((f"{column} missing or no number", ~np.isfinite(cells[name])))
            faults.append((f"{column} zero or negative", cells[name] <= 0))
    if columns.cluster is not None:
        missing = np.array([not label for label in labels], dtype=bool)
        faults.append((f"{columns.cluster} missing", missing))
    return faults
