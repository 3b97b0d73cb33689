"""Verifying shards from end to end: every hash, every checksum, every image and text decoded."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from selfsup.data.decode import decode_image
from selfsup.data.index import ShardIndex, check_shards, load_index, local_folder, open_shards, save_index
from selfsup.data.reader import ShardReader
from selfsup.data.shard import fork_or_spawn
from selfsup.data.tokens import check_tokens, is_token_folder, open_tokens

_ROWS_PER_JOB = 1000


def damaged_samples(index: ShardIndex, processes: int) -> dict[int, str]:
    """Reads and decodes every image or text of a saved index; row -> what is wrong with it."""
    damaged: dict[int, str] = {}
    jobs = [(index.folder, start) for start in range(0, len(index), _ROWS_PER_JOB)]
    with tqdm(total=len(index), desc="decode", unit=index.what.removesuffix("s"), disable=None) as bar:
        with ProcessPoolExecutor(processes, mp_context=fork_or_spawn()) as pool:
            for (_, start), found in zip(jobs, pool.map(_check_rows, *zip(*jobs))):
                damaged |= found
                bar.update(min(_ROWS_PER_JOB, len(index) - start))
    return damaged


@lru_cache(maxsize=1)
def _reader(folder: Path) -> ShardReader:
    return ShardReader(load_index(folder))


def _check_rows(folder: Path, start: int) -> dict[int, str]:
    reader, damaged = _reader(folder), {}
    for row in range(start, min(start + _ROWS_PER_JOB, len(reader.index))):
        try:
            if reader.index.kind == "text":
                reader.texts(np.array([row]))
            else:
                decode_image(reader.read(np.array([row]))[0], 3, reader.index.name(row))
        except ValueError as error:
            damaged[row] = str(error)
    return damaged


def without_rows(index: ShardIndex, rows: list[int], reason: str) -> ShardIndex:
    """The index without some samples, counted under `reason`. The shards stay as they are."""
    keep = np.ones(len(index), dtype=bool)
    keep[rows] = False
    kept = np.flatnonzero(keep).tolist()
    keys = [index.key(row).encode() for row in kept]
    counts = np.bincount(index.shard[keep], minlength=len(index.shards)).tolist()
    return replace(
        index,
        shards=tuple(shard._replace(samples=count) for shard, count in zip(index.shards, counts)),
        shard=index.shard[keep],
        offset=index.offset[keep],
        length=index.length[keep],
        crc32=index.crc32[keep],
        label=index.label[keep],
        key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
        key_offsets=np.cumsum([0, *map(len, keys)], dtype=np.int64),
        skipped={**index.skipped, reason: index.skipped.get(reason, 0) + len(index) - len(kept)},
    )


def main_check(shards: str, /, drop: bool = False, processes: int = os.cpu_count() or 1) -> None:
    """Verifies shards against their index: every file's SHA-256, every sample's CRC32 and decoding.

    Token shards: every file's SHA-256, and that their tokenizer is the one that made them.

    Args:
        shards: the folder that holds them.
        drop: leave images or texts that cannot be decoded out of the index (the shards stay as they are).
        processes: samples are decoded by so many.
    """
    if is_token_folder(local_folder(shards, "SHARDS")):
        _check_token_folder(shards, drop)
        return
    index = open_shards(shards, None)
    check_shards(index, all=True)
    damaged, what = damaged_samples(index, processes), index.what
    if not damaged:
        print(f"{len(index)} {what} in {len(index.shards)} shards: all as indexed, all can be decoded")
        return
    if not drop:
        fix = f"leave them out with: selfsup data check {index.folder} --drop"
        raise ValueError("\n".join([*damaged.values(), f"{len(damaged)} of {len(index)} {what}; {fix}"]))
    if len(damaged) == len(index):
        raise ValueError(f"{index.folder}: not one of {len(index)} {what} can be decoded: nothing is left")
    save_index(without_rows(index, sorted(damaged), f"{what} that could not be decoded"))
    print("\n".join(damaged.values()))
    print(f"{len(damaged)} {what} left out of the index, {len(index) - len(damaged)} kept")


def _check_token_folder(shards: str, drop: bool) -> None:
    if drop:
        raise ValueError(f"drop: {shards} holds token shards, of which nothing can be left out; tokenise again")
    index = open_tokens(shards)
    check_tokens(index, all=True)
    print(f"{len(index)} documents, {index.tokens} tokens in {len(index.shards)} shards: all as indexed")
