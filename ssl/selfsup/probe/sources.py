"""What a probe is given: encoders fit to be averaged, labelled data fit to be compared on."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro

from selfsup.checkpoint import Weights
from selfsup.data.index import ShardIndex, open_shards
from selfsup.data.tokens import TokenIndex
from selfsup.export.frozen import FrozenEncoder
from selfsup.export.load import load_frozen
from selfsup.memory import keep_freed_memory
from selfsup.probe.features import Device, choose_device
from selfsup.text.load import TextRun

Probed = FrozenEncoder | TextRun
"""What a probe is of: images or text."""

Baseline = Literal["pixels", "random"]
"""pixels: the raw image as the feature; random: the encoder as initialised, never trained."""

PIXEL_LIMIT = 2**30
"""Bytes of raw pixels above which that baseline is left out: the regression holds several copies."""
MOST_CLASSES = 100_000
"""Labels are below it: classifiers have a column for each number up to the largest."""


@dataclass(frozen=True)
class Setup:
    """What a supervised probe reads, with which seeds, and where it computes and writes."""

    train: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None
    """Shards with labels to fit on; default: the run's own data.shards."""
    test: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None
    """Shards with labels to score on; default: the folder `test` beside the training shards."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON to write; default: a file of its own in RUN/probe, for the first run."""
    weights: Weights = "trained"
    """Of a run: those of the last step, their average over steps (optim.ema), or byol's target network."""
    seeds: tuple[int, ...] = (0,)
    """Of the probe: one fit each, from its own initial weights, order, crops and draws."""
    device: Device = "auto"
    """auto: CUDA where there is one."""
    threads: int | None = None
    """torch's threads in this process; default: as torch chooses."""
    workers: int = 0
    """Loader processes; 0 loads in this one."""
    bf16: bool = False
    """Matrix products in bfloat16 (autocast)."""

    def __post_init__(self) -> None:
        expect_seeds(self.seeds)
        expect(self.threads is None or self.threads >= 1, "--threads", ">= 1", self.threads)
        expect(self.workers >= 0, "--workers", ">= 0", self.workers)
        expect_new(self.out)

    def start(self) -> torch.device:
        """Sets the number of threads; the device. Raises ValueError for cuda where there is none."""
        return start_computing(self.device, self.threads)


def start_computing(asked: Device, threads: int | None) -> torch.device:
    """Sets the number of threads; the device. Raises ValueError for cuda where there is none."""
    device = choose_device(asked)
    if device.type == "cpu":
        keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    return device


def expect_seeds(seeds: tuple[int, ...]) -> None:
    """Raises ValueError for none, for one given twice, and for one out of range."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds: expected one or more different seeds, got {_spaced(seeds)}")
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"--seeds: expected 0 <= seed < 2**32, got {_spaced(seeds)}")


def _spaced(seeds: tuple[int, ...]) -> str:
    return " ".join(map(str, seeds)) or "none"


def expect(holds: bool, option: str, expected: str, got: object) -> None:
    """Raises ValueError `--option: expected …, got …` where a condition on an option does not hold."""
    if not holds:
        raise ValueError(f"{option}: expected {expected}, got {got}")


def expect_new(out: Path | None) -> None:
    """Raises ValueError where the file named for a result exists, or has no place: before the work."""
    if out is None:
        return
    if out.exists():
        raise ValueError(f"--out {out}: already exists; remove it, or give another name")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        why = "cannot be written" if place.is_dir() else "is a file"
        raise ValueError(f"--out {out}: {place} {why}; give another name")


def expect_crop_scale(scale: tuple[float, float]) -> None:
    """Raises ValueError where the areas of random crops are out of range."""
    low, high = scale
    expect(0 < low <= high <= 1, "--crop-scale", "0 < least <= largest <= 1", f"{low:g} {high:g}")


class Labelled(NamedTuple):
    """Data to fit on and to score on."""

    train: ShardIndex
    test: ShardIndex
    classes: int
    """Labels are 0 .. classes - 1."""


def load_sources(sources: tuple[str, ...], weights: Weights = "trained") -> list[FrozenEncoder]:
    """The encoders, loaded and fit to be averaged; what was passed over goes to stderr.

    weights: see `load_frozen`. Raises ValueError for none, and for several that are not runs of one
    recipe, at one step, each with a seed of its own: their mean would be of nothing.
    """
    if not sources:
        raise ValueError("probe: expected a run folder or a model, got none")
    encoders = [load_frozen(source, weights) for source in sources]
    for encoder in encoders:
        for note in encoder.notes:
            print(note, file=sys.stderr)
    check_averaged(encoders)
    return encoders


def check_averaged(encoders: Sequence[Probed]) -> None:
    """Raises ValueError for several that are not runs of one recipe, at one step, each with a seed of its own."""
    first, rest = encoders[0], encoders[1:]
    seeds: dict[int, str] = {}
    for encoder in encoders if rest else []:
        if encoder.recipe is None or first.recipe is None:
            raise ValueError(f"{encoder.name}: only runs of selfsup are averaged; probe models one at a time")
        ours, theirs = _comparable(first), _comparable(encoder)
        unlike = sorted(key for key in ours if ours[key] != theirs[key])
        if unlike:
            raise ValueError(
                f"{encoder.name}: differs from {first.name} in {', '.join(unlike)}; only runs that differ in "
                f"their seed are averaged: probe them one at a time"
            )
        seed = encoder.recipe.seed
        if seed in seeds:
            raise ValueError(
                f"{encoder.name}: has the seed of {seeds[seed]}, {seed}; give runs of different seeds"
            )
        seeds[seed] = encoder.name


def _comparable(encoder: Probed) -> dict[str, Any]:
    """What runs that are averaged must share."""
    assert encoder.recipe is not None
    sections = encoder.recipe.model_dump(mode="json", exclude={"run", "seed"})
    return {**sections, "step": _state(encoder)["step"]}


def _state(encoder: Probed) -> dict[str, Any]:
    """state.json of the encoder's checkpoint; empty without one."""
    return json.loads((encoder.checkpoint / "state.json").read_text()) if encoder.checkpoint else {}


