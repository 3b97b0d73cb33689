"""A fitted law as a file: everything that `predict` and `report` need, and the checks that keep it honest."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.durable import write_atomically
from selfsup.scaling import law
from selfsup.scaling.cost import Cost
from selfsup.scaling.finding import Finding, as_json
from selfsup.scaling.fit import exponents, predict

VERSION = 1


@dataclass(frozen=True)
class Result:
    """One law of one table.

    coefficients: by name, unrounded. exponents: a, b of the compute-optimal N and D (empty for bnsl).
    intervals: {name: [low, high, level]}; None for an end that is not bounded. objective: None for isoflop.
    draws: coefficients of each resample. extrapolation: errors on held-out larger runs beside a naive
    baseline, or None. about: the table, rows, what was dropped, ranges, settings. profiles and rows: what
    pictures show. anchor: N, D and the loss predicted there, to notice edited files.
    """

    form: str
    coefficients: dict[str, float]
    exponents: dict[str, float]
    intervals: dict[str, list[float | None]]
    objective: float | None
    extrapolation: dict[str, Any] | None
    warnings: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    about: dict[str, Any]
    anchor: dict[str, float]
    draws: dict[str, list[float]] = field(default_factory=dict)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, list[float]] = field(default_factory=dict)

    def values(self) -> dict[str, np.ndarray]:
        """The draws as arrays, (R,) each; without any, the coefficients alone."""
        source = self.draws or {name: [value] for name, value in self.coefficients.items()}
        return {name: np.array(value, dtype=np.float64) for name, value in source.items()}


def findings_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [as_json(finding) for finding in findings]


def write_result(result: Result, path: Path) -> None:
    """Raises ValueError where the file cannot be written."""
    content = {"version": VERSION, **asdict(result)}
    content["draws"] = {
        name: [float(f"{value:.8g}") for value in values] for name, values in result.draws.items()
    }
    write_json(content, path)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Strict JSON: what is not finite becomes null. Raises ValueError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(_finite(content), indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise ValueError(f"--json {path}: cannot write it: {error.strerror or error}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_result(path: Path) -> Result:
    """A file that `selfsup scaling fit --json` wrote.

    Raises ValueError for another file, and where its coefficients no longer predict what they did: rounded or
    retyped coefficients drift (Hoffmann et al.'s printed ones raise the objective more than threefold).
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ValueError(f"--fit {path}: cannot read the fit: {reason}") from None
    names = {name for name in Result.__dataclass_fields__}
    if not isinstance(content, dict) or content.get("version") != VERSION or not names <= content.keys():
        raise ValueError(
            f"--fit {path}: not a fit; expected what selfsup scaling fit TABLE ... --json OUT writes"
        )
    result = Result(**{name: content[name] for name in names})
    try:
        _verify(result, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--fit {path}: a part is missing or has another type ({error}); write the fit again"
        ) from None
    return result


def _verify(result: Result, path: Path) -> None:
    anchor, values = result.anchor, result.coefficients
    Cost(*result.about["cost"])
    found = loss_at(result.form, values, **{key: anchor[key] for key in anchor if key != "loss"})
    if not abs(found / anchor["loss"] - 1) < 1e-6:
        raise ValueError(
            f"--fit {path}: its coefficients were edited or rounded: at its anchor they predict {found:.6g}, the fit "
            f"predicted {anchor['loss']:.6g}; write the fit again"
        )
    if result.form in ("chinchilla", "tied", "kaplan"):
        a = float(exponents(result.form, values)[0])
        if not abs(a - result.exponents["a"]) < 1e-6:
            raise ValueError(
                f"--fit {path}: exponents.a is {result.exponents['a']}, its coefficients give {a}; write it again"
            )


def loss_at(form: str, values: dict[str, Any], **at: Any) -> Any:
    """The loss that the coefficients of any form predict at params, samples (and unique), or flops, or x."""
    if form == "bnsl":
        return law.broken(**values, x=at["x"])
    if form == "isoflop":
        return values["L0"] * np.power(at["flops"], values["c"])
    if form == "repeats":
        base = {name: values[name] for name in law.CHINCHILLA}
        return law.repeats(base, values["R_D"], values["R_N"], at["params"], at["samples"], at["unique"])
    return predict(form, values, at["params"], at["samples"])
