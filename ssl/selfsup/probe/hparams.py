"""A line in TensorBoard's HParams table for each probe of a run."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested JSON values to one level, keys joined by a dot; lists and None as text.

    TensorBoard refuses everything but numbers, booleans and text.
    """
    flat: dict[str, bool | int | float | str] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else _text(value)
    return flat


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).lower()


def write_hparams(hyperparameters: Mapping[str, Any], metrics: Mapping[str, float], folder: Path) -> None:
    """One HParams session in `folder`, which is RUN/tensorboard/NAME, in place of an earlier one.

    hyperparameters: nested JSON values. Raises ValueError where it cannot be written. Only the start and
    the end of a session are written: `SummaryWriter.add_hparams` also lists the columns of the whole
    table, and TensorBoard takes the list of the first session it meets, so that settings and
    metrics which only other probes have would not be shown.
    """
    tmp = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # left by a killed probe
        with SummaryWriter(tmp) as writer:
            _columns, started, ended = hparams(flatten(hyperparameters), dict(metrics))
            writer.file_writer.add_summary(started)
            writer.file_writer.add_summary(ended)
            for tag, value in metrics.items():
                writer.add_scalar(tag, value)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
    except OSError as error:
        raise ValueError(f"{folder}: cannot write the HParams line: {error.strerror or error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
