"""`selfsup look`: what a pretrained run sees, as pictures and as TensorBoard entries."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

from selfsup.checkpoint import Weights, load_objective, weights_suffix
from selfsup.data.index import open_shards
from selfsup.durable import fsync_path
from selfsup.look.draw import Loaded, look
from selfsup.look.measure import keyed_rows

MOST_POINTS = 5000
"""TensorBoard's projector becomes slow beyond."""
_ABOUT = "look.json"


def main_look(
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    shards: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    weights: Weights = "trained",
    samples: int = 8,
    views: int = 8,
    neighbours: int = 8,
    points: int = 2000,
    seed: int = 0,
) -> None:
    """Pictures of what a run learned: attention, reconstructions, training views, nearest neighbours,
    and an embedding for TensorBoard's projector.

    Args:
        run: run or checkpoint folder.
        shards: folder of WebDataset shards to look at, held-out ones if there are any; default: those
            that the run trained on.
        out: folder for PNG files and TensorBoard entries; default RUN/look/step-N, with -ema behind it for
            averaged weights. An earlier look is replaced.
        weights: those of the last step, or their average over steps (of a run with optim.ema); a target
            network is not looked at.
        samples: images shown.
        views: training views of each.
        neighbours: nearest neighbours of each.
        points: random images among which neighbours are sought and which the projector shows.
        seed: another seed picks other images.
    """
    _check_counts(samples, views, neighbours, points)
    loaded = load_run(run, weights)
    folder = _folder(loaded, out, weights)
    index = open_shards(shards if shards is not None else loaded.recipe.data.shards)
    if shards is None:
        print(f"looking at training images of {index.folder}; held-out ones with --shards")
    rows = keyed_rows(len(index), points, seed)  # at least `samples` of them: see _check_counts
    if len(index) < points:
        print(f"{index.folder}: fewer than --points {points}: all {len(index)} images are used")
    asked = {"samples": samples, "views": views, "neighbours": neighbours, "points": points, "seed": seed}
    with _replacing(folder) as tmp:
        with SummaryWriter(tmp) as board:
            about = look(loaded, index, rows, samples, views, neighbours, tmp, board)
        content = {
            "checkpoint": str(loaded.checkpoint),
            "step": loaded.step,
            "weights": weights,
            **asked,
            **about,
        }
        (tmp / _ABOUT).write_text(json.dumps(content, indent=1))
    print(f"{folder}: {len(list(folder.glob('*.png')))} pictures, {_ABOUT}")
    print(f"see also: tensorboard --logdir {folder}")


def _check_counts(samples: int, views: int, neighbours: int, points: int) -> None:
    for name, value in (("samples", samples), ("views", views), ("neighbours", neighbours)):
        if value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    if not max(samples, neighbours + 1) <= points <= MOST_POINTS:
        raise ValueError(
            f"--points: expected --samples {samples} and more than --neighbours {neighbours}, at most "
            f"{MOST_POINTS} (the projector's limit), got {points}"
        )


def load_run(source: Path, weights: Weights = "trained") -> Loaded:
    """The whole objective of a run or checkpoint, in eval mode; prints what was passed over."""
    objective, recipe, checkpoint, passed_over = load_objective(source, weights)
    for line in passed_over:
        print(line)
    if recipe.encoder.reads == "text":
        command = "fill" if recipe.objective.name == "mlm" else "generate"
        raise ValueError(
            f"{source}: a run of text (objective {recipe.objective.name}), expected images; for text: selfsup {command}"
        )
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Loaded(objective.requires_grad_(False).to(device), recipe, checkpoint, step, device)


def _folder(loaded: Loaded, out: Path | None, weights: Weights) -> Path:
    """Where the pictures go. Raises ValueError for a folder that holds something else."""
    folder = out
    if folder is None:
        checkpoints = loaded.checkpoint.absolute().parent
        if checkpoints.name != "checkpoints":
            raise ValueError(f"{loaded.checkpoint}: lies in no run folder; say where to write with --out DIR")
        folder = checkpoints.parent / "look" / f"step-{loaded.step:08d}{weights_suffix(weights)}"
    if folder.exists() and not (folder / _ABOUT).exists():
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(f"--out {folder}: exists and is not an earlier look; give another name")
    return folder


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` once all is written, or vanishes."""
    folder = folder.absolute()
    tmp = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # of a look that was killed
        tmp.mkdir(parents=True)
        yield tmp
        for path in tmp.rglob("*"):
            fsync_path(path)
        if folder.exists():
            shutil.rmtree(folder)  # an earlier look, or empty: see _folder
        os.rename(tmp, folder)
        fsync_path(folder.parent)
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot write it: {error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
