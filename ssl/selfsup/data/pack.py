"""Samples into WebDataset shards: verified one by one, shuffled once, in parallel, resumable. Here: images.

Samples are put in a fixed random order before they are cut into shards, so that every shard mixes
all classes and a sequential reader does not see one class after another. Bytes are kept as they
are, and equal input makes equal shards, byte by byte.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from selfsup.data.decode import decode_image
from selfsup.data.index import (
    CLASSES_NAME,
    INDEX_NAME,
    PLAN_NAME,
    ShardIndex,
    build_index,
    open_shards,
    save_index,
)
from selfsup.data.order import sample_order
from selfsup.data.shard import IMAGE_EXTENSIONS, META_MEMBER, TEXT_EXTENSIONS, fork_or_spawn
from selfsup.durable import fsync_path, write_atomically

PACK_VERSION = 1


class Stored(Protocol):
    """Where bytes are: a Path is one. `str` names the place."""

    def read_bytes(self) -> bytes: ...


class Sample(NamedTuple):
    """An image or a document to be packed."""

    key: str
    extension: str
    """txt for a document."""
    label: int
    """-1 for none."""
    content: bytes | Stored
    """The encoded image or the UTF-8 text, or what holds it."""


class Plan(NamedTuple):
    """What is to be packed."""

    samples: list[Sample]
    stamps: list[list]
    """Everything the shards depend on: equal stamps make equal shards."""
    classes: list[str]
    notes: list[str]
    """What the user is told beside the numbers."""
    left_out: dict[str, int]
    """Why and how often something in the source is not among the samples."""
    what: str = "images"


@dataclass(frozen=True)
class PackReport:
    """What `pack` did. `str(report)` is the text for the user."""

    index: ShardIndex
    kept_shards: int
    """Finished by an earlier run and kept."""
    corrupt: tuple[str, ...]
    """Planned samples left out, each with the reason."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        index = self.index
        lines = [*self.notes, *(f"left out: {name}" for name in self.corrupt)]
        kept = f" ({self.kept_shards} kept from before)" if self.kept_shards else ""
        classes = f", {len(index.classes)} classes" if index.classes else ""
        left_out = f"; {len(self.corrupt)} corrupt left out" if self.corrupt else ""
        total = f"{len(index)} {index.what}{classes} in {len(index.shards)} shards{kept}{left_out}: {index.folder}"
        return "\n".join([*lines, total])


def pack(
    source: str | Path, dest: str | Path, samples_per_shard: int = 5000, processes: int = os.cpu_count() or 1
) -> PackReport:
    """Packs a folder of JPEG, PNG and WebP images into `dest/shard-000000.tar ...` and indexes them.

    Sub-folders of `source` are classes (numbered by name; deeper folders belong to the first);
    images directly in `source` have no label. Symbolic links to folders are followed. An image
    that cannot be decoded is reported by name and left out. A run that was interrupted goes on
    where it stopped. Raises ValueError for a missing or empty folder, for one without a single
    decodable image, and where `dest` holds shards of something else.
    """
    source, dest = Path(source).expanduser(), Path(dest).expanduser()
    if source.is_file():
        raise ValueError(f"{source}: expected a folder of images, got the file")
    files, others = find_files(source, IMAGE_EXTENSIONS)
    names, labels = class_folders(source, files)
    samples, stamps, taken = [], [], set()
    for file, label in zip(files, labels):
        path = file.relative_to(source)
        samples.append(Sample(make_key(path, taken), path.suffix[1:].lower(), label, file))
        status = file.stat()
        stamps.append([str(path), status.st_size, status.st_mtime_ns])
    notes = []
    if names and -1 in labels:
        notes.append(f"note: {labels.count(-1)} images in {source} itself, outside the class folders, get no label")
    if others:
        notes.append(f"note: {others} files in {source} are not .jpg, .jpeg, .png or .webp: left alone")
    return pack_plan(Plan(samples, stamps, names, notes, {}), dest, samples_per_shard, processes)


