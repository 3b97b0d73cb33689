"""What the supervised probes share: encoders and seeds in, one result out."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from selfsup.export.frozen import FrozenEncoder
from selfsup.probe.features import CROP, random_encoder
from selfsup.probe.report import Mode, ProbeResult, Score
from selfsup.probe.sources import (
    Baseline,
    Labelled,
    Setup,
    default_shards,
    describe_data,
    describe_source,
    open_labelled,
    pixels_too_large,
)

LIBRARIES = ("selfsup", "torch", "timm", "scikit-learn", "numpy")


class Trial(NamedTuple):
    """What one encoder scored with one seed of the probe."""

    accuracies: dict[str, float]
    """Probe (a column of the report) -> accuracy, 0..1."""
    details: dict[str, Any]
    """How they came about, JSON values."""


Measure = Callable[[FrozenEncoder, Labelled, torch.device], list[Trial]]
"""Probes one encoder: a trial for each seed of the set-up, in order."""


def supervised(
    probe: str,
    mode: Mode,
    encoders: list[FrozenEncoder],
    setup: Setup,
    recipe: Any,
    measure: Measure,
    baselines: Iterable[Baseline] = (),
    kind: str = "pretrained",
) -> ProbeResult:
    """Runs `measure` on every encoder and on the baselines asked for.

    recipe: the probe's dataclass of settings. kind: the row of the report that the encoders stand in.
    Several runs give one value each, the mean over the seeds of the probe; one run gives a value for
    each seed. Raises ValueError for what opening the data refuses, and for a random baseline of a
    model without a recipe.
    """
    start, device = time.monotonic(), setup.start()
    train, test = default_shards(encoders, setup.train, setup.test)
    data = open_labelled(train, test)
    rows = {kind: encoders}
    if "random" in baselines:
        recipes = [encoder.recipe for encoder in encoders if encoder.recipe is not None]
        if len(recipes) < len(encoders):
            raise ValueError(
                f"--baselines random: {encoders[0].name} has no recipe of ours to be initialised from"
            )
        rows["random"] = [random_encoder(recipe, recipe.seed) for recipe in recipes]
    left_out = {}
    if "pixels" in baselines:
        reason = pixels_too_large(encoders[0], data.train, data.test)
        if reason is None:
            rows["pixels"] = [pixel_encoder(encoders[0])]
        else:
            left_out["pixels"] = reason
    trials = {row: [measure(each, data, device) for each in members] for row, members in rows.items()}
    return ProbeResult(
        probe=probe,
        mode=mode,
        scores={row: trial_scores(found, setup.seeds, len(encoders) > 1) for row, found in trials.items()},
        spread=(
            "runs, each the mean over the seeds of the probe" if len(encoders) > 1 else "seeds of the probe"
        ),
        left_out=left_out,
        sources=tuple(map(describe_source, encoders)),
        recipe={
            **asdict(recipe),
            "seeds": list(setup.seeds),
            "baselines": sorted(baselines),
            "test_crop": CROP,
            "img_size": encoders[0].img_size,
            "computed_in": "bfloat16" if setup.bf16 else "float32",
        },
        data={"train": describe_data(train, data.train), "test": describe_data(test, data.test)},
        versions={
            **{library: version(library) for library in LIBRARIES},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": str(torch.get_num_threads()),
        },
        seconds=time.monotonic() - start,
    )


def pixel_encoder(like: FrozenEncoder) -> FrozenEncoder:
    """The image itself, in [0, 1], as the feature, at the input size of `like`."""
    return FrozenEncoder(
        name="pixels",
        module=torch.nn.Identity(),
        img_size=like.img_size,
        in_chans=like.in_chans,
        mean=(0.0,) * like.in_chans,
        std=(1.0,) * like.in_chans,
        describe="the pixels",
        pooled=lambda images: images.flatten(1),
        patches=lambda images: images.flatten(2).transpose(1, 2),  # (b, h*w, c)
    )


def trial_scores(found: list[list[Trial]], seeds: tuple[int, ...], by_run: bool) -> dict[str, Score]:
    """found: trials by seed, for each encoder. by_run: a value for each encoder, else for each seed."""
    scores = {}
    for name in found[0][0].accuracies:
        values = [[trial.accuracies[name] for trial in trials] for trials in found]
        details = [
            [
                {"seed": seed, "accuracy": value, **trial.details}
                for seed, value, trial in zip(seeds, row, trials)
            ]
            for row, trials in zip(values, found)
        ]
        if by_run:
            means = tuple(statistics.fmean(row) for row in values)
            scores[name] = Score(means, tuple({"seeds": each} for each in details))
        else:
            scores[name] = Score(tuple(values[0]), tuple(details[0]))
    return scores
