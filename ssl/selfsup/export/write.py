"""What every export shares: where it is written, how it appears whole or not at all, what it reports."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from selfsup.checkpoint import Weights, weights_suffix
from selfsup.durable import fsync_path
from selfsup.encoders import AnyEncoderConfig, EncoderConfig
from selfsup.encoders.text import TextConfig
from selfsup.encoders.vit import ViTConfig
from selfsup.export.verify import Check


class ExportReport(NamedTuple):
    """What an export wrote and what its verification measured."""

    folder: Path
    checkpoint: Path
    step: int
    checks: tuple[Check, ...]
    """One per library and number format."""
    notes: tuple[str, ...]
    """What was passed over or not checked, a sentence each."""
    load: str
    """How to load it, a phrase; `DIR` stands for the folder."""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json: step, samples, index fingerprint, git revision, ...; with them `collapsed_at`,
    where the run that it belongs to ended collapsed."""
    state = json.loads((checkpoint / "state.json").read_text())
    outcome = checkpoint.absolute().parent.parent / "outcome.json"
    collapsed_at = json.loads(outcome.read_text()).get("collapsed_at") if outcome.exists() else None
    return state if collapsed_at is None else {**state, "collapsed_at": collapsed_at}


def destination(to: str, checkpoint: Path, step: int, out: Path | None, weights: Weights) -> Path:
    """The folder to write: `out`, else RUN/export/TO-step-N, with -ema or -target for other weights.

    Raises ValueError where it exists, and without `out` for a checkpoint outside a run folder.
    """
    parent = checkpoint.absolute().parent
    if out is None and parent.name != "checkpoints":
        raise ValueError(f"{checkpoint}: lies in no run folder; say where to write with --out")
    final = out or checkpoint.parent.parent / "export" / f"{to}-step-{step}{weights_suffix(weights)}"
    if final.exists():
        raise ValueError(f"{final}: already exists; remove it, or give another folder with --out")
    return final


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """An empty folder `.tmp-…` beside `final` to write and verify in; fsynced and renamed at the end.

    A failure inside leaves nothing behind. Raises ValueError where the disk refuses.
    """
    tmp = final.parent / f".tmp-{final.name}"
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # left by a killed export
        tmp.mkdir(parents=True)
        yield tmp
        for path in (*tmp.iterdir(), tmp):
            fsync_path(path)
        os.rename(tmp, final)
        fsync_path(final.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        raise ValueError(f"{final}: export NOT written: {error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """`model.safetensors`, with the metadata that transformers asks for."""
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def expect_images(to: str, encoder: AnyEncoderConfig) -> EncoderConfig:
    """The encoder's config, where it reads images. Raises ValueError for one of text."""
    if isinstance(encoder, TextConfig):
        raise ValueError(
            f"--to {to}: encoder.name is text, expected an encoder of images; NOT exported, use --to hf"
        )
    return encoder


def expect_vit(to: str, encoder: AnyEncoderConfig) -> ViTConfig:
    """The encoder's config, where it is our ViT. Raises ValueError for a backbone of timm's: the target
    builds only vision transformers with the names it knows."""
    encoder = expect_images(to, encoder)
    if not isinstance(encoder, ViTConfig):
        raise ValueError(
            f"--to {to}: encoder.name is timm ({encoder.model}), expected vit; NOT exported, use --to timm"
        )
    return encoder


def unlike_plain_vit(encoder: ViTConfig) -> dict[str, bool]:
    """Reasons for `refuse`: what ViTConfig can say beyond the ViT of Dosovitskiy et al. 2021."""
    return {
        f"encoder.pos_embed is {encoder.pos_embed}": encoder.pos_embed == "rope",
        f"encoder.reg_tokens is {encoder.reg_tokens}": encoder.reg_tokens > 0,
        "encoder.pre_norm is true": encoder.pre_norm,
        "encoder.patch_bias is false": not encoder.patch_bias,
        f"encoder.activation is {encoder.activation}": encoder.activation != "gelu",
        f"encoder.layer_scale is {encoder.layer_scale}": encoder.layer_scale is not None,
    }


def refuse(to: str, cannot: dict[str, bool]) -> None:
    """Raises ValueError with the first reason that holds.

    cannot: reason -> whether it holds here; a reason says what the model has and what the target lacks.
    """
    for reason, holds in cannot.items():
        if holds:
            hint = "" if to == "timm" else ", try --to timm"
            raise ValueError(f"--to {to}: {reason}; NOT exported{hint}")