def pack_samples(
    samples: list[Sample], classes: list[str], dest: str | Path, samples_per_shard: int = 5000
) -> PackReport:
    """Packs encoded images, or texts, held in memory; otherwise as `pack`. Keys must differ and have no dot."""
    stamps = [[s.key, s.extension, s.label, hashlib.sha256(s.content).hexdigest()] for s in samples]
    what = "documents" if any(s.extension in TEXT_EXTENSIONS for s in samples) else "images"
    plan = Plan(samples, stamps, classes, [], {}, what)
    return pack_plan(plan, Path(dest).expanduser(), samples_per_shard, 1)


def pack_arrays(
    images: UInt8[np.ndarray, "n h w *c"],
    labels: Int64[np.ndarray, "n"],
    classes: list[str],
    dest: str | Path,
    samples_per_shard: int = 5000,
) -> PackReport:
    """Packs uint8 (n, h, w) or (n, h, w, 1) grey, or (n, h, w, 3) RGB arrays as PNG: nothing is lost.

    labels: int64 (n,), -1 for none. The key is the row number. Raises ValueError as `pack`, and
    for another shape.
    """
    samples = []
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim == 4 and images.shape[3] != 3:
        raise ValueError(f"images: expected (n, h, w), (n, h, w, 1) or (n, h, w, 3), got {images.shape}")
    for i, (image, label) in enumerate(zip(images, labels.tolist())):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        samples.append(Sample(f"{i:08d}", "png", label, png.getvalue()))
    return pack_samples(samples, classes, dest, samples_per_shard)


