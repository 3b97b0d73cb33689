"""Export to a timm-format folder, which timm and transformers load; it proves itself before it appears.

The encoder's state dict has timm's names already, so an export is a `config.json` beside it. What
can go wrong is in that file (a pooling, a norm, a normalisation), loads without a complaint and
scores wrong. So the folder is reloaded by the target libraries and its outputs are compared.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfsup.checkpoint import load_encoder
from selfsup.durable import fsync_path
from selfsup.encoders.vit import ViT, ViTConfig
from selfsup.export.card import Check, model_card
from selfsup.export.load import quiet_transformers

# Any plain ViT entry point of timm's would do: `model_args` override every dimension it implies.
ARCHITECTURE = "vit_base_patch16_224"
GLOBAL_POOL = {"cls": "token", "mean": "avg"}

# Relative to max(1, largest activation). float32 leaves room for another order of sums; float64 is
# there because a LayerNorm epsilon of 1e-5 for 1e-6 moves outputs by 6e-6, which float32 must allow.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class ExportReport(NamedTuple):
    """What an export wrote and what its verification measured."""

    folder: Path
    checkpoint: Path
    step: int
    checks: tuple[Check, ...]
    """One per library and number format."""
    notes: tuple[str, ...]
    """What was passed over or not checked, a sentence each."""


def main_export(
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    to: Literal["timm"] = "timm",
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
) -> None:
    """Write the pretrained encoder for other libraries; reloads it there and compares outputs.

    Args:
        run: run folder (its newest whole checkpoint) or a checkpoint folder.
        to: timm: a folder that timm and transformers' AutoModel load.
        out: folder to write; default RUN/export/timm-step-N.
    """
    assert to == "timm"
    report = export_timm(run, out)
    for note in report.notes:
        print(note)
    for check in report.checks:
        print(check.sentence)
    print(f"exported {report.checkpoint} to {report.folder}")
    print(f'load it with timm.create_model("local-dir:{report.folder}", pretrained=True)')


def export_timm(source: Path, out: Path | None = None) -> ExportReport:
    """Writes `config.json`, `model.safetensors` and `README.md` that timm loads unchanged.

    source: run folder or checkpoint; out: new folder, default RUN/export/timm-step-N. Everything is
    written to and verified in `.tmp-…` beside `out`, then renamed: a failure leaves nothing behind.
    Raises ValueError where the source is no checkpoint, `out` exists or cannot be written, or the
    reloaded model's outputs differ (see `verify`).
    """
    encoder, recipe, checkpoint, passed_over = load_encoder(source)
    state = json.loads((checkpoint / "state.json").read_text())
    final = out or _default_folder(checkpoint, state["step"])
    if final.exists():
        raise ValueError(f"{final}: already exists; remove it, or give another folder with --out")
    tmp = final.parent / f".tmp-{final.name}"
    config = timm_config(recipe.encoder, recipe.data.mean, recipe.data.std)
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # left by a killed export
        tmp.mkdir(parents=True)
        save_file(timm_weights(encoder), tmp / "model.safetensors", metadata={"format": "pt"})
        (tmp / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        checks, unchecked = verify(tmp, encoder)
        (tmp / "README.md").write_text(model_card(recipe, state, checks, unchecked))
        for path in (*tmp.iterdir(), tmp):
            fsync_path(path)
        os.rename(tmp, final)
        fsync_path(final.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        raise ValueError(f"{final}: export NOT written: {error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return ExportReport(final, checkpoint, state["step"], checks, (*passed_over, *unchecked))


def _default_folder(checkpoint: Path, step: int) -> Path:
    """RUN/export/timm-step-N. Raises ValueError for a checkpoint that lies outside a run folder."""
    folder = checkpoint.absolute().parent
    if folder.name != "checkpoints":
        raise ValueError(f"{checkpoint}: lies in no run folder; say where to write with --out")
    return checkpoint.parent.parent / "export" / f"timm-step-{step}"


def timm_config(encoder: ViTConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """The content of timm's `config.json`.

    mean, std: of pixels in [0, 1], one value per channel. `num_classes` stands at the top level
    only (in `model_args` it breaks transformers 5); `fc_norm: false` keeps the norm before mean
    pooling, where timm's default would put it behind, drop our weights and only warn.
    """
    pool, size = GLOBAL_POOL[encoder.pool], encoder.img_size
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": pool,
        "model_args": {
            "img_size": size,
            "patch_size": encoder.patch_size,
            "in_chans": encoder.in_chans,
            "embed_dim": encoder.embed_dim,
            "depth": encoder.depth,
            "num_heads": encoder.num_heads,
            "mlp_ratio": encoder.mlp_ratio,
            "qkv_bias": encoder.qkv_bias,
            "class_token": encoder.class_token,
            "global_pool": pool,
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [encoder.in_chans, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def timm_weights(encoder: ViT) -> dict[str, Tensor]:
    """The encoder's tensors in float32 under timm's names: its own. `pos_embed` is always among them."""
    return {name: tensor.detach().float().contiguous() for name, tensor in encoder.state_dict().items()}


def verify(folder: Path, encoder: ViT) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Reloads a timm-format folder in timm and transformers and compares it with `encoder` (eval mode).

    Compares pooled features and all tokens on a fixed random input, on CPU, at matmul precision
    `highest`, in float32 and float64. Returns the measurements, and a sentence for a library that
    is not installed. Raises ValueError where a library finds missing or unexpected weights or a
    difference exceeds TOLERANCE x max(1, largest activation). `encoder` is left as it was.
    """
    shape = (2, encoder.config.in_chans, encoder.config.img_size, encoder.config.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    targets = [_load_in_timm(folder)]
    unchecked = []
    if importlib.util.find_spec("transformers") is None:
        unchecked.append("not checked in transformers: not installed")
    else:
        targets.append(_load_in_transformers(folder))
    checks = []
    with _highest_precision(), torch.inference_mode():
        for dtype, tolerance in TOLERANCE.items():
            ours = _our_outputs(encoder.to(dtype), images.to(dtype))
            encoder.float()  # before the next model is widened: a ViT-huge in float64 is 5 GB
            for library, module, outputs in targets:
                theirs = outputs(module.to(dtype), images.to(dtype))
                module.float()
                checks.append(_compare(folder, library, ours, theirs, tolerance))
    return tuple(checks), tuple(unchecked)


def _our_outputs(encoder: ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens = encoder.forward_features(images)
    return tokens, encoder.pool(tokens)


def _compare(
    folder: Path, library: str, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], tolerance: float
) -> Check:
    """The largest difference of (tokens, features). Raises ValueError above the tolerance."""
    largest = max(1.0, *(float(output.abs().max()) for output in ours))
    shapes = [[tuple(output.shape) for output in outputs] for outputs in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{folder}: {library} gives shapes {shapes[1]}, expected {shapes[0]}; NOT exported")
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    dtype = str(ours[0].dtype).removeprefix("torch.")
    check = Check(library, dtype, difference, tolerance * largest)
    if not difference <= check.limit:  # so that NaN fails too
        raise ValueError(f"{folder}: {check.sentence}: the reloaded model is another one; NOT exported")
    return check


class _Target(NamedTuple):
    library: str
    """Name and version."""
    module: nn.Module
    outputs: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    """(module, images) -> (tokens, features)."""


def _load_in_timm(folder: Path) -> _Target:
    """Raises ValueError for missing or unexpected weights."""
    import timm

    try:
        module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, TypeError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{folder}: timm does not load it: {message}; NOT exported") from error
    # timm resizes what does not fit and logs what is missing: compare names and shapes ourselves.
    saved = {k: tuple(v.shape) for k, v in load_file(folder / "model.safetensors").items()}
    wanted = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    _expect_no_keys(folder, "timm", "missing", [k for k in wanted if k not in saved])
    _expect_no_keys(folder, "timm", "unexpected", [k for k in saved if k not in wanted])
    _expect_no_keys(folder, "timm", "wrongly shaped", [k for k in wanted if saved[k] != wanted[k]])

    def outputs(module: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        return module.forward_features(images), module(images)

    return _Target(f"timm {timm.__version__}", module, outputs)


def _load_in_transformers(folder: Path) -> _Target:
    """Raises ValueError for missing or unexpected weights."""
    import transformers

    with quiet_transformers():
        module, info = transformers.AutoModel.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    for kind in ("missing", "unexpected", "mismatched"):
        _expect_no_keys(folder, "transformers", kind, sorted(map(str, info[f"{kind}_keys"])))

    def outputs(module: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        output = module(images)
        return output.last_hidden_state, output.pooler_output

    return _Target(f"transformers {transformers.__version__}", module.eval(), outputs)


def _expect_no_keys(folder: Path, library: str, kind: str, names: list[str]) -> None:
    if names:
        raise ValueError(
            f"{folder}: {library} finds {len(names)} {kind} weights, first {names[0]}; NOT exported"
        )


@contextmanager
def _highest_precision() -> Iterator[None]:
    """Full float32 matrix products inside; the setting before is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
