"""Probe frozen encoders against raw pixels and against the same encoder before training."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console

from selfsup.data.index import ShardIndex, open_shards
from selfsup.export.load import FrozenEncoder, load_frozen
from selfsup.probe import knn, logreg
from selfsup.probe.features import (
    CROP,
    Device,
    Features,
    choose_device,
    encoder_features,
    pixel_features,
    random_encoder,
)
from selfsup.probe.report import ProbeResult, Score, print_result, save_result

PIXEL_LIMIT = 2**30
"""Bytes of raw pixels above which that baseline is left out: the regression holds several copies."""

_LIBRARIES = ("selfsup", "torch", "scikit-learn", "numpy")


def main_probe(
    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")],
    /,
    *,
    train: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    test: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    device: Device = "auto",
    batch_size: int = 256,
    workers: int = 0,
    bf16: bool = False,
) -> None:
    """Measure frozen features by logistic regression and kNN, beside raw pixels and random weights.

    Several runs that differ in their seed give means and standard deviations.

    Args:
        runs: run or checkpoint folders of one recipe, or one model: a folder, timm:NAME, hf:NAME.
        train: shards with labels to fit on; default: the run's own data.shards.
        test: shards with labels to score on; default: the folder `test` beside the training shards.
        out: JSON to write; default RUN/probe/step-N-DATA.json in the first run folder.
        device: auto: CUDA where there is one.
        batch_size: images per forward pass.
        workers: loader processes; 0 loads in this one.
        bf16: compute features in bfloat16.
    """
    encoders = load_sources(runs)
    train, test = default_shards(encoders, train, test)
    result = probe(encoders, train, test, choose_device(device), batch_size, workers, bf16)
    print_result(result, Console())
    path = out or _default_path(encoders[0], result)
    if path is None:
        print("no JSON written: the model has no run folder; name a file with --out")
    else:
        save_result(result, path)
        print(f"written to {path}")


def load_sources(sources: tuple[str, ...]) -> list[FrozenEncoder]:
    """The encoders, loaded and fit to be averaged.

    Raises ValueError for none, and for several that are not runs of one recipe, at one step, each
    with a seed of its own: their mean would be of nothing.
    """
    if not sources:
        raise ValueError("probe: expected a run folder or a model, got none")
    encoders = [load_frozen(source) for source in sources]
    for encoder in encoders:
        for note in encoder.notes:
            print(note, file=sys.stderr)
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
    return encoders


def _comparable(encoder: FrozenEncoder) -> dict[str, Any]:
    """What runs that are averaged must share."""
    assert encoder.recipe is not None
    sections = encoder.recipe.model_dump(mode="json", exclude={"run", "seed"})
    return {**sections, "step": _state(encoder)["step"]}


def _state(encoder: FrozenEncoder) -> dict[str, Any]:
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


def probe(
    encoders: list[FrozenEncoder],
    train: str,
    test: str,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    bf16: bool = False,
) -> ProbeResult:
    """Accuracies of both probes for raw pixels, random initialisation and the encoders.

    encoders: of one recipe (`load_sources`); train, test: folders of labelled shards. Pixels are
    taken at the encoder's input size, and left out beyond PIXEL_LIMIT. Random encoders start from
    the runs' own seeds; a model without a recipe has none. The result says what was left out.
    Raises ValueError for missing labels, train and test that are the same or have other classes,
    and for what reading and the probes refuse.
    """
    start = time.monotonic()
    indices, first = (open_shards(train), open_shards(test)), encoders[0]
    _check_labels(*indices)
    scores: dict[str, dict[str, Score]] = {}
    left_out: dict[str, str] = {}
    needed = sum(map(len, indices)) * first.in_chans * first.img_size**2 * 4
    if needed > PIXEL_LIMIT:
        gib = f"{needed / 2**30:.1f} GiB"
        left_out["pixels"] = f"left out, would take {gib} (limit {PIXEL_LIMIT / 2**30:.0f})"
    else:
        size, channels = first.img_size, first.in_chans
        pixels = (pixel_features(index, size, channels, batch_size, workers) for index in indices)
        scores["pixels"] = _scores([_score_pair(*pixels, "pixels")])

    def score(encoder: FrozenEncoder, title: str) -> dict[str, Any]:
        features = (
            encoder_features(encoder, index, batch_size, workers, device, bf16, title) for index in indices
        )
        return _score_pair(*features, title)

    recipes = [encoder.recipe for encoder in encoders if encoder.recipe is not None]
    if recipes:
        randoms = [random_encoder(recipe, recipe.seed) for recipe in recipes]
        scores["random"] = _scores([score(each, f"random {i + 1}") for i, each in enumerate(randoms)])
    else:
        left_out["random"] = "left out, a model without a recipe of ours cannot be initialised anew"
    scores["pretrained"] = _scores([score(each, f"pretrained {i + 1}") for i, each in enumerate(encoders)])
    return ProbeResult(
        scores=scores,
        left_out=left_out,
        sources=tuple(map(_describe, encoders)),
        recipe={
            "features": "frozen, computed once",
            "crop": CROP,
            "img_size": first.img_size,
            "computed_in": "bfloat16" if bf16 else "float32",
            "knn": knn.RECIPE,
            "logreg": logreg.RECIPE,
        },
        data={"train": _describe_data(train, indices[0]), "test": _describe_data(test, indices[1])},
        versions={library: version(library) for library in _LIBRARIES},
        seconds=time.monotonic() - start,
    )


def _score_pair(train: Features, test: Features, title: str) -> dict[str, Any]:
    """Both probes on one kind of feature, JSON values."""
    regression = logreg.logreg(train, test, f"{title}, logistic regression")
    return {"knn": knn.knn_accuracy(train, test), "logreg": regression._asdict()}


def _scores(seeds: list[dict[str, Any]]) -> dict[str, Score]:
    regressions = [dict(seed["logreg"]) for seed in seeds]
    accuracies = tuple(regression.pop("accuracy") for regression in regressions)
    return {
        "logreg": Score(accuracies, tuple(regressions)),
        "knn": Score(tuple(seed["knn"] for seed in seeds)),
    }


def _check_labels(train: ShardIndex, test: ShardIndex) -> None:
    """Raises ValueError where labels are missing or the two sets do not belong together."""
    for option, index in (("--train", train), ("--test", test)):
        missing = np.flatnonzero(index.label < 0)
        if len(missing):
            raise ValueError(
                f"{option} {index.folder}: {len(missing)} of {len(index)} samples have no label, first "
                f"{index.key(int(missing[0]))}; a probe needs them all: pack images in one folder per class"
            )
    if train.fingerprint == test.fingerprint:
        raise ValueError(f"--test {test.folder}: holds the same samples as --train; give other shards")
    if train.classes and test.classes and train.classes != test.classes:
        unlike = sorted(set(train.classes) ^ set(test.classes)) or list(test.classes)
        raise ValueError(
            f"--test {test.folder}: its classes are not those of --train, so that labels would be mixed up: "
            f"{len(unlike)} differ, first {unlike[0]}; pack both with the same class folders"
        )


def _describe(encoder: FrozenEncoder) -> dict[str, Any]:
    state = _state(encoder)
    return {
        "name": encoder.name,
        "checkpoint": str(encoder.checkpoint) if encoder.checkpoint else None,
        "feature": encoder.describe,
        "seed": encoder.recipe.seed if encoder.recipe else None,
        "step": state.get("step"),
        "samples": state.get("samples"),
        "recipe": encoder.recipe.model_dump(mode="json", exclude={"run"}) if encoder.recipe else None,
    }


def _describe_data(shards: str, index: ShardIndex) -> dict[str, Any]:
    return {
        "shards": shards,
        "fingerprint": index.fingerprint,
        "samples": len(index),
        "classes": len(index.classes) or len(np.unique(index.label)),
    }


def _default_path(encoder: FrozenEncoder, result: ProbeResult) -> Path | None:
    """RUN/probe/step-N-DATA.json: another step or other data makes another file."""
    if encoder.checkpoint is None or encoder.checkpoint.absolute().parent.name != "checkpoints":
        return None
    seeds = len(result.sources)
    name = f"{encoder.checkpoint.name}-{result.data['test']['fingerprint'][:8]}"
    name += f"-{seeds}-seeds" if seeds > 1 else ""
    return encoder.checkpoint.absolute().parent.parent / "probe" / f"{name}.json"