def find_files(source: Path, extensions: tuple[str, ...]) -> tuple[list[Path], int]:
    """All files below `source` with these extensions, sorted, and the number of other files.

    Hidden ones are passed over; links to folders are followed once. Raises ValueError for none.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder")
    found, others, seen = [], 0, set()
    for folder, folders, files in os.walk(source, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder already walked
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            if Path(name).suffix[1:].lower() in extensions:
                found.append(Path(folder, name))
            else:
                others += 1
    if not found:
        wanted = ", ".join(f".{e}" for e in extensions[:-1]) + f" or .{extensions[-1]}"
        raise ValueError(f"{source}: no {wanted} files found ({others} other files)")
    return sorted(found), others


def class_folders(source: Path, files: list[Path]) -> tuple[list[str], list[int]]:
    """The names of the folders directly in `source`, sorted, and for each file which it is in; -1: in none."""
    folders = [file.relative_to(source).parts[0] if file.parent != source else None for file in files]
    names = sorted({folder for folder in folders if folder is not None})
    numbers = {name: i for i, name in enumerate(names)}
    return names, [numbers.get(folder, -1) for folder in folders]


def make_key(path: Path, taken: set[str]) -> str:
    """A webdataset key that still tells the file: its path without the extension; dots would end a
    key early. Made unique where a.jpg and a.png, or a.b.jpg and a_b.jpg, come to the same."""
    base = re.sub(r"[^\w/ @+=,-]", "_", str(path.with_suffix("")))
    if META_MEMBER.match(base):
        base = f"x{base}"
    key, count = base, 1
    while key in taken:
        count += 1
        key = f"{base}-{count}"
    taken.add(key)
    return key


def pack_plan(plan: Plan, dest: Path, samples_per_shard: int, processes: int) -> PackReport:
    """Writes what is planned into `dest`, or what is missing of it, and the index. Raises ValueError as `pack`."""
    samples = plan.samples
    if not samples:
        raise ValueError("\n".join([*plan.notes, f"nothing to pack: no {plan.what}"]))
    if samples_per_shard < 1:
        raise ValueError(f"samples per shard: expected a value >= 1, got {samples_per_shard}")
    content = json.dumps([PACK_VERSION, samples_per_shard, plan.classes, plan.stamps])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    claim = {"version": PACK_VERSION, "plan": fingerprint, "samples": len(samples)}
    _claim(dest, claim, plan)
    order = sample_order(0, 0, np.arange(len(samples)), len(samples), "shuffled").tolist()
    shards = {}
    for i, start in enumerate(range(0, len(samples), samples_per_shard)):
        members = [samples[row] for row in order[start : start + samples_per_shard]]
        shards[dest / f"shard-{i:06d}.tar"] = members
    todo = {path: members for path, members in shards.items() if not path.exists()}
    kept = len(shards) - len(todo)
    corrupt = _write_shards(todo, processes, plan.what)
    if len(corrupt) == len(samples):
        raise ValueError(
            f"none of {len(samples)} {plan.what} could be decoded, such as {min(corrupt.values())}"
        )
    if not todo and (dest / INDEX_NAME).exists():
        # Not written again: its time says from when on a changed shard is suspect.
        return _report(open_shards(str(dest), None), plan, corrupt, kept)
    report = _report(build_index(dest, processes), plan, corrupt, kept)
    save_index(report.index)
    return report


def _claim(dest: Path, claim: dict, plan: Plan) -> None:
    """Writes the plan into `dest`, or finds the same one there. Raises ValueError for another."""
    dest.mkdir(parents=True, exist_ok=True)
    path = dest / PLAN_NAME
    if path.exists():
        if path.read_text() != json.dumps(claim):
            raise ValueError(
                f"{dest}: holds shards packed from other {plan.what} or with another shard size; "
                "remove the folder, or pack into another one"
            )
        return
    if any(dest.glob("*.tar")) or (dest / INDEX_NAME).exists():
        raise ValueError(f"{dest}: holds shards that were not packed here; pack into another folder")
    (dest / CLASSES_NAME).unlink(missing_ok=True)
    if plan.classes:
        write_atomically(dest / CLASSES_NAME, json.dumps(plan.classes).encode())
    write_atomically(path, json.dumps(claim).encode())


def _write_shards(todo: dict[Path, list[Sample]], processes: int, what: str) -> dict[str, str]:
    """Writes shards, several at a time; returns why each undecodable sample (by key) was left out."""
    corrupt: dict[str, str] = {}
    total = sum(map(len, todo.values()))
    with tqdm(total=total, desc="pack", unit=what.removesuffix("s"), disable=None) as bar:
        if processes <= 1 or len(todo) <= 1:
            for path, members in todo.items():
                corrupt |= write_shard(path, members, bar.update)
            return corrupt
        with ProcessPoolExecutor(processes, mp_context=fork_or_spawn()) as pool:
            jobs = {pool.submit(write_shard, path, members): len(members) for path, members in todo.items()}
            for job in as_completed(jobs):
                corrupt |= job.result()
                bar.update(jobs[job])
    return corrupt


def write_shard(
    path: Path, samples: list[Sample], progress: Callable[[int], object] = lambda count: None
) -> dict[str, str]:
    """Writes one shard under a temporary name and renames it when it is whole and on disk.

    Returns key -> reason for the samples that could not be decoded. The bytes depend on the samples
    only: fixed times and owner. Long and non-ASCII keys make pax headers, which every reader knows.
    """
    corrupt = {}
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        owner = "selfsup"
        with TarWriter(file, owner, owner, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
            for sample in samples:
                progress(1)
                content = sample.content
                try:
                    data = content if isinstance(content, bytes) else content.read_bytes()
                    if sample.extension in IMAGE_EXTENSIONS:
                        decode_image(data, 3, _origin(sample))
                except (ValueError, OSError) as error:
                    corrupt[sample.key] = str(error)
                    continue
                label = {"cls": str(sample.label).encode()} if sample.label >= 0 else {}
                tar.write({"__key__": sample.key, sample.extension: data, **label})
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)
    return corrupt


def _report(index: ShardIndex, plan: Plan, corrupt: dict[str, str], kept: int) -> PackReport:
    """What is planned but not in the shards was corrupt: so the count is right for kept shards too."""
    packed = {index.key(row) for row in range(len(index))}
    reasons, left_out = [], dict(plan.left_out)
    for sample in plan.samples:
        if sample.key not in packed:
            earlier = f"{_origin(sample)}: could not be decoded by an earlier run"
            reasons.append(corrupt.get(sample.key, earlier))
    if reasons:
        left_out[f"{plan.what} that could not be decoded"] = len(reasons)
    if left_out:
        index = replace(index, skipped={**index.skipped, **left_out})
    return PackReport(index, kept, tuple(reasons), tuple(plan.notes))


def _origin(sample: Sample) -> str:
    """What to call a sample in a message: its file, or its key."""
    return sample.key if isinstance(sample.content, bytes) else str(sample.content)
