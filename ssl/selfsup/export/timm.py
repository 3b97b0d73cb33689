"""Export to a timm-format folder, which timm and transformers' AutoModel load.

The encoder's state dict has timm's names already, so an export is a `config.json` beside it. What
can go wrong is in that file (a pooling, a norm, a normalisation), loads without a complaint and
scores wrong. So the folder is reloaded by the target libraries and its outputs are compared.

One encoder timm cannot name: a ResNet with `stem: cifar`. Its folder holds the same files, and its
card the three lines of Python that build it; `create_model(..., pretrained=True)` refuses the weights.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from selfsup.checkpoint import Weights, load_encoder
from selfsup.encoders import Encoder, EncoderConfig
from selfsup.encoders.timm import TimmConfig, TimmEncoder, replace_stem, wants_size
from selfsup.encoders.vit import ViTConfig
from selfsup.export.card import ENCODER, Usage, example_input, model_card
from selfsup.export.names import float_weights
from selfsup.export.verify import (
    TOLERANCE,
    Check,
    Reloaded,
    check_outputs,
    compare,
    encoder_outputs,
    example_images,
    example_pixels,
    expect_no_keys,
    expect_same_names,
    quiet_transformers,
    reload_in,
)
from selfsup.export.write import (
    ExportReport,
    destination,
    expect_images,
    read_state,
    refuse,
    staged,
    write_json,
    write_weights,
)
from selfsup.recipe import Recipe

# Any plain ViT entry point of timm's would do: `model_args` override every dimension it implies.
ARCHITECTURE = "vit_base_patch16_224"
GLOBAL_POOL = {"cls": "token", "mean": "avg"}
CIFAR_STEM = {"selfsup_stem": "cifar"}
"""What `config.json` says besides where the first layers are not those that timm builds."""


def _refuse(encoder: EncoderConfig) -> None:
    """The one place for what ViTConfig can say and timm's VisionTransformer cannot."""
    if isinstance(encoder, TimmConfig):
        return
    refuse(
        "timm",
        {
            "encoder.pos_embed is rope, timm's VisionTransformer adds its positions": encoder.pos_embed
            == "rope",
            "encoder.patch_bias must be the opposite of encoder.pre_norm there": (
                encoder.patch_bias == encoder.pre_norm
            ),
        },
    )


def export_timm(source: Path, out: Path | None = None, weights: Weights = "trained") -> ExportReport:
    """Writes `config.json`, `model.safetensors` and `README.md` that timm loads unchanged.

    source: run folder or checkpoint; out: new folder, default RUN/export/timm-step-N, with -ema or -target
    for other weights. Everything is written to and verified in `.tmp-…` beside `out`, then renamed: a
    failure leaves nothing behind.
    Raises ValueError where the source is no checkpoint, `out` exists or cannot be written, or the
    reloaded model's outputs differ (see `verify`).
    """
    encoder, recipe, checkpoint, passed_over = load_encoder(source, weights)
    _refuse(expect_images("timm", recipe.encoder))
    state, usage = read_state(checkpoint), _usage(recipe)
    final = destination("timm", checkpoint, state["step"], out, weights)
    with staged(final) as tmp:
        write_weights(tmp, float_weights(encoder.model if isinstance(encoder, TimmEncoder) else encoder))
        write_json(tmp / "config.json", timm_config(recipe.encoder, recipe.data.mean, recipe.data.std))
        checks, unchecked = verify(tmp, encoder, recipe)
        (tmp / "README.md").write_text(model_card(recipe, state, weights, checks, unchecked, usage))
    return ExportReport(final, checkpoint, state["step"], checks, (*passed_over, *unchecked), usage.load)


