"""The shard index: where every sample lies in a folder of plain WebDataset tars.

Images or texts. One file, `index.safetensors`, beside the shards. With it a sample is one positioned read, the
order of samples is free of the order of shards, and a damaged shard is *seen*: webdataset, like
Python's tarfile, reads a broken one as a shorter one, in silence.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from selfsup.data.shard import Kind, Members, Shard, fork_or_spawn, read_shard
from selfsup.durable import sha256, write_atomically

INDEX_NAME = "index.safetensors"
PLAN_NAME = "pack.json"
"""What `selfsup data pack` writes first."""
CLASSES_NAME = "classes.json"
INDEX_VERSION = 1

_COMPRESSED = re.compile(r".*\.(tgz|txz|tbz2?|tar\.(gz|xz|bz2|zst|lz4|Z))$", re.IGNORECASE)


@dataclass(frozen=True)
class ShardIndex:
    """Every sample of a folder of shards, in the order of the shards."""

    folder: Path
    shards: tuple[Shard, ...]
    shard: Int32[np.ndarray, "n"]
    """Which of `shards` holds the sample."""
    offset: Int64[np.ndarray, "n"]
    """Where the bytes of the image, or text, begin in the shard."""
    length: Int64[np.ndarray, "n"]
    crc32: UInt32[np.ndarray, "n"]
    label: Int64[np.ndarray, "n"]
    """From the sample's `.cls` member; -1 where there is none."""
    key_bytes: UInt8[np.ndarray, "b"]
    key_offsets: Int64[np.ndarray, "n+1"]
    classes: tuple[str, ...]
    """Names of the labels, from `classes.json` beside the shards; empty where unknown."""
    skipped: dict[str, int]
    """What was left out and how often."""
    kind: Kind = "images"
    """What the samples are."""

    def __len__(self) -> int:
        return len(self.offset)

    def key(self, row: int | np.integer) -> str:
        """The sample's webdataset key."""
        start, end = self.key_offsets[row], self.key_offsets[row + 1]
        return self.key_bytes[start:end].tobytes().decode()

    @property
    def what(self) -> str:
        """What to call the samples in a message."""
        return {"images": "images", "text": "documents"}[self.kind]

    def name(self, row: int | np.integer) -> str:
        """`shard-000003.tar: cat/0042`, for messages."""
        return f"{self.folder / self.shards[self.shard[row]].name}: {self.key(row)}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the index says of its samples and shards: equal means the same data."""
        digest = hashlib.sha256(json.dumps(self._shard_table()).encode())
        for name, array in self._tensors().items():
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def _shard_table(self) -> list[list[str | int]]:
        return [[shard.name, shard.size, shard.sha256, shard.samples] for shard in self.shards]

    def _header(self) -> str:
        header = {"version": INDEX_VERSION, "shards": self._shard_table(), "classes": self.classes}
        if self.kind != "images":  # indexes of images are older than this field, and stay as they were
            header["kind"] = self.kind
        return json.dumps({**header, "skipped": self.skipped}, sort_keys=True)

    def _tensors(self) -> dict[str, np.ndarray]:
        names = ("shard", "offset", "length", "crc32", "label", "key_bytes", "key_offsets")
        return {name: getattr(self, name) for name in names}


def build_index(source: str | Path | list[Path], processes: int) -> ShardIndex:
    """Walks every shard of a folder (or a list of shards in one folder) and indexes its images.

    Where there is not one image, the texts (.txt); else a text is taken for an image's caption.
    Every byte is read once for SHA-256 and CRC32, `processes` shards at a time. Raises ValueError,
    naming the file, for a missing or empty folder, for a damaged shard (truncated, bad header,
    not a tar, compressed), for members that do not belong into a data set (links, devices, paths
    that leave the folder), for a key that comes back, and where no image was found at all.
    """
    if isinstance(source, list):
        paths = source
        if len({path.parent for path in paths}) != 1:
            raise ValueError(f"shards: expected files of one folder, got {len(paths)} in several (or none)")
        folder = paths[0].parent
    else:
        folder = local_folder(str(source))
        paths = list_shards(folder)
    shards, members = _read_shards(paths, processes, None)
    kinds = {part.kind for part in members if part.keys}
    if len(kinds) > 1:
        shards, members = _read_shards(paths, processes, "images")
    kind = "text" if kinds == {"text"} else "images"
    skipped: dict[str, int] = {}
    for part in members:
        for reason, count in part.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    keys = [key.encode() for part in members for key in part.keys]
    if not keys:
        raise ValueError(
            f"{folder}: no images in {len(paths)} shards, and no texts (skipped: {skipped or 'nothing'}); expected "
            "samples with a member named KEY.jpg, .jpeg, .png or .webp, or KEY.txt, where KEY has no dot"
        )
    counts = [len(part.keys) for part in members]
    label = np.concatenate([part.label for part in members])
    index = ShardIndex(
        folder=folder,
        shards=tuple(shards),
        shard=np.repeat(np.arange(len(members), dtype=np.int32), counts),
        offset=np.concatenate([part.offset for part in members]),
        length=np.concatenate([part.length for part in members]),
        crc32=np.concatenate([part.crc32 for part in members]),
        label=label,
        key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
        key_offsets=np.cumsum([0, *map(len, keys)], dtype=np.int64),
        classes=_read_classes(folder, int(label.max())),
        skipped=skipped,
        kind=kind,
    )
    _check_consistent(index)
    return index


