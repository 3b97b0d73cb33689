"""One shard: walking a tar so that damage is seen, and finding its images or texts by offset."""

import multiprocessing
import os
import re
import sys
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from selfsup.durable import sha256

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt",)

Kind = Literal["images", "text"]

# webdataset's rules, letter for letter: the key ends at the first dot of the base name, and
# members named __like_this__ are its own.
KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
META_MEMBER = re.compile(r"__[^/]*__($|/)")

_MAGIC = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstandard"}
_LONGEST_LABEL = 20
LARGEST_SAMPLE = 1 << 30
_BLOCK = 512


class Shard(NamedTuple):
    """What the index remembers of a shard file."""

    name: str
    size: int
    sha256: str
    samples: int


@dataclass
class Members:
    """The images of one shard, or its texts, in its order."""

    kind: Kind
    keys: list[str]
    offset: np.ndarray
    length: np.ndarray
    crc32: np.ndarray
    label: np.ndarray
    skipped: dict[str, int]


@dataclass
class _Sample:
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """suffix -> (offset, length)"""


def fork_or_spawn() -> BaseContext:
    """How helper processes are started: forked on Linux (at once, without importing again), else spawned."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def read_shard(path: Path, kind: Kind | None = None) -> tuple[Shard, Members]:
    """Walks one shard, checks it from the first byte to the last, and lists its images, or its texts.

    kind None: images where there is one, for then a text is a caption; else texts, where there is one.
    Raises ValueError naming the file for anything but a whole, plain tar of regular files.
    """
    check_is_tar(path)
    digest = sha256(path)
    skipped: Counter[str] = Counter()
    with open(path, "rb") as file:
        samples = _group(path, _walk(path, file), skipped)
        members = _members(path, file.fileno(), samples, kind or _kind(samples), skipped)
    return Shard(path.name, path.stat().st_size, digest, len(members.keys)), members


def check_is_tar(path: Path) -> None:
    """Raises ValueError for what is commonly found under the name of a tar and is none."""
    with open(path, "rb") as file:
        head = file.read(_BLOCK)
    if not head:
        raise ValueError(f"{path}: damaged: the file is empty; download or pack it again")
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: compressed with {name}; unpack it to a plain .tar")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path}: a web page saved as .tar (a failed download?); download it again")


def _walk(path: Path, file: BinaryIO) -> list[tarfile.TarInfo]:
    """The tar's regular members. tarfile takes a bad header, or a file cut between two members, for
    the end of the archive; the real end is at least 1024 zero bytes and nothing after them."""
    members, end = [], 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # else it keeps them all
                end = member.offset_data
                _check_member(path, member)
                if member.isreg():
                    members.append(member)
                    end += -(-member.size // _BLOCK) * _BLOCK
    except tarfile.TarError as error:
        raise ValueError(f"{path}: damaged or not a tar ({error}); download or pack it again") from None
    size = os.fstat(file.fileno()).st_size
    if end > size:
        raise ValueError(f"{path}: truncated: {members[-1].name} ends at byte {end}, the file at {size}")
    file.seek(end)
    tail = 0
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            raise ValueError(f"{path}: damaged: bad header at byte {end} or later, {len(members)} members in")
        tail += len(block)
    if tail < 2 * _BLOCK:
        raise ValueError(
            f"{path}: truncated: expected at least {2 * _BLOCK} zero bytes at the end of a tar, got {tail}; "
            f"{len(members)} members read"
        )
    return members


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ValueError(f"{path}: {member.name}: links, devices and sparse files are refused in a shard")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise ValueError(f"{path}: {member.name}: a path outside the shard is refused")
    if not member.name.isprintable():
        raise ValueError(f"{path}: {member.name!r}: a name that is not printable UTF-8 is refused")


def _group(path: Path, members: list[tarfile.TarInfo], skipped: Counter[str]) -> list[_Sample]:
    """Adjacent members of one key are a sample."""
    samples: list[_Sample] = []
    seen: set[str] = set()
    for member in members:
        match = KEY_AND_SUFFIX.match(member.name)
        if META_MEMBER.match(member.name) or match is None:
            skipped["members that belong to no sample"] += 1
            continue
        key, suffix = match.group(1), match.group(2).lower()
        if not samples or samples[-1].key != key:
            if key in seen:
                raise ValueError(
                    f"{path}: key {key!r} comes back after other samples; a sample's members must be adjacent"
                )
            seen.add(key)
            samples.append(_Sample(key))
        if suffix in samples[-1].members:
            raise ValueError(f"{path}: {member.name} is there twice")
        samples[-1].members[suffix] = (member.offset_data, member.size)
    return samples


def _kind(samples: list[_Sample]) -> Kind:
    """Texts only where there are some and not one image."""
    suffixes = set().union(*(sample.members for sample in samples))
    return "text" if suffixes & {*TEXT_EXTENSIONS} and not suffixes & {*IMAGE_EXTENSIONS} else "images"


def _members(
    path: Path, descriptor: int, samples: list[_Sample], kind: Kind, skipped: Counter[str]
) -> Members:
    extensions, one = (IMAGE_EXTENSIONS, "an image") if kind == "images" else (TEXT_EXTENSIONS, "a text")
    keys, spans, labels, checksums = [], [], [], []
    for sample in samples:
        found = [sample.members[suffix] for suffix in extensions if suffix in sample.members]
        if not found:
            skipped[f"samples without {one}"] += 1
            continue
        if len(found) > 1:
            skipped["second images of a sample"] += len(found) - 1
        offset, length = found[0]
        if length > LARGEST_SAMPLE:
            raise ValueError(f"{path}: {sample.key}: {one} of {length} bytes is refused")
        keys.append(sample.key)
        spans.append((offset, length))
        checksums.append(zlib.crc32(os.pread(descriptor, length, offset)))
        labels.append(_label(descriptor, sample, skipped))
    table = np.array(spans, dtype=np.int64).reshape(-1, 2)
    return Members(
        kind=kind,
        keys=keys,
        offset=table[:, 0].copy(),
        length=table[:, 1].copy(),
        crc32=np.array(checksums, dtype=np.uint32),
        label=np.array(labels, dtype=np.int64),
        skipped=dict(skipped),
    )


def _label(descriptor: int, sample: _Sample, skipped: Counter[str]) -> int:
    """The class number in `.cls`, or -1."""
    if "cls" not in sample.members:
        return -1
    offset, length = sample.members["cls"]
    text = os.pread(descriptor, min(length, _LONGEST_LABEL), offset).strip()
    if length > _LONGEST_LABEL or re.fullmatch(rb"\d{1,18}", text) is None:
        skipped["labels (.cls) that are not a whole number"] += 1
        return -1
    return int(text)