def default_shards(encoders: list[FrozenEncoder], train: str | None, test: str | None) -> tuple[str, str]:
    """Training and test shards: as given, else those of the run. Raises ValueError saying what to give."""
    recipe = encoders[0].recipe
    if train is None:
        if recipe is None:
            raise ValueError(
                f"{encoders[0].name}: has no data of its own; give --train SHARDS and --test SHARDS"
            )
        train = recipe.data.shards
    if test is None:
        sibling = Path(train).parent / "test"
        if not sibling.is_dir():
            raise ValueError(f"no folder {sibling} beside the training shards; give --test SHARDS")
        test = str(sibling)
    return train, test


def open_labelled(train: str, test: str) -> Labelled:
    """Opens both folders of shards.

    Raises ValueError where labels are missing, the two sets do not belong together, or the training
    set has fewer than two classes.
    """
    indices = open_shards(train), open_shards(test)
    return Labelled(*indices, check_labels(*indices))


def pixels_too_large(encoder: FrozenEncoder, train: ShardIndex, test: ShardIndex) -> str | None:
    """Why the raw pixels of both sets, at the encoder's input size, are left out; None if they are not."""
    needed = (len(train) + len(test)) * encoder.in_chans * encoder.img_size**2 * 4
    if needed <= PIXEL_LIMIT:
        return None
    return f"left out, would take {needed / 2**30:.1f} GiB (limit {PIXEL_LIMIT / 2**30:.0f})"


def check_labels(train: ShardIndex | TokenIndex, test: ShardIndex | TokenIndex) -> int:
    """How many classes there are: labels are below it.

    Raises ValueError where labels are missing or too large, the two sets do not belong together, or the training
    set has fewer than two classes.
    """
    for option, index in (("--train", train), ("--test", test)):
        missing = np.flatnonzero(index.label < 0)
        if len(missing):
            images = isinstance(index, ShardIndex) and index.kind == "images"
            line = "" if images else ', or JSONL with a "label" a line'
            raise ValueError(
                f"{option} {index.folder}: {len(missing)} of {len(index)} samples have no label, first "
                f"{_name(index, missing[0])}; a probe needs them all: pack the samples in one folder per class{line}"
            )
        large = np.flatnonzero(index.label >= MOST_CLASSES)
        if len(large):
            raise ValueError(
                f"{option} {index.folder}: expected labels below {MOST_CLASSES:,}, got {index.label[large[0]]} of "
                f"{_name(index, large[0])}; number the classes from 0"
            )
    if _texts(train) == _texts(test):
        raise ValueError(f"--test {test.folder}: holds the same samples as --train; give other shards")
    if train.classes and test.classes and train.classes != test.classes:
        unlike = sorted(set(train.classes) ^ set(test.classes)) or list(test.classes)
        raise ValueError(
            f"--test {test.folder}: its classes are not those of --train, so that labels would be mixed up: "
            f"{len(unlike)} differ, first {unlike[0]}; pack both with the same class folders"
        )
    labels = np.unique(train.label)
    if len(labels) < 2:
        raise ValueError(f"--train {train.folder}: expected two classes or more, got {len(labels)}")
    return int(max(train.label.max(), test.label.max())) + 1


def _name(index: ShardIndex | TokenIndex, row: np.integer) -> str:
    return index.key(int(row)) if isinstance(index, ShardIndex) else f"document {row}"


def _texts(index: ShardIndex | TokenIndex) -> str:
    """What tells the samples; tokens are told by the text they were made from."""
    return index.fingerprint if isinstance(index, ShardIndex) else index.source or index.fingerprint


def describe_source(encoder: Probed) -> dict[str, Any]:
    """Name, checkpoint, weights, feature, seed, step and recipe of an encoder, JSON values."""
    state = _state(encoder)
    return {
        "name": encoder.name,
        "checkpoint": str(encoder.checkpoint) if encoder.checkpoint else None,
        "weights": encoder.weights,
        "feature": encoder.describe,
        "seed": encoder.recipe.seed if encoder.recipe else None,
        "step": state.get("step"),
        "samples": state.get("samples"),
        "recipe": encoder.recipe.model_dump(mode="json", exclude={"run"}) if encoder.recipe else None,
    }


def describe_data(shards: str, index: ShardIndex | TokenIndex) -> dict[str, Any]:
    """Where the samples are, their fingerprint and counts, JSON values."""
    return {
        "shards": shards,
        "fingerprint": index.fingerprint,
        "samples": len(index),
        "classes": len(index.classes) or len(np.unique(index.label)),
    }


def run_folder(encoder: Probed) -> Path | None:
    """The run folder that holds the encoder's checkpoint; None for one that lies elsewhere."""
    if encoder.checkpoint is None or encoder.checkpoint.absolute().parent.name != "checkpoints":
        return None
    return encoder.checkpoint.absolute().parent.parent
