"""What a check found, with its number."""

from collections.abc import Sequence
from typing import NamedTuple


class Finding(NamedTuple):
    """`value` was measured, `limit` is where the check speaks. A finding that refuses keeps `predict` from planning."""

    check: str
    value: float
    limit: float
    text: str
    refuses: bool = False


def split(findings: Sequence[Finding]) -> tuple[list[Finding], list[Finding]]:
    """Warnings, refusals."""
    return [f for f in findings if not f.refuses], [f for f in findings if f.refuses]


def as_json(finding: Finding) -> dict[str, str | float]:
    """For the file: check, value, limit, text."""
    return {"check": finding.check, "value": finding.value, "limit": finding.limit, "text": finding.text}