def timm_config(encoder: EncoderConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """The content of timm's `config.json`.

    mean, std: of pixels in [0, 1], one value per channel. `num_classes` stands at the top level
    only: in `model_args` it breaks transformers 5.
    """
    size = encoder.img_size
    described = _backbone(encoder) if isinstance(encoder, TimmConfig) else _vit(encoder)
    described["pretrained_cfg"] |= {
        "input_size": [encoder.in_chans, size, size],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
        "pool_size": None,
    }
    return {"num_classes": 0, **described}


def _backbone(encoder: TimmConfig) -> dict[str, Any]:
    """What names an architecture of timm's own, and the names of its first and last layer."""
    import timm

    known = timm.get_pretrained_cfg(encoder.model)
    sized = {"img_size": encoder.img_size} if wants_size(encoder.model) else {}
    return {
        "architecture": encoder.model,
        "model_args": {"in_chans": encoder.in_chans, **sized},
        "pretrained_cfg": {
            "fixed_input_size": bool(sized),
            "first_conv": known.first_conv,
            "classifier": known.classifier,
        },
        **(CIFAR_STEM if encoder.stem == "cifar" else {}),
    }


def _vit(encoder: ViTConfig) -> dict[str, Any]:
    """Every dimension of our ViT. `fc_norm: false` keeps the norm before mean pooling, where timm's
    default would put it behind, drop our weights and only warn."""
    pool = GLOBAL_POOL[encoder.pool]
    return {
        "architecture": ARCHITECTURE,
        "num_features": encoder.embed_dim,
        "global_pool": pool,
        "model_args": {
            "img_size": encoder.img_size,
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
            "reg_tokens": encoder.reg_tokens,
            "pre_norm": encoder.pre_norm,
            "act_layer": encoder.activation,
            "init_values": encoder.layer_scale,
        },
        "pretrained_cfg": {
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def cifar_model(folder: Path) -> Any:
    """The ResNet of a folder exported with `stem: cifar`, in eval mode; its card builds the same by hand.

    Raises what timm and torch raise for a folder that is none (RuntimeError for weights that do not fit),
    and ValueError for an architecture without that stem.
    """
    import timm

    model = timm.create_model(f"local-dir:{folder}")
    replace_stem(model, str(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def verify(folder: Path, encoder: Encoder, recipe: Recipe) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Reloads a timm-format folder in timm and transformers and compares it with `encoder` (eval mode).

    Compares pooled features and all tokens (a map, of a convolutional network) on a fixed random input,
    in float32 and float64, and what timm makes of an image's pixels. Returns the measurements, and a
    sentence for a library that does not load it or is not installed. Raises ValueError where a library
    finds missing or unexpected weights, or outputs differ (see `compare`).
    """
    reloaded, unchecked = [_reload_in_timm(folder)], []
    if _has_cifar_stem(folder):
        unchecked.append("not checked in transformers: it builds timm's own stem, and refuses these weights")
    elif importlib.util.find_spec("transformers") is None:
        unchecked.append("not checked in transformers: not installed")
    else:
        reloaded.append(_reload_in_transformers(folder))
    checks = compare(folder, encoder, encoder_outputs, reloaded, example_images(encoder.config))
    return (*checks, _check_transform(folder, reloaded[0].module, recipe)), tuple(unchecked)


def _reload_in_timm(folder: Path) -> Reloaded:
    """Raises ValueError for missing or unexpected weights."""
    import timm

    def load() -> Any:
        if _has_cifar_stem(folder):
            return cifar_model(folder)
        return timm.create_model(f"local-dir:{folder}", pretrained=True)

    module = reload_in(folder, "timm", load)
    # timm resizes what does not fit and logs what is missing: compare names and shapes ourselves.
    expect_same_names(folder, "timm", load_file(folder / "model.safetensors"), module)

    def outputs(module: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        return module.forward_features(images), module(images)

    return Reloaded(f"timm {timm.__version__}", module.eval(), outputs)


def _has_cifar_stem(folder: Path) -> bool:
    return CIFAR_STEM.items() <= json.loads((folder / "config.json").read_text()).items()


def _check_transform(folder: Path, module: Any, recipe: Recipe) -> Check:
    """A random image of the native size through the transform that timm makes for the reloaded model."""
    import timm

    library, (pixels, ours) = f"timm {timm.__version__} transform", example_pixels(recipe)
    image = Image.fromarray(pixels.squeeze(-1) if recipe.encoder.in_chans == 1 else pixels)
    data = timm.data.resolve_model_data_config(module)
    theirs = reload_in(folder, library, lambda: timm.data.create_transform(**data)(image))
    return check_outputs(folder, library, (ours,), (theirs[None],), TOLERANCE[torch.float32])


def _reload_in_transformers(folder: Path) -> Reloaded:
    """Raises ValueError for missing or unexpected weights."""
    import transformers

    with quiet_transformers():
        module, info = reload_in(
            folder,
            "transformers",
            lambda: transformers.AutoModel.from_pretrained(
                folder, output_loading_info=True, use_safetensors=True, trust_remote_code=False
            ),
        )
    for kind in ("missing", "unexpected", "mismatched"):
        expect_no_keys(folder, "transformers", kind, sorted(map(str, info[f"{kind}_keys"])))

    def outputs(module: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        output = module(images)
        return output.last_hidden_state, output.pooler_output

    return Reloaded(f"transformers {transformers.__version__}", module.eval(), outputs)


def _usage(recipe: Recipe) -> Usage:
    encoder, images = recipe.encoder, example_input(recipe)
    if isinstance(encoder, TimmConfig) and encoder.stem == "cifar":
        return _cifar_usage(encoder, images)
    return Usage(
        tags=("timm", "transformers"),
        contents=ENCODER,
        code=(
            f"""
import timm, torch

model = timm.create_model("local-dir:DIR", pretrained=True).eval()
features = model({images})
data = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data)  # a PIL image to a normalised tensor
""",
            f"""
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("DIR").eval()  # needs timm installed
features = model({images}).pooler_output
""",
        ),
        load='timm.create_model("local-dir:DIR", pretrained=True)',
        compared="Reloaded from this folder and compared with the trained encoder: all tokens and the "
        "pooled feature; the pixels that timm's transform gives",
    )


def _cifar_usage(encoder: TimmConfig, images: str) -> Usage:
    return Usage(
        tags=("timm",),
        contents=ENCODER,
        code=(
            f"""
import timm, torch
from safetensors.torch import load_file

model = timm.create_model("local-dir:DIR").eval()  # timm's {encoder.model}, without weights
model.conv1, model.maxpool = torch.nn.Conv2d({encoder.in_chans}, 64, 3, padding=1, bias=False), torch.nn.Identity()
model.load_state_dict(load_file("DIR/model.safetensors"))
features = model({images})
data = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data)  # a PIL image to a normalised tensor
""",
        ),
        load="the three lines of Python in DIR/README.md: timm has no option for the stem",
        compared="Rebuilt from this folder as above and compared with the trained encoder: the last map and "
        "the pooled feature; the pixels that timm's transform gives",
        remarks=(
            "timm has no option for this stem: `create_model` with `pretrained=True` refuses the folder, and so "
            "does transformers.",
        ),
    )
