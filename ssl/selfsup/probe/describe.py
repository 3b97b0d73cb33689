"""Describe frozen features without labels: spread, invariance, likeness to the random start."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from jaxtyping import Float32, Int64, UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from selfsup.batch import normalise
from selfsup.checkpoint import Weights, weights_suffix, weights_title
from selfsup.data.decode import decode_image
from selfsup.data.images import EvalImages, ImageData
from selfsup.data.index import ShardIndex, open_shards
from selfsup.data.loader import load
from selfsup.data.reader import ShardReader
from selfsup.data.views import augment
from selfsup.durable import write_atomically
from selfsup.export.frozen import FrozenEncoder
from selfsup.probe import representation
from selfsup.probe.features import CROP, Device, choose_device, random_encoder
from selfsup.probe.online import fixed_rows
from selfsup.probe.report import REPRESENTATION
from selfsup.probe.sources import describe_source, expect_new, load_sources, run_folder

RECIPE = {
    "rankme": {"epsilon": representation.EPSILON, "centred": False},
    "alpha_req": {"fit_range": representation.FIT_RANGE, "weights": "1 / rank", "centred": True},
    "uniformity": {"t": 2, "pairs": "distinct", "centred": False},
    "alignment": {"alpha": 2, "views": "the first two"},
    "lidar": {"delta": representation.DELTA, "epsilon": representation.EPSILON},
    "cka": {"kernel": "linear", "form": "biased", "centred": True},
}
READING = {
    "feature_std": "0 collapsed, 1 spread",
    "rankme": "1 collapsed, {rank} most",
    "alpha_req": "0 flat, high: few dimensions",
    "uniformity": "0 collapsed, -4 uniform",
    "alignment": "0 views agree, 2 unrelated",
    "lidar": "1 collapsed, {view_rank} most",
}
KINDS = {"random": "random initialisation", "pretrained": "pretrained"}

_LIBRARIES = ("selfsup", "torch", "numpy")


@dataclass(frozen=True)
class Description:
    """What was measured and how."""

    metrics: dict[str, dict[str, float]]
    """random, pretrained -> metric -> value."""
    cka: float | None
    """Linear CKA between the two, on the same images."""
    left_out: dict[str, str]
    """`pretrained, alpha_req` -> why there is no number."""
    source: dict[str, Any]
    recipe: dict[str, Any]
    """Epsilons, ranges, crop, augmentation, number format."""
    data: dict[str, Any]
    """Shards and how many of their images were taken."""
    versions: dict[str, str]
    seconds: float
    """Wall time."""


def main_representation(
    run: Annotated[str, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    shards: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    samples: int = 5000,
    views: int = 10,
    view_samples: int = 1000,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    weights: Weights = "trained",
    device: Device = "auto",
    batch_size: int = 256,
    workers: int = 0,
    bf16: bool = False,
) -> None:
    """Describe frozen features without labels, pretrained beside random initialisation.

    RankMe, alpha-ReQ, uniformity, feature std on plain images; alignment and LiDAR on augmented
    views; linear CKA between the two encoders.

    Args:
        run: run or checkpoint folder; the views are drawn by its own augmentation (the first of several
            kinds of view).
        shards: images to take; default: the folder `test` beside the run's training shards.
        samples: most images taken, chosen at random but the same for every run.
        views: augmented views of an image, at least 2; LiDAR's paper takes 50.
        view_samples: most images of which views are taken.
        out: JSON to write; default RUN/probe/representation-step-N-DATA.json (-ema, -target: of other weights).
        weights: those of the last step, their average over steps (optim.ema), or byol's target network.
        device: auto: CUDA where there is one.
        batch_size: images per forward pass.
        workers: loader processes; 0 loads in this one.
        bf16: compute features in bfloat16.
    """
    expect_new(out)
    (encoder,) = load_sources((run,), weights)
    result = describe(
        encoder, shards, samples, views, view_samples, choose_device(device), batch_size, workers, bf16
    )
    print_description(result, Console())
    path = out or _default_path(encoder, result)
    if path is None:
        print("no JSON written: the checkpoint lies in no run folder; name a file with --out")
    else:
        _save(result, path)
        print(f"written to {path}")


def describe(
    encoder: FrozenEncoder,
    shards: str | None,
    samples: int,
    views: int,
    view_samples: int,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    bf16: bool = False,
) -> Description:
    """Every metric of `probe.representation` for the encoder and for its random start.

    encoder: of a run of ours; shards: none for the folder `test` beside the run's own. At most
    `samples` images, and `views` views of at most `view_samples` of them, are chosen by `fixed_rows`;
    views are drawn by the run's augmentation with seed 0, epoch 0, position = row and view = 1 to
    `views`: the same for every run of one augmentation. A metric that the features do not allow is
    left out with its reason.
    Raises ValueError for less than 10 samples, 2 views or 2 view samples, for an image that cannot
    be read, and for features that are not finite.
    """
    for option, value, least in (
        ("--samples", samples, 10),
        ("--views", views, 2),
        ("--view-samples", view_samples, 2),
        ("--batch-size", batch_size, 1),
        ("--workers", workers, 0),
    ):
        if value < least:
            raise ValueError(f"{option}: expected at least {least}, got {value}")
    start, recipe = time.monotonic(), encoder.recipe
    if recipe is None:
        raise ValueError(
            f"{encoder.name}: expected a run of selfsup, which has an augmentation and a random start to compare with"
        )
    if shards is None:
        shards = str(Path(recipe.data.shards).parent / "test")
        if not Path(shards).is_dir():
            raise ValueError(f"no folder {shards} beside the run's training shards; give --shards SHARDS")
    index = open_shards(shards)
    size, channels = encoder.img_size, encoder.in_chans
    encoders = [random_encoder(recipe, recipe.seed).to(device), encoder.to(device)]
    rows = np.sort(fixed_rows(len(index), samples))
    plain = load(EvalImages(index, size, channels), _split(rows, batch_size), workers, prefetch=2)
    one_view = (images[:, None] for images, _, _ in plain)  # (b, c, s, s) -> (b, 1, c, s, s)
    clean = [values[:, 0] for values in _features(encoders, one_view, len(rows), device, bf16, "images")]
    view_rows = np.sort(fixed_rows(len(index), view_samples))
    dataset = AugmentedViews(recipe.data, index, size, channels, views)
    augmented = load(dataset, _split(view_rows, max(1, batch_size // views)), workers, prefetch=2)
    viewed = _features(encoders, augmented, len(view_rows), device, bf16, "views")

    metrics, cka, left_out = _measure(clean, viewed)
    return Description(
        metrics=metrics,
        cka=cka,
        left_out=left_out,
        source={**describe_source(encoder), "width": clean[0].shape[1]},
        recipe={**RECIPE, "crop": CROP, "computed_in": "bfloat16" if bf16 else "float32"},
        data={
            "shards": shards,
            "fingerprint": index.fingerprint,
            "images": len(index),
            "samples": len(rows),
            "view_samples": len(view_rows),
            "views": views,
        },
        versions={library: version(library) for library in _LIBRARIES},
        seconds=time.monotonic() - start,
    )


def _measure(
    cleans: list[Float32[Tensor, "n d"]], vieweds: list[Float32[Tensor, "m q d"]]
) -> tuple[dict[str, dict[str, float]], float | None, dict[str, str]]:
    """The fields `metrics`, `cka` and `left_out` of a description; features in the order of KINDS."""
    metrics: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for kind, clean, viewed in zip(KINDS, cleans, vieweds):
        calls = {
            "feature_std": partial(representation.feature_std, clean),
            "rankme": partial(representation.rankme, clean),
            "alpha_req": partial(representation.alpha_req, clean),
            "uniformity": partial(representation.uniformity, clean),
            "alignment": partial(representation.alignment, viewed[:, 0], viewed[:, 1]),
            "lidar": partial(representation.lidar, viewed),
        }
        metrics[kind], reasons = _call(calls)
        left_out |= {f"{KINDS[kind]}, {name}": reason for name, reason in reasons.items()}
    both, reasons = _call({"cka": partial(representation.linear_cka, *cleans)})
    return metrics, both.get("cka"), left_out | reasons


def _call(calls: dict[str, Callable[[], float]]) -> tuple[dict[str, float], dict[str, str]]:
    """The values, and the reasons of metrics that these features do not allow."""
    values, reasons = {}, {}
    for name, call in calls.items():
        try:
            values[name] = call()
        except ValueError as error:
            reasons[name] = str(error)
    return values, reasons


class AugmentedViews(Dataset):
    """Map-style: from rows of the index to random views, by a recipe's augmentation (that of its first
    kind of view)."""

    def __init__(
        self, config: ImageData, index: ShardIndex, img_size: int, channels: int, views: int
    ) -> None:
        self.kind, self.index = config.kinds(img_size)[0], index
        self.img_size, self.channels = img_size, channels
        self.views = range(1, views + 1)  # view 0 is that of a run with one view of an image
        self.reader = ShardReader(index)

    def __getitems__(self, rows: Int64[np.ndarray, "b"]) -> UInt8[Tensor, "b q c s s"] | ValueError:
        try:
            blobs = self.reader.read(rows)
            names = [self.index.name(row) for row in rows]
            images = [decode_image(blob, self.channels, name) for blob, name in zip(blobs, names)]
        except ValueError as error:
            return error
        epoch = np.zeros_like(rows)
        drawn = [augment(self.kind, 0, epoch, rows, images, self.img_size, view) for view in self.views]
        return torch.stack(drawn, dim=1)


def _features(
    encoders: list[FrozenEncoder],
    batches: Iterable[UInt8[Tensor, "b q c s s"]],
    n: int,
    device: torch.device,
    bf16: bool,
    title: str,
) -> list[Float32[Tensor, "n q d"]]:
    """The features of `n` samples, of each encoder, images read once. Raises ValueError where one is not finite."""
    parts: list[list[Tensor]] = [[] for _ in encoders]
    with tqdm(total=n, desc=title, unit="img", disable=None) as bar:
        for images in batches:
            flat = images.to(device, non_blocking=True).flatten(0, 1)  # (b, q, c, s, s) -> (b q, c, s, s)
            for encoder, found in zip(encoders, parts):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    features = encoder.features(normalise(flat, encoder.mean, encoder.std))
                found.append(features.float().cpu().unflatten(0, images.shape[:2]))  # (b q, d) -> (b, q, d)
            bar.update(len(images))
    features = [torch.cat(found) for found in parts]
    for encoder, values in zip(encoders, features):
        broken = n - int(values.isfinite().flatten(1).all(dim=1).sum())
        if broken:
            raise ValueError(f"{encoder.name}: features of {broken} of {n} images are NaN or infinite")
    return features


def _split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def print_description(result: Description, console: Console) -> None:
    """The table, what was left out, and how many images there were."""
    data, width = result.data, result.source["width"]
    bounds = {
        "rank": min(data["samples"], width),
        "view_rank": min(data["view_samples"] - 1, width),
    }
    table = Table(
        title="frozen features, no labels" + weights_title(result.source["weights"]),
        caption=f"{data['samples']} of the {data['images']} images of {data['shards']}; alignment and lidar: "
        f"{data['views']} views of {data['view_samples']}",
    )
    table.add_column("metric")
    for title in KINDS.values():
        table.add_column(title, justify="right")
    table.add_column("reading")
    for name, reading in READING.items():
        values = (result.metrics[kind].get(name) for kind in KINDS)
        shown = ("-" if value is None else f"{value:.4g}" for value in values)
        table.add_row(name, *shown, reading.format(**bounds))
    console.print(table)
    if result.cka is not None:
        console.print(
            f"linear CKA between the two: {result.cka:.4f} (1: equal up to rotation and scale)",
            highlight=False,
        )
    for name, reason in result.left_out.items():
        console.print(f"{name} left out: {reason}", markup=False, highlight=False)


def _default_path(encoder: FrozenEncoder, result: Description) -> Path | None:
    """RUN/probe/representation-step-N-DATA.json: another step, other data or weights make another file."""
    folder = run_folder(encoder)
    if folder is None or encoder.checkpoint is None:
        return None
    name = f"{encoder.checkpoint.name}-{result.data['fingerprint'][:8]}{weights_suffix(encoder.weights)}"
    return folder / "probe" / f"{REPRESENTATION}{name}.json"


def _save(result: Description, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(result), indent=1, allow_nan=False).encode())
    except OSError as error:
        raise ValueError(f"{path}: cannot write the result: {error.strerror or error}") from error
