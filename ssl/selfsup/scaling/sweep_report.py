"""A sweep beside its fit: what the design expected and what was found, the held-out runs, the cells without a loss."""

import json
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.scaling.cost import Cost
from selfsup.scaling.design import pooled_spread
from selfsup.scaling.predict import predict_run
from selfsup.scaling.report import html_table
from selfsup.scaling.result import Result

Rows = list[tuple[str, ...]]
UNIDENTIFIED = (
    "few runs", "few sizes", "few amounts of data", "few clusters", "few budgets", "one ratio", "narrow ratio",
    "minimum on the edge", "approaches", "loose exponent", "loose E", "E at zero", "E above the losses",
    "exponent at bound", "odd exponent", "no dependence", "condition", "no extrapolation", "seed noise",
)  # fmt: skip
"""Checks that say what the runs leave open; the others doubt the runs themselves, or the way from runs to law."""


@dataclass(frozen=True)
class Summary:
    """Tables of text with a header each, and one sentence that says what the sweep is worth."""

    command: str
    states: str
    expected: Rows
    held_out: Rows
    rates: Rows
    without_loss: Rows
    unidentified: list[str]
    verdict: str


def summarise(result: Result, folder: Path) -> Summary:
    """Reads the plan and the states of a sweep's folder.

    Raises ValueError for another folder, for a fit of another form than one of N and D, and for a fit of other runs.
    """
    if result.form not in ("chinchilla", "tied", "kaplan"):
        raise ValueError(f"--sweep: expected a fit of form chinchilla, tied or kaplan, got {result.form}")
    plan, states = _read(folder, "plan.json"), _read(folder, "state.json")
    cells = list(states.values())
    ours = {(float(c["cell"]["params"]), float(c["cell"]["samples"])) for c in cells}
    theirs = set(zip(map(float, result.rows["params"]), map(float, result.rows["samples"])))
    if not theirs <= ours:
        raise ValueError(
            f"--sweep {folder}: the fit has runs that are not of this sweep ({len(theirs - ours)}); fit its results.csv"
        )
    held, errors, inside = _held_out(result, cells)
    lost: Rows = [("cell", "role", "size", "FLOPs", "state", "reason")]
    for state in cells:
        if state["state"] != "done":
            cell = state["cell"]
            lost.append((cell["id"], cell["role"], cell["size"], f"{cell['flops']:.3g}", state["state"], state["reason"]))
    rates, best = _rates(cells)
    counts = Counter(state["state"] for state in cells)
    verdict = "The fit is refused as a ground for plans: " + ", ".join(f["check"] for f in result.refused) + "."
    if not result.refused:
        verdict = "The fit is not refused."
    if errors:
        verdict += (
            f" It foretold {len(errors)} held-out runs with a mean error of {np.mean(errors):.2%} (largest "
            f"{np.max(errors):.2%}); {inside} of them lie within the law's 95% intervals."
        )
    if best:
        verdict += (
            f" The rule's learning rate was the best of those tried at {sum(best)} of {len(best)} sizes"
            f"{'' if all(best) else ': the law is of that rule'}."
        )
    return Summary(
        plan["command"], ", ".join(f"{count} {state}" for state, count in counts.items()),
        [*_expected(result, plan), *_noise(cells, plan)], held, rates, lost, unidentified(result), verdict,
    )  # fmt: skip


def unidentified(result: Result) -> list[str]:
    """What the fit's runs leave open: a sentence each, what refuses it first, then unbounded coefficients."""
    said = [f"{found['check']}: {found['text']}" for found in [*result.refused, *result.warnings]
            if found["check"] in UNIDENTIFIED]  # fmt: skip
    for name in (*result.coefficients, *result.exponents):
        ends = result.intervals.get(name)
        if ends is None:
            said.append(f"{name}: has no interval")
        elif ends[0] is None or ends[1] is None:
            said.append(f"{name}: its interval has no {'lower' if ends[0] is None else 'upper'} end")
    return said


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"--sweep {folder}: has no readable {name}; expected a folder of selfsup scaling run") from None


def _expected(result: Result, plan: dict[str, Any]) -> Rows:
    """The design's intervals beside the fit's."""
    expected = plan["expected"]
    low, high = expected["a_interval"]
    found = result.intervals.get("a")
    rows: Rows = [("", "the design expected", "the fit found", "width, of the expected")]
    rows.append(("exponent a", f"{low:.3f} to {high:.3f}", _ends(found, ".3f"), _share(found, high - low)))
    params = float(expected["params"])
    per = float(Cost(*result.about["cost"]).per(params))
    at = predict_run(result, params, expected["target"] / per / params).values["loss"]
    low, high = expected["loss_interval"]
    name = f"loss at {expected['target']:.3g} FLOPs, N = {params:.3g}"
    rows.append((name, f"{low:.4g} to {high:.4g}", _ends(at[1:], ".4g"), _share(at[1:], high - low)))
    return rows


