"""Packs scikit-learn's handwritten digits (1,797 images of 8x8 pixels, shipped with scikit-learn).

    python tools/digits.py data/digits

Writes DEST/train (1,437 images) and DEST/test (360), split by a fixed permutation, as WebDataset
shards with their index. Run again it keeps what is there. Data: Alpaydin and Kaynak 1998, UCI
"Optical Recognition of Handwritten Digits", CC BY 4.0.
"""

from pathlib import Path

import numpy as np
import tyro
from sklearn.datasets import load_digits

from selfsup.data.index import open_shards
from selfsup.data.pack import pack_arrays

TEST_IMAGES = 360
SPLIT_SEED = 0


def main(dest: Path, /) -> None:
    """Pack the digits into DEST/train and DEST/test."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[
        ..., None
    ]  # (1797, 8, 8, 1), 0..16 -> 0..255
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    classes = [str(name) for name in digits.target_names]
    for split, rows in (("train", order[TEST_IMAGES:]), ("test", order[:TEST_IMAGES])):
        folder = dest / split
        if not (folder / "index.safetensors").exists():
            pack_arrays(images[rows], digits.target[rows], classes, folder, 500)
        print(f"{folder}: {len(open_shards(str(folder)))} images")


if __name__ == "__main__":
    tyro.cli(main)
