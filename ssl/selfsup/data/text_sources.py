"""Documents from text files, JSONL and folders of either, on their way into shards.

A first pass over the source finds where every document lies and what is wrong with it; its text is read
when its shard is written. So only places are held in memory, some hundred bytes a document.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from selfsup.data.pack import PackReport, Plan, Sample, class_folders, find_files, make_key, pack_plan
from selfsup.data.shard import LARGEST_SAMPLE

Documents = Literal["file", "paragraph"]

TEXT_FILES = ("txt", "md", "rst")
JSON_LINES = "jsonl"

_PLAN_VERSION = 1
_MOST_NAMED = 20
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Passage(NamedTuple):
    """A stretch of a file."""

    path: Path
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.path} (bytes {self.start} to {self.stop})"

    def read_bytes(self) -> bytes:
        """Its text in UTF-8."""
        return as_utf8(_read(self.path, self.start, self.stop))[0]


class Line(NamedTuple):
    """A line of a JSONL file."""

    path: Path
    number: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"

    def read_bytes(self) -> bytes:
        """Its text in UTF-8. Raises ValueError where it has changed since and cannot be read any more."""
        return parse_line(_read(self.path, self.start, self.stop)).text


class Parsed(NamedTuple):
    """What a line of JSON says."""

    text: bytes
    label: int | str | None
    bad: int
    """Places that were not UTF-8."""


@dataclass
class _Found:
    """What the first pass collects."""

    places: list[Passage | Line] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: list[int | str | None] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    """File -> places that are not UTF-8."""
    broken: list[str] = field(default_factory=list)
    empty: int = 0

    def add(self, place: Passage | Line, key: str, label: int | str | None, text: bytes) -> None:
        if len(text) > LARGEST_SAMPLE:
            raise ValueError(
                f"{place}: a document of {len(text)} bytes is refused, expected at most {LARGEST_SAMPLE}; split "
                "it, where it has blank lines with: --documents paragraph"
            )
        if not text.decode().strip():
            self.empty += 1
            return
        self.places.append(place)
        self.keys.append(key)
        self.labels.append(label)


def as_utf8(data: bytes) -> tuple[bytes, int]:
    """The bytes with whatever is not UTF-8 replaced by U+FFFD, and how often that was done."""
    try:
        data.decode()
        return data, 0
    except UnicodeDecodeError:
        fixed = data.decode(errors="replace").encode()
        mark = "\ufffd".encode()
        return fixed, fixed.count(mark) - data.count(mark)


def parse_line(line: bytes) -> Parsed:
    """A JSONL line with a `text` and perhaps a `label`, a whole number >= 0 or a name (-1 and null: none).

    Raises ValueError for anything else.
    """
    fixed, bad = as_utf8(line)
    try:
        content = json.loads(fixed)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("text"), str):
        raise ValueError('expected a JSON object with a string named "text"')
    label = content.get("label")
    whole = isinstance(label, int) and not isinstance(label, bool) and -1 <= label < 10**18
    if not (label is None or isinstance(label, str) or whole):
        raise ValueError(f"label: expected a whole number >= 0 or a name, got {json.dumps(label)[:40]}")
    text, lone = _SURROGATE.subn("\ufffd", content["text"])
    return Parsed(text.encode(), None if label == -1 else label, bad + lone)


def pack_text(
    source: str | Path,
    dest: str | Path,
    samples_per_shard: int = 5000,
    processes: int = 1,
    documents: Documents = "file",
) -> PackReport:
    """Packs text into `dest/shard-000000.tar ...` (members KEY.txt and KEY.cls) and indexes the shards.

    source: a .txt, .md or .rst file; a .jsonl file, a document a line; or a folder of text files, whose
    sub-folders are classes, or of JSONL files. documents: what a text file holds, one document or several
    with blank lines between. Bytes that are not UTF-8 become U+FFFD; empty documents and broken lines are
    left out; all are counted and named. Raises ValueError for a missing or empty source, labels that are
    names here and numbers there, and as `pack` does.
    """
    source, dest = Path(source).expanduser(), Path(dest).expanduser()
    return pack_plan(plan_text(source, documents), dest, samples_per_shard, processes)


def plan_text(source: Path, documents: Documents) -> Plan:
    """What `pack_text` packs: the first pass. Raises ValueError as `pack_text`."""
    files, classes, labels, notes = _sources(source)
    if documents != "file" and _extension(files[0]) == JSON_LINES:
        raise ValueError(f"documents: {source} holds JSONL, a document a line; leave it out")
    root = source if source.is_dir() else source.parent
    found, taken = _Found(), set()
    stamps: list[list] = [["text", _PLAN_VERSION, documents]]
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, desc="read", unit="B", unit_scale=True, disable=None) as bar:
        for file, label in zip(files, labels):
            path, status = file.relative_to(root), file.stat()
            stamps.append([str(path), status.st_size, status.st_mtime_ns])
            key = make_key(path, taken)
            if _extension(file) == JSON_LINES:
                _find_lines(file, key, found)
            elif documents == "paragraph":
                _find_paragraphs(file, key, label, found)
            else:
                data = _read(file, 0, min(status.st_size, LARGEST_SAMPLE + 1 + len(_BOM)))
                start = len(_BOM) * data.startswith(_BOM)
                text, bad = as_utf8(data[start:])
                found.bad[str(file)] += bad
                found.add(Passage(file, start, len(data)), key, label, text)
            bar.update(status.st_size)
    numbers, names = _numbered(found, classes)
    samples = [
        Sample(key, "txt", number, place) for key, number, place in zip(found.keys, numbers, found.places)
    ]
    return Plan(samples, stamps, names, [*notes, *_notes(found)], _left_out(found), "documents")


def _sources(source: Path) -> tuple[list[Path], list[str], list[int], list[str]]:
    """The files to read, the names of class folders, the label of each file (-1: none), and notes."""
    wanted = (*TEXT_FILES, JSON_LINES)
    if source.is_file():
        if _extension(source) not in wanted:
            raise ValueError(f"{source}: expected a .txt, .md, .rst or .jsonl file (unpacked), or a folder of them")
        return [source], [], [-1], []
    files, others = find_files(source, wanted)
    lines = [file for file in files if _extension(file) == JSON_LINES]
    notes = []
    if lines and len(lines) < len(files):
        notes.append(f"note: {len(files) - len(lines)} text files in {source} stand beside JSONL files: left alone")
    if others:
        notes.append(f"note: {others} files in {source} are not .txt, .md, .rst or .jsonl: left alone")
    if lines:
        return lines, [], [-1] * len(lines), notes
    names, labels = class_folders(source, files)
    if names and -1 in labels:
        notes.append(f"note: {labels.count(-1)} files in {source} itself, outside the class folders, get no label")
    return files, names, labels, notes


def _find_lines(file: Path, key: str, found: _Found) -> None:
    for number, (start, line) in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        place = Line(file, number, start, start + len(line))
        try:
            parsed = parse_line(line)
        except ValueError as error:
            found.broken.append(f"{place}: {error}")
            continue
        found.bad[str(file)] += parsed.bad
        found.add(place, f"{key}/{number:08d}", parsed.label, parsed.text)


def _find_paragraphs(file: Path, key: str, label: int, found: _Found) -> None:
    number = start = 0
    held: list[bytes] = []
    for begin, line in chain(_lines(file), [(0, b"")]):
        if line.strip():
            start = start if held else begin
            held.append(line)
        elif held:
            number += 1
            data = b"".join(held).rstrip(b"\r\n")
            text, bad = as_utf8(data)
            found.bad[str(file)] += bad
            found.add(Passage(file, start, start + len(data)), f"{key}/{number:08d}", label, text)
            held.clear()


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and its bytes; a byte order mark at the start of the file is none of them."""
    with open(file, "rb") as opened:
        at = 0
        for line in opened:
            skip = len(_BOM) * (at == 0 and line.startswith(_BOM))
            yield at + skip, line[skip:]
            at += len(line)