def _ends(ends: list[float | None] | None, how: str) -> str:
    if ends is None or ends[0] is None or ends[1] is None:
        return "-"
    return f"{ends[0]:{how}} to {ends[1]:{how}}"


def _share(ends: list[float | None] | None, width: float) -> str:
    if ends is None or ends[0] is None or ends[1] is None or width <= 0:
        return "-"
    return f"{(ends[1] - ends[0]) / width:.2g}"


def _held_out(result: Result, cells: list[dict[str, Any]]) -> tuple[Rows, list[float], int]:
    """Each held-out run: measured, predicted, whether its interval holds it; the errors; how many are held."""
    rows: Rows = [("held-out run", "FLOPs", "measured", "predicted", "95%", "error")]
    errors, inside = [], 0
    for state in cells:
        cell = state["cell"]
        if cell["role"] != "hold-out" or state["state"] != "done" or not state["planned"]:
            continue
        loss = state["result"]["loss"]
        value, low, high = predict_run(result, cell["params"], cell["samples"]).values["loss"]
        errors.append(abs(value / loss - 1))
        inside += low is not None and high is not None and low <= loss <= high
        rows.append((
            cell["size"], f"{cell['flops']:.3g}", f"{loss:.4f}", f"{value:.4f}", _ends([low, high], ".4f"),
            f"{value / loss - 1:+.2%}",
        ))  # fmt: skip
    return rows, errors, int(inside)


def _noise(cells: list[dict[str, Any]], plan: dict[str, Any]) -> Rows:
    """The scatter of log loss between seeds, of the plan's cells that differ by nothing else, beside what it believed."""
    names, losses = [], []
    for state in cells:
        cell = state["cell"]
        if state["state"] == "done" and state["planned"] and cell["role"] in ("grid", "repeat"):
            same = {key: value for key, value in cell["recipe"].items() if key not in ("seed", "run")}
            names.append(json.dumps(same, sort_keys=True))
            losses.append(state["result"]["loss"])
    found, freedom = pooled_spread(np.log(losses), np.unique(names, return_inverse=True)[1])
    if not freedom:
        return []
    believed = plan["expected"]["noise"]
    name = f"noise of log loss ({freedom} degrees of freedom)"
    return [(name, f"{believed:g}", f"{found:.2g}", f"{found / believed:.2g}")]


def _rates(cells: list[dict[str, Any]]) -> tuple[Rows, list[bool]]:
    """The losses of sizes that were tried at other learning rates, by rate; whether the rule's was best at each, where
    it and another have a loss."""
    planned = [state for state in cells if state["planned"]]
    rows: Rows = [("size", "FLOPs", "learning rate", "of the rule's", "loss")]
    best = []
    for own in (state for state in planned if state["cell"]["role"] == "grid"):
        key = [own["cell"][name] for name in ("size", "steps", "seed")]
        tried = [
            s for s in planned if s["cell"]["role"] == "probe" and [s["cell"][n] for n in ("size", "steps", "seed")] == key
        ]
        for state in sorted([own, *tried], key=_lr) if tried else ():
            cell = state["cell"]
            share = cell["lr"] / own["cell"]["lr"]
            loss = f"{state['result']['loss']:.4f}" if state["state"] == "done" else state["state"]
            rows.append((cell["size"], f"{cell['flops']:.3g}", f"{cell['lr']:.3g}", f"{share:.3g}", loss))
        losses = [state["result"]["loss"] for state in tried if state["state"] == "done"]
        if own["state"] == "done" and losses:
            best.append(own["result"]["loss"] <= min(losses))
    return rows, best


def _lr(state: dict[str, Any]) -> float:
    return state["cell"]["lr"]


def sections(summary: Summary) -> list[str]:
    """The summary as parts of the report's page."""
    parts = [
        f"<h2>The sweep</h2><p>{escape(summary.states)}. {escape(summary.verdict)}</p>",
        f"<pre>{escape(summary.command)}</pre>",
        html_table(summary.expected),
    ]
    if len(summary.held_out) > 1:
        parts.append(html_table(summary.held_out))
    if len(summary.rates) > 1:
        parts.append(f"<h3>Other learning rates</h3>{html_table(summary.rates)}")
    gaps = "".join(f"<li>{escape(text)}</li>" for text in summary.unidentified) or "<li>nothing that is checked</li>"
    parts.append(f"<h3>Not identified</h3><ul>{gaps}</ul>")
    if len(summary.without_loss) > 1:
        parts.append(f"<h3>Cells without a loss</h3>{html_table(summary.without_loss)}")
    return parts


def lines(summary: Summary) -> list[str]:
    """The summary as text."""
    found = [f"sweep: {summary.states}"]
    for rows in (summary.expected, summary.held_out, summary.rates, summary.without_loss):
        if len(rows) > 1:
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            found += ["", *("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)]
    left = [f"  - {text}" for text in summary.unidentified] or ["  nothing that is checked"]
    return [*found, "", "not identified:", *left, "", summary.verdict]
