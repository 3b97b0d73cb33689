"""Probe frozen encoders against raw pixels and against the same encoder before training."""

import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from selfsup.checkpoint import Weights
from selfsup.export.frozen import FrozenEncoder
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
from selfsup.probe.report import ProbeResult, Score, publish
from selfsup.probe.sources import (
    Baseline,
    default_shards,
    describe_data,
    describe_source,
    expect,
    expect_new,
    load_sources,
    open_labelled,
    pixels_too_large,
)

_LIBRARIES = ("selfsup", "torch", "scikit-learn", "numpy")


def main_probe(
    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")],
    /,
    *,
    train: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    test: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    weights: Weights = "trained",
    device: Device = "auto",
    batch_size: int = 256,
    workers: int = 0,
    bf16: bool = False,
    baselines: tuple[Literal["pixels", "random"], ...] = ("pixels", "random"),
) -> None:
    """Measure frozen features by logistic regression and kNN, beside raw pixels and random weights.

    Several runs that differ in their seed give means and standard deviations. Other probes have commands
    of their own: selfsup probe linear, attentive, finetune, fewshot, representation; show prints results.

    Args:
        runs: run or checkpoint folders of one recipe, or one model: a folder, timm:NAME, hf:NAME.
        train: shards with labels to fit on; default: the run's own data.shards.
        test: shards with labels to score on; default: the folder `test` beside the training shards.
        out: JSON to write; default: a file of its own in RUN/probe, for the first run.
        weights: those of the last step, their average over steps (optim.ema), or byol's target network.
        device: auto: CUDA where there is one.
        batch_size: images per forward pass.
        workers: loader processes; 0 loads in this one.
        bf16: compute features in bfloat16.
        baselines: what to measure beside; the regression on raw pixels can take minutes.
    """
    expect_new(out)
    expect(batch_size >= 1, "--batch-size", ">= 1", batch_size)
    expect(workers >= 0, "--workers", ">= 0", workers)
    encoders = load_sources(runs, weights)
    train, test = default_shards(encoders, train, test)
    result = probe(encoders, train, test, choose_device(device), batch_size, workers, bf16, baselines)
    publish(result, encoders[0], out, Console())


def probe(
    encoders: list[FrozenEncoder],
    train: str,
    test: str,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    bf16: bool = False,
    baselines: Iterable[Baseline] = ("pixels", "random"),
) -> ProbeResult:
    """Accuracies of both probes for the encoders and, where asked for, raw pixels and random initialisation.

    encoders: of one recipe (`sources.load_sources`); train, test: folders of labelled shards. Pixels are
    taken at the encoder's input size, and left out beyond `sources.PIXEL_LIMIT`. Random encoders start from
    the runs' own seeds; a model without a recipe has none. The result says what was left out.
    Raises ValueError for missing labels, train and test that are the same or have other classes,
    and for what reading and the probes refuse.
    """
    start, first = time.monotonic(), encoders[0]
    *indices, _ = open_labelled(train, test)
    scores: dict[str, dict[str, Score]] = {}
    left_out = {kind: "left out, not asked for" for kind in ("pixels", "random") if kind not in baselines}
    reason = pixels_too_large(first, *indices)
    if "pixels" in baselines and reason is not None:
        left_out["pixels"] = reason
    elif "pixels" in baselines:
        size, channels = first.img_size, first.in_chans
        pixels = (pixel_features(index, size, channels, batch_size, workers) for index in indices)
        scores["pixels"] = _scores([_score_pair(*pixels, "pixels")])

    def score(encoder: FrozenEncoder, title: str) -> dict[str, Any]:
        features = (
            encoder_features(encoder, index, batch_size, workers, device, bf16, title) for index in indices
        )
        return _score_pair(*features, title)

    recipes = [encoder.recipe for encoder in encoders if encoder.recipe is not None]
    if "random" in baselines and recipes:
        randoms = [random_encoder(recipe, recipe.seed) for recipe in recipes]
        scores["random"] = _scores([score(each, f"random {i + 1}") for i, each in enumerate(randoms)])
    elif "random" in baselines:
        left_out["random"] = "left out, a model without a recipe of ours cannot be initialised anew"
    scores["pretrained"] = _scores([score(each, f"pretrained {i + 1}") for i, each in enumerate(encoders)])
    return ProbeResult(
        probe="frozen",
        mode="fast",
        scores=scores,
        spread="runs",
        left_out=left_out,
        sources=tuple(map(describe_source, encoders)),
        recipe={
            "features": "frozen, computed once",
            "crop": CROP,
            "img_size": first.img_size,
            "computed_in": "bfloat16" if bf16 else "float32",
            "baselines": sorted(baselines),
            "knn": knn.RECIPE,
            "logreg": logreg.RECIPE,
        },
        data={"train": describe_data(train, indices[0]), "test": describe_data(test, indices[1])},
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
