"""CIFAR-10 into WebDataset shards: ARCHIVE -> DEST/train and DEST/test, each with its index.

    python tools/cifar10.py cifar-10-binary.tar.gz data/cifar10

Takes the official binary version (`cifar-10-binary.tar.gz`, kept without loss as PNG) or an
archive of class folders (`train/CLASS/0001.jpg`, `test/...`, in a .tar, .tar.gz or .tar.xz, kept
byte by byte). The archive is streamed: nothing is extracted to disk, nothing is unpickled.
"""

import bz2
import gzip
import lzma
import re
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from selfsup.data.pack import PackReport, Sample, pack_arrays, pack_samples

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"

_OPENERS = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open, b"BZh": bz2.open}
_FOLDERS = re.compile(r"(?:\./)?(?:[\w-]+/)?(train|test)/([\w-]+)/([\w-]+)\.(jpg|jpeg|png)")
_BATCHES = re.compile(r"(?:\./)?cifar-10-batches-bin/((?:data|test)_batch(?:_\d)?\.bin|batches\.meta\.txt)")
_RECORD = 1 + 3 * 32 * 32
_LARGEST_MEMBER = 10_000 * _RECORD
_MOST_BYTES = 1 << 30


def convert(archive: Path, dest: Path, samples_per_shard: int = 5000) -> dict[str, PackReport]:
    """Packs both splits; returns {"train": report, "test": report}.

    Raises ValueError for the pickled version, for a damaged archive and for one without both splits.
    """
    members = _read(archive)
    if any(_BATCHES.fullmatch(name) for name in members):
        return _convert_binary(archive, members, dest, samples_per_shard)
    splits: dict[str, list[tuple[str, str, str, bytes]]] = {"train": [], "test": []}
    for name, content in sorted(members.items()):
        match = _FOLDERS.fullmatch(name)
        if match:
            split, label, stem, extension = match.groups()
            splits[split].append((label, stem, extension, content))
    if not all(splits.values()):
        found = f"found {len(splits['train'])} and {len(splits['test'])}"
        raise ValueError(f"{archive}: expected train/CLASS/*.jpg and test/CLASS/*.jpg ({found}), or {URL}")
    classes = sorted({label for images in splits.values() for label, *_ in images})
    reports = {}
    for split, images in splits.items():
        samples = [Sample(f"{c}/{stem}", kind, classes.index(c), data) for c, stem, kind, data in images]
        reports[split] = pack_samples(samples, classes, dest / split, samples_per_shard)
    return reports


def _read(archive: Path) -> dict[str, bytes]:
    """The regular members of a tar, by name; read to its last byte, so that damage is seen."""
    if not archive.is_file():
        raise ValueError(f"{archive}: no such file; download {URL}")
    with open(archive, "rb") as file:
        head = file.read(6)
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), open)
    members: dict[str, bytes] = {}
    total = 0
    try:
        with opener(archive, "rb") as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    if "cifar-10-batches-py" in member.name:
                        raise ValueError(
                            f"{archive}: the Python version holds pickles, and opening a pickle runs "
                            f"whatever code is in it; download the binary version instead: {URL}"
                        )
                    if not member.isreg():
                        continue
                    total += member.size
                    if member.size > _LARGEST_MEMBER or total > _MOST_BYTES:
                        raise ValueError(f"{archive}: {member.name}: larger than anything in CIFAR-10")
                    members[member.name] = tar.extractfile(member).read()
            while stream.read(1 << 20):  # to the end: checksums of the compressed file
                pass
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{archive}: damaged archive ({error}); download it again") from None
    return members


def _convert_binary(
    archive: Path, members: dict[str, bytes], dest: Path, samples_per_shard: int
) -> dict[str, PackReport]:
    """Records of one label byte and 3072 pixels: all red, all green, all blue, row by row."""
    files = {match.group(1): members[name] for name in members if (match := _BATCHES.fullmatch(name))}
    classes = files.get("batches.meta.txt", b"").decode().split()
    parts = {
        "train": [files[name] for name in sorted(files) if name.startswith("data_batch")],
        "test": [files[name] for name in files if name.startswith("test_batch")],
    }
    if not classes or not all(parts.values()):
        expected = "batches.meta.txt, data_batch_*.bin and test_batch.bin"
        raise ValueError(f"{archive}: expected {expected}, got {', '.join(sorted(files))}")
    reports = {}
    for split, contents in parts.items():
        if any(len(content) % _RECORD for content in contents):
            raise ValueError(f"{archive}: damaged: a batch is not a multiple of {_RECORD} bytes long")
        records = np.frombuffer(b"".join(contents), dtype=np.uint8).reshape(-1, _RECORD)
        labels = records[:, 0].astype(np.int64)
        if labels.max() >= len(classes):
            raise ValueError(f"{archive}: damaged: label {labels.max()} of {len(classes)} classes")
        images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        reports[split] = pack_arrays(images, labels, classes, dest / split, samples_per_shard)
    return reports


def main(
    archive: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ARCHIVE")],
    dest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    samples_per_shard: int = 5000,
) -> int:
    """CIFAR-10 into WebDataset shards.

    Args:
        archive: cifar-10-binary.tar.gz, or a tar of class folders under train/ and test/.
        dest: gets the folders train and test.
        samples_per_shard: images a shard.
    """
    try:
        reports = convert(archive, dest, samples_per_shard)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for report in reports.values():
        print(report)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
