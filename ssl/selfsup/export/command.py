"""The `selfsup export` command."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from selfsup.checkpoint import Weights, find_checkpoint, read_recipe
from selfsup.encoders.text import TextConfig
from selfsup.export.facebook import export_mae
from selfsup.export.huggingface import export_hf
from selfsup.export.huggingface_mae import export_hf_mae
from selfsup.export.huggingface_text import export_hf_text
from selfsup.export.timm import export_timm
from selfsup.export.torchvision import export_torchvision
from selfsup.export.write import ExportReport


def main_export(
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    to: Literal["timm", "hf", "hf-mae", "mae", "torchvision"] = "timm",
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    weights: Weights = "trained",
) -> None:
    """Write the pretrained model for another library; reloads it there and compares outputs.

    Args:
        run: run folder (its newest whole checkpoint) or a checkpoint folder.
        to: timm: a folder that timm and transformers' AutoModel load; hf: transformers' ViTModel, and of text
            its BERT, Megatron-BERT, GPT-2 or Llama, with head and tokenizer; hf-mae: transformers'
            ViTMAEForPreTraining, with the decoder; mae: facebookresearch/mae's checkpoint.pth, with the
            decoder; torchvision: its VisionTransformer, or a ResNet that timm names the same.
        out: folder to write; default RUN/export/TO-step-N, with -ema or -target behind it for other weights.
        weights: those of the last step, their average over steps (optim.ema), or byol's target network.
    """
    exports = {
        "timm": export_timm,
        "hf": export_transformers,
        "hf-mae": export_hf_mae,
        "mae": export_mae,
        "torchvision": export_torchvision,
    }
    report = exports[to](run, out, weights)
    for note in report.notes:
        print(note)
    for check in report.checks:
        print(check.sentence)
    print(f"exported {report.checkpoint} to {report.folder}")
    print(f"load it with {report.load.replace('DIR', str(report.folder))}")


def export_transformers(source: Path, out: Path | None, weights: Weights) -> ExportReport:
    """`export_hf_text` for a run of text, else `export_hf`."""
    checkpoint, _ = find_checkpoint(source)
    text = isinstance(read_recipe(checkpoint).encoder, TextConfig)
    return (export_hf_text if text else export_hf)(source, out, weights)
