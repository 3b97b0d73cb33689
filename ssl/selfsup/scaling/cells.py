"""The cells of a file of runs, and what numbers they hold: read exactly, or refused with one line."""

import csv
import io
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

_SUFFIX = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_MISSING = {"", "na", "n/a", "nan", "none", "null", "-", "--", "?"}
_NUMBER = re.compile(
    r"([+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*([kmbgt]?)", re.IGNORECASE
)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_ONE_COMMA = re.compile(r"[+-]?\d*,\d+(?:e[+-]?\d+)?\s*[kmbgt]?", re.IGNORECASE)
"""3,215 may be 3215 or 3.215."""
_DECIMAL = ("loss", "lr", "initial_loss")
"""Columns whose numbers have decimals; the others are counts."""


def number(text: str) -> float:
    """A cell as a number: 1.5e9, 1,500,000, 125M, 1.4B, 2T; nan where it is missing or no number.

    Infinity stays infinite."""
    text = text.strip().strip("$%").strip()
    if text.lower() in _MISSING:
        return math.nan
    found = _NUMBER.fullmatch(text)
    if found is None:
        try:
            return float(text)  # inf
        except ValueError:
            return math.nan
    return float(found[1].replace(",", "").replace("_", "")) * _SUFFIX.get(found[2].lower(), 1.0)


def read_cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and (line, cells) of every row that is not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text"
        raise ValueError(f"{path}: cannot read the table: {reason}") from None
    first = text.lstrip("\r\n").partition("\n")[0].strip("\r")
    delimiter = max(",\t;", key=first.count)
    found = _cells(path, text, delimiter)
    if len(found) < 2:
        raise ValueError(f"{path}: expected a header and rows, got {len(found)} lines")
    header = [name.strip() for name in found[0][1]]
    if first.startswith("#") and len(header) != len(found[1][1]):
        raise ValueError(
            f"{path}: its first line is a comment ({first[:40]}); the header must come first: delete the lines above it"
        )
    if len(header) < 2:
        other = next((f"{mark!r}" for mark in "|:" if mark in first), "spaces" if " " in first.strip() else "")
        seems = f"; its cells seem to be separated by {other}" if other else ""
        raise ValueError(
            f"{path}: expected cells separated by commas, tabs or semicolons, found none of them in {first[:40]!r}{seems}"
        )
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        raise ValueError(f"{path}: the column {twice[0]!r} is there twice; give the columns different names")
    for line, row in found[1:]:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: {len(row)} cells, the header has {len(header)}")
        comma = [cell for cell in row if delimiter == ";" and _DECIMAL_COMMA.fullmatch(cell.strip())]
        if comma:
            raise ValueError(f"{path}, line {line}: {comma[0].strip()}: write decimal points, not commas")
    return header, found[1:]


def _cells(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """(line on which it begins, cells) of each row that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found, line = [], 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                found.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line}: cannot be read as cells ({error}): is a quote left open there?"
        ) from None
    return found


def refuse_decimal_commas(path: Path, cells: list[tuple[int, str]], name: str, field_name: str) -> None:
    """Raises ValueError where a comma may be a decimal one: read as thousands, 3,215 would be 3215 in silence."""
    doubtful = [(line, cell) for line, cell in cells if _ONE_COMMA.fullmatch(cell)]
    thousands = any("," in cell and not _ONE_COMMA.fullmatch(cell) and number(cell) > 0 for _, cell in cells)
    sure = [(line, cell) for line, cell in doubtful if np.isnan(number(cell)) or cell.lstrip("+-")[0] == "0"]
    if sure or (doubtful and (field_name in _DECIMAL or not thousands)):
        line, cell = (sure or doubtful)[0]
        raise ValueError(
            f"{path}, line {line}: {name}: {cell}: write decimal points, not commas, and no commas between thousands"
        )
