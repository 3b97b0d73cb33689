"""The one place where a Result is made: coefficients, draws and findings of any form, and what the table was."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfsup.scaling.bootstrap import intervals
from selfsup.scaling.finding import Finding, split
from selfsup.scaling.isoflop import Isoflop
from selfsup.scaling.result import Result, findings_json, loss_at
from selfsup.scaling.table import Runs

LEVEL = 0.95
SCALES = (1e-30, 1e60)
"""Numbers of parameters, samples and FLOPs that a fit takes; beyond them powers overflow."""


def make_result(
    form: str, runs: Runs, values: Mapping[str, float], exponents: dict[str, float], objective: float | None,
    findings: Sequence[Finding], draws: Mapping[str, np.ndarray], extrapolation: dict[str, Any] | None,
    at: dict[str, float], facts: dict[str, Any],
    ends: Mapping[str, Any] | None = None, curves: Isoflop | None = None,
) -> Result:  # fmt: skip
    """A Result; its anchor is `at`, `ends` are the intervals where they are not the draws', `facts` join `about`.

    Raises ValueError where a coefficient, or the loss predicted at the anchor, is not finite.
    """
    loss = float(loss_at(form, dict(values), **{name: np.asarray(value) for name, value in at.items()}))
    for name, value in {**values, "the loss of the largest run": loss}.items():
        if not np.isfinite(value):
            raise ValueError(
                f"--form {form}: the fit has no finite {name} ({value}): the losses ({runs.loss.min():.4g} to "
                f"{runs.loss.max():.4g}) do not determine this law; look at the table, or take another form"
            )
    warnings, refused = split(findings)
    if ends is None:
        ends = intervals(draws, LEVEL) if draws else {}
    kept = {name: drawn.tolist() for name, drawn in draws.items() if name in values}
    return Result(
        form, dict(values), exponents, dict(ends), objective, extrapolation, findings_json(warnings),
        findings_json(refused), {**_about(runs), **facts}, {**at, "loss": loss}, kept,
        [] if curves is None else _profiles(curves), _rows(runs),
    )  # fmt: skip


def refuse_scales(runs: Runs) -> None:
    """Raises ValueError for a size or an amount of data or compute that no run has, and whose powers overflow."""
    for name in ("params", "samples", "flops"):
        values = getattr(runs, name)
        bad = (values < SCALES[0]) | (values > SCALES[1])
        if bad.any():
            worst = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"line {runs.line[worst]}: {name} is {values[worst]:.3g}: expected {SCALES[0]:g} to {SCALES[1]:g}; "
                "mend the row or leave it out with --where"
            )


def isoflop_facts(curves: Isoflop) -> dict[str, Any]:
    """How many budgets the curves have, and what they left out: for the screen, the file and the report."""
    return {"budgets": len(curves.profiles), "left_out": curves.skipped}


def residual_spread(runs: Runs, predicted: np.ndarray) -> float:
    """Robust standard deviation (1.4826 times the median size) of the residuals of log loss."""
    return 1.4826 * float(np.median(np.abs(np.log(runs.loss) - np.log(predicted))))


def largest_run(runs: Runs, names: Sequence[str] = ("params", "samples")) -> dict[str, float]:
    """These columns of the run of most compute: where a law has its anchor."""
    last = int(runs.flops.argmax())
    return {name: float(getattr(runs, name)[last]) for name in names}


def _about(runs: Runs) -> dict[str, Any]:
    """The rows that were used, those that were not and why, and their ranges."""
    ranges = {
        name: [float(getattr(runs, name).min()), float(getattr(runs, name).max())]
        for name in ("params", "samples", "flops", "loss")
    }
    return {
        "rows_read": runs.read, "rows_used": len(runs), "dropped": runs.dropped, "runs": int(runs.cluster.max()) + 1,
        "clustered": runs.clustered, "cost": list(runs.cost), "ranges": ranges,
        "weights": None if runs.sigma is None else [float(runs.weights.min()), float(runs.weights.max())],
    }  # fmt: skip


def _profiles(found: Isoflop) -> list[dict[str, Any]]:
    """The isoFLOP curves, for pictures."""
    rows = []
    for curve in found.profiles:
        row = curve._asdict()
        row.update({name: row[name].tolist() for name in ("params", "loss", "samples")})
        rows.append(row)
    return rows


def _rows(runs: Runs) -> dict[str, list[float]]:
    """The rows that were fitted, for pictures."""
    names = ("params", "samples", "flops", "loss") + (("unique",) if runs.unique is not None else ())
    return {name: getattr(runs, name).tolist() for name in names}