def _check_consistent(index: ShardIndex) -> None:
    """Raises ValueError for an index whose parts contradict one another."""
    n = len(index)
    lengths = {len(array) for array in (index.shard, index.length, index.crc32, index.label)}
    if n == 0 or lengths != {n} or len(index.key_offsets) != n + 1:
        raise ValueError("its columns differ in length, or are empty")
    counts = np.bincount(index.shard, minlength=len(index.shards)).tolist()
    if counts != [shard.samples for shard in index.shards]:
        raise ValueError("its samples per shard do not add up")
    sizes = np.array([shard.size for shard in index.shards])[index.shard]
    if index.offset.min() < 0 or index.length.min() < 0 or (index.offset + index.length > sizes).any():
        raise ValueError("a sample lies outside its shard")
    if index.key_offsets[0] != 0 or index.key_offsets[-1] != len(index.key_bytes):
        raise ValueError("its keys do not add up")


def _read_shards(
    paths: list[Path], processes: int, kind: Kind | None
) -> tuple[list[Shard], list[Members]]:
    bar = tqdm(total=len(paths), desc="index", unit="shard", disable=None)
    results = []
    with bar:
        if processes <= 1 or len(paths) == 1:
            for path in paths:
                results.append(read_shard(path, kind))
                bar.update()
        else:
            with ProcessPoolExecutor(processes, mp_context=fork_or_spawn()) as pool:
                for result in pool.map(read_shard, paths, repeat(kind)):
                    results.append(result)
                    bar.update()
    return [shard for shard, _ in results], [members for _, members in results]


def _read_classes(folder: Path, largest_label: int) -> tuple[str, ...]:
    path = folder / CLASSES_NAME
    if not path.exists():
        return ()
    try:
        names = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path}: expected a JSON list of class names")
    if largest_label >= len(names):
        raise ValueError(f"{path}: expected a name for every label up to {largest_label}, got {len(names)}")
    return tuple(names)


def save_index(index: ShardIndex) -> Path:
    """Writes `index.safetensors` beside the shards: whole or not at all, whenever it is interrupted."""
    tensors = {name: np.ascontiguousarray(array) for name, array in index._tensors().items()}
    path = index.folder / INDEX_NAME
    write_atomically(path, save(tensors, metadata={"selfsup": index._header()}))
    return path


def load_index(folder: str | Path) -> ShardIndex:
    """The index in `folder`, as written; says nothing about the shards (see `open_shards`).

    Raises ValueError where there is none or it cannot be read.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    if not path.is_file():
        fix = f"make it with: selfsup data index {folder}"
        if (folder / PLAN_NAME).is_file():
            again = f"if it is lost: selfsup data index {folder}"
            fix = f"if packing was interrupted, call selfsup data pack again, as before; {again}"
        raise ValueError(f"{folder}: no {INDEX_NAME}; {fix}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["selfsup"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if header["version"] != INDEX_VERSION:
            raise ValueError(f"format version {header['version']}, expected {INDEX_VERSION}")
        shards = tuple(Shard(*fields) for fields in header["shards"])
        rest = {"classes": tuple(header["classes"]), "skipped": header["skipped"]}
        index = ShardIndex(folder, shards, **tensors, **rest, kind=header.get("kind", "images"))
        if index.kind not in ("images", "text"):
            raise ValueError(f"it is of {index.kind}, expected images or text")
        _check_consistent(index)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        again = f"selfsup data index {folder}"
        raise ValueError(f"{path}: not a usable index ({error}); make it again with: {again}") from None
    return index


def local_folder(shards: str, option: str = "data.shards") -> Path:
    """The folder a user named; option: where. Raises ValueError for anything else: shards are read from
    local files only, and a `pipe:` or URL in a config would be code or a download in disguise."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:|-$", shards):
        raise ValueError(f"{option}: expected a local folder, got {shards!r}; copy the shards to a disk")
    folder = Path(shards).expanduser()
    if not folder.exists():
        raise ValueError(f"{option}: no such folder: {folder}")
    if not folder.is_dir():
        raise ValueError(f"{option}: expected the folder that holds the shards, got the file {folder}")
    return folder


