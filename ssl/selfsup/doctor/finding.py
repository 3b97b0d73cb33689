"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    state: Literal["ok", "warning", "problem"]
    text: str
    fix: str = ""
    """What to do; empty where all is well."""


def one_line(error: BaseException) -> str:
    """Kind and message of an error, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
