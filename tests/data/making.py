"""Small shards, written with plain tarfile (not by the code under test)."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def picture(i: int, height: int = 8, width: int = 8) -> np.ndarray:
    """A different (h, w, 3) image for each i."""
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: list[int], start: int = 0) -> Path:
    """Shards of the given numbers of samples; sample i is picture(i), labelled i % 3."""
    folder.mkdir(parents=True, exist_ok=True)
    i = start
    for shard, size in enumerate(sizes):
        members = []
        for i in range(i, i + size):
            members += [(f"{i:05d}.cls", str(i % 3).encode()), (f"{i:05d}.png", encode(picture(i)))]
        i += 1 if size else 0
        write_tar(folder / f"part-{shard:03d}.tar", members)
    return folder
