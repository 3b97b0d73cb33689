"""Features of every sample, with its key and label, in one file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from safetensors import SafetensorError
from safetensors.numpy import save_file

from selfsup.checkpoint import Weights
from selfsup.data.index import ShardIndex, open_shards
from selfsup.durable import fsync_path
from selfsup.export.frozen import FrozenEncoder
from selfsup.export.load import load_frozen
from selfsup.probe.features import CROP, Device, Features, choose_device, encoder_features
from selfsup.probe.sources import expect, expect_new


def main_embed(
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    shards: Annotated[str, tyro.conf.arg(metavar="SHARDS")],
    /,
    *,
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")],
    weights: Weights = "trained",
    device: Device = "auto",
    batch_size: int = 256,
    workers: int = 0,
    bf16: bool = False,
) -> None:
    """Write the features of every image in a folder of shards, with sample keys and labels.

    Args:
        source: run or checkpoint folder, timm or Hugging Face folder, timm:NAME, hf:NAME.
        shards: folder of WebDataset shards.
        out: file to write, .npz or .safetensors.
        weights: those of the last step, their average over steps (optim.ema), or byol's target network.
        device: auto: CUDA where there is one.
        batch_size: images per forward pass.
        workers: loader processes; 0 loads in this one.
        bf16: compute in bfloat16; the file holds float32 either way.
    """
    rows, width = embed(source, shards, out, device, batch_size, workers, bf16, weights)
    print(f"{out}: features of {rows} samples, {width} numbers each, with keys and labels")


def embed(
    source: str,
    shards: str,
    out: Path,
    device: Device = "auto",
    batch_size: int = 256,
    workers: int = 0,
    bf16: bool = False,
    weights: Weights = "trained",
) -> tuple[int, int]:
    """Writes `features` float32 (n, d) and `labels` int64 (n,), -1 for none, in index order, with keys.

    .npz: `keys` as fixed-width unicode (n,), `about` as JSON text; opens without allow_pickle.
    .safetensors: `key_bytes` uint8, UTF-8 end to end, and `key_offsets` int64 (n + 1,): key i is
    key_bytes[key_offsets[i]:key_offsets[i + 1]]; `about` in the metadata.
    Appears by a rename, whole or not at all. Returns (n, d). Raises ValueError for another suffix or
    an existing file before any work, and for what `load_frozen` and `open_shards` refuse.
    """
    writers: dict[str, Callable[[Path, Features, ShardIndex, str], None]]
    writers = {".npz": _write_npz, ".safetensors": _write_safetensors}
    if out.suffix not in writers:
        got = out.suffix or "no suffix"
        raise ValueError(f"--out {out}: expected a file ending in .npz or .safetensors, got {got}")
    expect_new(out)
    expect(batch_size >= 1, "--batch-size", ">= 1", batch_size)
    expect(workers >= 0, "--workers", ">= 0", workers)
    encoder = load_frozen(source, weights)
    index = open_shards(shards)
    for note in encoder.notes:
        print(note)
    features = encoder_features(encoder, index, batch_size, workers, choose_device(device), bf16, "embed")
    tmp = out.with_name(f".tmp-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writers[out.suffix](tmp, features, index, _about(encoder, index, shards, bf16))
        fsync_path(tmp)
        os.replace(tmp, out)
        fsync_path(out.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        raise ValueError(f"--out {out}: cannot write it: {error}") from error
    finally:
        if tmp.exists():
            tmp.unlink()
    return features.values.shape


def _about(encoder: FrozenEncoder, index: ShardIndex, shards: str, bf16: bool) -> str:
    about = {
        "source": encoder.name,
        "checkpoint": str(encoder.checkpoint) if encoder.checkpoint else None,
        "weights": encoder.weights,
        "feature": encoder.describe,
        "shards": shards,
        "fingerprint": index.fingerprint,
        "classes": list(index.classes),
        "crop": CROP,
        "img_size": encoder.img_size,
        "computed_in": "bfloat16" if bf16 else "float32",
    }
    return json.dumps(about)


def _write_npz(path: Path, features: Features, index: ShardIndex, about: str) -> None:
    keys = np.array([index.key(i) for i in range(len(index))])  # dtype <U..: the longest key decides
    with path.open("wb") as file:  # a file, because savez appends .npz to names
        np.savez(file, features=features.values, labels=features.labels, keys=keys, about=np.array(about))


def _write_safetensors(path: Path, features: Features, index: ShardIndex, about: str) -> None:
    keys = [index.key(i).encode() for i in range(len(index))]
    tensors = {
        "features": features.values,
        "labels": np.ascontiguousarray(features.labels),
        "key_bytes": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "key_offsets": np.cumsum([0, *map(len, keys)], dtype=np.int64),
    }
    save_file(tensors, path, metadata={"about": about})
