"""Images into WebDataset shards: verified one by one, shuffled once, in parallel, resumable.

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
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from selfsup.data.decode import decode_image
from selfsup.data.index import (
    CLASSES_NAME,
    INDEX_NAME,
    ShardIndex,
    build_index,
    open_shards,
    save_index,
)
from selfsup.data.order import sample_order
from selfsup.data.shard import IMAGE_EXTENSIONS, META_MEMBER, fork_or_spawn
from selfsup.durable import fsync_path, write_atomically

PLAN_NAME = "pack.json"
PACK_VERSION = 1
_CORRUPT = "images that could not be decoded"


class Sample(NamedTuple):
    """An image to be packed."""

    key: str
    extension: str
    label: int
    """-1 for none."""
    content: bytes | Path
    """The encoded image, or the file that holds it."""


@dataclass(frozen=True)
class PackReport:
    """What `pack` did. `str(report)` is the text for the user."""

    index: ShardIndex
    kept_shards: int
    """Finished by an earlier run and kept."""
    corrupt: tuple[str, ...]
    """Images left out, each with the reason."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        index = self.index
        lines = [*self.notes, *(f"left out: {name}" for name in self.corrupt)]
        kept = f" ({self.kept_shards} kept from before)" if self.kept_shards else ""
        classes = f", {len(index.classes)} classes" if index.classes else ""
        left_out = f"; {len(self.corrupt)} corrupt left out" if self.corrupt else ""
        total = f"{len(index)} images{classes} in {len(index.shards)} shards{kept}{left_out}: {index.folder}"
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
    files, others = _find_images(source)
    names = sorted({file.relative_to(source).parts[0] for file in files if file.parent != source})
    samples, stamps, taken = [], [], set()
    for file in files:
        path = file.relative_to(source)
        label = -1 if file.parent == source else names.index(path.parts[0])
        samples.append(Sample(_key(path, taken), path.suffix[1:].lower(), label, file))
        status = file.stat()
        stamps.append([str(path), status.st_size, status.st_mtime_ns])
    notes = []
    unlabelled = sum(sample.label == -1 for sample in samples)
    if names and unlabelled:
        notes.append(f"note: {unlabelled} images in {source} itself, outside the class folders, get no label")
    if others:
        notes.append(f"note: {others} files in {source} are not .jpg, .jpeg, .png or .webp: left alone")
    return _pack(samples, stamps, names, dest, samples_per_shard, processes, notes)


def main_pack(
    source: Path, dest: Path, /, samples_per_shard: int = 5000, processes: int = os.cpu_count() or 1
) -> None:
    """Packs a folder of images (one folder per class, or flat) into WebDataset shards with an index.

    Every image is decoded once; corrupt ones are named and left out. Interrupted, it goes on when
    called again.

    Args:
        source: folder of JPEG, PNG and WebP images.
        dest: folder for the shards.
        samples_per_shard: images a shard.
        processes: shards written at a time.
    """
    print(pack(source, dest, samples_per_shard, processes))


def pack_samples(
    samples: list[Sample], classes: list[str], dest: str | Path, samples_per_shard: int = 5000
) -> PackReport:
    """Packs encoded images held in memory; otherwise as `pack`. Keys must differ and have no dot."""
    stamps = [[s.key, s.extension, s.label, hashlib.sha256(s.content).hexdigest()] for s in samples]
    return _pack(samples, stamps, classes, Path(dest).expanduser(), samples_per_shard, 1, [])


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


def _find_images(source: Path) -> tuple[list[Path], int]:
    """All images below `source`, sorted, and the number of other files."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder of images")
    images, others, seen = [], 0, set()
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
            if Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS:
                images.append(Path(folder, name))
            else:
                others += 1
    if not images:
        raise ValueError(f"{source}: no .jpg, .jpeg, .png or .webp files found ({others} other files)")
    return sorted(images), others


def _key(path: Path, taken: set[str]) -> str:
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


def _pack(
    samples: list[Sample],
    stamps: list[list],
    classes: list[str],
    dest: Path,
    samples_per_shard: int,
    processes: int,
    notes: list[str],
) -> PackReport:
    if not samples:
        raise ValueError("nothing to pack: no images")
    if samples_per_shard < 1:
        raise ValueError(f"samples per shard: expected a value >= 1, got {samples_per_shard}")
    content = json.dumps([PACK_VERSION, samples_per_shard, classes, stamps])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    plan = {"version": PACK_VERSION, "plan": fingerprint, "samples": len(samples)}
    _claim(dest, plan, classes)
    order = sample_order(0, 0, np.arange(len(samples)), len(samples), "shuffled").tolist()
    shards = {}
    for i, start in enumerate(range(0, len(samples), samples_per_shard)):
        members = [samples[row] for row in order[start : start + samples_per_shard]]
        shards[dest / f"shard-{i:06d}.tar"] = members
    todo = {path: members for path, members in shards.items() if not path.exists()}
    kept = len(shards) - len(todo)
    corrupt = _write_shards(todo, processes)
    if len(corrupt) == len(samples):
        raise ValueError(f"none of {len(samples)} images could be decoded, such as {min(corrupt.values())}")
    if not todo and (dest / INDEX_NAME).exists():
        # Not written again: its time says from when on a changed shard is suspect.
        return _report(open_shards(str(dest)), samples, corrupt, kept, notes)
    report = _report(build_index(dest, processes), samples, corrupt, kept, notes)
    save_index(report.index)
    return report


def _claim(dest: Path, plan: dict, classes: list[str]) -> None:
    """Writes the plan into `dest`, or finds the same one there. Raises ValueError for another."""
    dest.mkdir(parents=True, exist_ok=True)
    path = dest / PLAN_NAME
    if path.exists():
        if path.read_text() != json.dumps(plan):
            raise ValueError(
                f"{dest}: holds shards packed from other images or with another shard size; "
                "remove the folder, or pack into another one"
            )
        return
    if any(dest.glob("*.tar")) or (dest / INDEX_NAME).exists():
        raise ValueError(f"{dest}: holds shards that were not packed here; pack into another folder")
    (dest / CLASSES_NAME).unlink(missing_ok=True)
    if classes:
        write_atomically(dest / CLASSES_NAME, json.dumps(classes).encode())
    write_atomically(path, json.dumps(plan).encode())


def _write_shards(todo: dict[Path, list[Sample]], processes: int) -> dict[str, str]:
    """Writes shards, several at a time; returns why each undecodable image (by key) was left out."""
    corrupt: dict[str, str] = {}
    total = sum(map(len, todo.values()))
    with tqdm(total=total, desc="pack", unit="image", disable=None) as bar:
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

    Returns key -> reason for the images that could not be decoded. The bytes depend on the samples
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


def _report(
    index: ShardIndex, samples: list[Sample], corrupt: dict[str, str], kept: int, notes: list[str]
) -> PackReport:
    """What is planned but not in the shards was corrupt: so the count is right for kept shards too."""
    packed = {index.key(row) for row in range(len(index))}
    reasons = []
    for sample in samples:
        if sample.key not in packed:
            earlier = f"{_origin(sample)}: could not be decoded by an earlier run"
            reasons.append(corrupt.get(sample.key, earlier))
    if reasons:
        index = replace(index, skipped={**index.skipped, _CORRUPT: len(reasons)})
    return PackReport(index, kept, tuple(reasons), tuple(notes))


def _origin(sample: Sample) -> str:
    """What to call a sample in a message: its file, or its key."""
    return str(sample.content) if isinstance(sample.content, Path) else sample.key