def list_shards(folder: Path) -> list[Path]:
    """The `.tar` files of a folder by name. Raises ValueError for none, or for compressed ones."""
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    compressed = [name for name in names if _COMPRESSED.match(name)]
    if compressed:
        raise ValueError(f"{folder / compressed[0]}: compressed: no random access; unpack it to a plain .tar")
    paths = [folder / name for name in names if name.lower().endswith(".tar")]
    if not paths:
        if any(name.startswith("tokens-") and name.endswith(".npy") for name in names):
            raise ValueError(f"{folder}: expected shards of images or text (*.tar), got token shards")
        raise ValueError(
            f"{folder}: no shards (*.tar); pack images or text with: selfsup data pack FOLDER {folder}"
        )
    return paths


def open_shards(shards: str, kind: Kind | None = "images") -> ShardIndex:
    """The index of a folder of shards, checked against the files that are there. kind None: of either.

    Raises ValueError, with the fix, for a missing folder, no shards, no index, a missing shard, a
    shard of another size than indexed, a shard that the index does not know, and the other kind of data.
    """
    folder = local_folder(shards)
    present = {path.name: path.stat().st_size for path in list_shards(folder)}
    index = load_index(folder)
    if kind is not None and index.kind != kind:
        raise ValueError(f"{folder}: expected shards of {kind}, got {index.kind}; name a folder of {kind}")
    again = f"selfsup data index {folder}"
    for shard in index.shards:
        if shard.name not in present:
            raise ValueError(f"{folder / shard.name}: shard missing; restore it, or index the rest: {again}")
        if present[shard.name] != shard.size:
            raise ValueError(
                f"{folder / shard.name}: truncated or altered: expected {shard.size} bytes as indexed, got "
                f"{present[shard.name]}; restore it, or if the change is wanted: {again}"
            )
    unknown = sorted(present.keys() - {shard.name for shard in index.shards})
    if unknown:
        raise ValueError(f"{folder / unknown[0]}: {len(unknown)} shards not in the index; add with: {again}")
    return index


def check_shards(index: ShardIndex, all: bool) -> list[str]:
    """Hashes shards again and compares with the index; returns the names of those hashed.

    `all`: every shard; otherwise those modified after the index was written. Raises ValueError
    naming every altered shard.
    """
    written = (index.folder / INDEX_NAME).stat().st_mtime_ns
    paths = {shard.name: index.folder / shard.name for shard in index.shards}
    hashed = [s for s in index.shards if all or paths[s.name].stat().st_mtime_ns > written]
    altered = []
    for shard in tqdm(hashed, desc="check", unit="shard", disable=None):
        if sha256(paths[shard.name]) != shard.sha256:
            altered.append(shard.name)
    if altered:
        raise ValueError(
            f"{index.folder}: altered since indexed: {', '.join(altered)}; restore, or if the change is "
            f"wanted: selfsup data index {index.folder}"
        )
    return [shard.name for shard in hashed]


def main_index(shards: Path, /, processes: int = os.cpu_count() or 1) -> None:
    """Builds the index of a folder of WebDataset shards (plain .tar), and checks each from end to end.

    Args:
        shards: the folder that holds them; the index is written there.
        processes: shards read at a time.
    """
    index = build_index(shards, processes)
    save_index(index)
    for reason, count in index.skipped.items():
        print(f"skipped: {count} {reason}")
    print(f"{len(index)} {index.what} in {len(index.shards)} shards: {index.folder / INDEX_NAME}")