def _numbered(found: _Found, classes: list[str]) -> tuple[list[int], list[str]]:
    """Labels as numbers, and the names of classes: of folders, or the sorted names that JSONL gives."""
    kinds = {type(label): place for label, place in zip(found.labels, found.places) if label not in (None, -1)}
    if {int, str} <= kinds.keys():
        raise ValueError(
            f"label: expected names everywhere or numbers everywhere, got a name in {kinds[str]} and a number in "
            f"{kinds[int]}"
        )
    names = sorted({label for label in found.labels if isinstance(label, str)}) or classes
    place = {name: i for i, name in enumerate(names)}
    return [-1 if x is None else place[x] if isinstance(x, str) else x for x in found.labels], names


def _notes(found: _Found) -> list[str]:
    bad = [(file, count) for file, count in found.bad.items() if count]
    notes = [f"note: {file}: {count} places are not UTF-8: replaced by U+FFFD" for file, count in bad]
    notes += [f"left out: {fault}" for fault in found.broken[:_MOST_NAMED]]
    if len(found.broken) > _MOST_NAMED:
        notes.append(f"left out: {len(found.broken) - _MOST_NAMED} more broken lines")
    if found.empty:
        notes.append(f"left out: {found.empty} empty documents")
    return notes


def _left_out(found: _Found) -> dict[str, int]:
    counts = {"empty documents": found.empty, "broken lines of JSON": len(found.broken)}
    return {reason: count for reason, count in counts.items() if count}


def _read(path: Path, start: int, stop: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()
