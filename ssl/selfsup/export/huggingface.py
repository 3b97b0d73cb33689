"""Export to transformers' own ViTModel, and what its ViTMAEForPreTraining shares with it.

The tensors get the names of transformers 4, written by hand: version 5 renamed them but reads both,
version 4 reads only its own, and version 5's `save_pretrained` writes the one or the other depending
on what it loaded. What fails without a word is the config: transformers' LayerNorm epsilon is 1e-12.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsup.checkpoint import Weights, load_encoder
from selfsup.encoders.vit import ViT, ViTConfig
from selfsup.export.card import ENCODER, Usage, example_input, model_card
from selfsup.export.names import float_weights, rename, split_qkv
from selfsup.export.verify import (
    TOLERANCE,
    Check,
    Outputs,
    Reloaded,
    check_outputs,
    compare,
    encoder_outputs,
    example_images,
    example_pixels,
    expect_no_keys,
    quiet_transformers,
    reload_in,
)
from selfsup.export.write import (
    ExportReport,
    destination,
    expect_vit,
    read_state,
    refuse,
    staged,
    unlike_plain_vit,
    write_json,
    write_weights,
)
from selfsup.layers.block import LAYER_NORM_EPS
from selfsup.recipe import Recipe

EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
LAYER = {
    "norm1": "layernorm_before",
    "attn.query": "attention.attention.query",
    "attn.key": "attention.attention.key",
    "attn.value": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def refuse_unlike_vit(to: str, encoder: ViTConfig) -> None:
    """The one place for what ViTConfig can say and transformers' ViT and ViTMAE cannot."""
    no_class_token = "encoder.class_token is false, transformers' ViT always has one"
    refuse(to, {no_class_token: not encoder.class_token, **unlike_plain_vit(encoder)})


def expect_transformers(to: str) -> None:
    """Raises ValueError where it is not installed: what nobody has reloaded is not exported."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            f"--to {to}: transformers is not installed to verify it; NOT exported, pip install 'selfsup[hf]'"
        )


def export_hf(source: Path, out: Path | None = None, weights: Weights = "trained") -> ExportReport:
    """Writes a folder that transformers' ViTModel loads, versions 4.57 and 5.

    Arguments, errors and the way it appears as in `export_timm`; default RUN/export/hf-step-N. Raises
    ValueError also for an encoder that ViTModel cannot express, and without transformers.
    """
    encoder, recipe, checkpoint, passed_over = load_encoder(source, weights)
    refuse_unlike_vit("hf", expect_vit("hf", recipe.encoder))
    expect_transformers("hf")
    state, usage = read_state(checkpoint), _usage(recipe)
    final = destination("hf", checkpoint, state["step"], out, weights)
    with staged(final) as tmp:
        write_weights(tmp, vit_weights(float_weights(encoder)))
        write_json(tmp / "config.json", vit_config(recipe.encoder))
        write_json(tmp / "preprocessor_config.json", processor_config(recipe))
        checks = verify(tmp, encoder, recipe)
        (tmp / "README.md").write_text(model_card(recipe, state, weights, checks, (), usage))
    return ExportReport(final, checkpoint, state["step"], checks, tuple(passed_over), usage.load)


def vit_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder's tensors under the names of transformers 4's ViTModel."""
    return rename(split_qkv(weights), EMBEDDINGS, "encoder.layer.", LAYER)


def vit_config(encoder: ViTConfig) -> dict[str, Any]:
    """The content of a ViTModel's `config.json`; nothing that matters is left to a default."""
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "image_size": encoder.img_size,
        "patch_size": encoder.patch_size,
        "num_channels": encoder.in_chans,
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": int(encoder.embed_dim * encoder.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": encoder.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def processor_config(recipe: Recipe) -> dict[str, Any]:
    """The content of `preprocessor_config.json`: short side resized, centre crop, our mean and std.

    BitImageProcessor is the plain one that crops; ViT's own would squash an image to a square.
    """
    size = recipe.encoder.img_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": recipe.encoder.in_chans == 3,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(recipe.data.mean),
        "image_std": list(recipe.data.std),
    }


def verify(folder: Path, encoder: ViT, recipe: Recipe) -> tuple[Check, ...]:
    """Reloads the folder as ViTModel and its image processor, and compares them with ours.

    All tokens and the feature pooled from them, in float32 and float64; pixels. Raises ValueError
    where weights are missing or unexpected, or outputs differ (see `compare`).
    """

    def outputs(module: Any, images: Tensor) -> Outputs:
        tokens = module(images).last_hidden_state
        return tokens, encoder.pool(tokens)

    reloaded = reload_in_transformers(folder, "ViTModel", {"add_pooling_layer": False}, outputs)
    checks = compare(folder, encoder, encoder_outputs, [reloaded], example_images(encoder.config))
    return (*checks, check_processor(folder, recipe))


def reload_in_transformers(folder: Path, kind: str, options: dict[str, Any], outputs: Any) -> Reloaded:
    """The folder as transformers' class `kind`. Raises ValueError for missing or unexpected weights."""
    import transformers

    library = f"transformers {transformers.__version__} {kind}"

    def load() -> Any:
        return getattr(transformers, kind).from_pretrained(
            folder,
            output_loading_info=True,
            use_safetensors=True,
            # Not the eager one, which computes its softmax in float32, in float64 too.
            **{"attn_implementation": "sdpa", **options},
        )

    with quiet_transformers():
        module, info = reload_in(folder, library, load)
    for fault in ("missing", "unexpected", "mismatched"):
        expect_no_keys(folder, library, fault, sorted(map(str, info[f"{fault}_keys"])))
    return Reloaded(library, module.eval(), outputs)


def check_processor(folder: Path, recipe: Recipe) -> Check:
    """A random image of the native size through the processor of the folder and by our formula."""
    import transformers

    library, (pixels, ours) = (
        f"transformers {transformers.__version__} image processor",
        example_pixels(recipe),
    )
    with quiet_transformers():
        processor = reload_in(
            folder, library, lambda: transformers.AutoImageProcessor.from_pretrained(folder)
        )
        processed = reload_in(folder, library, lambda: processor(pixels, return_tensors="pt"))
    return check_outputs(folder, library, (ours,), (processed["pixel_values"],), TOLERANCE[torch.float32])


def _usage(recipe: Recipe) -> Usage:
    feature = "[:, 0]" if recipe.encoder.pool == "cls" else "[:, 1:].mean(dim=1)"
    code = f"""
import torch
from transformers import AutoImageProcessor, ViTModel

model = ViTModel.from_pretrained("DIR", add_pooling_layer=False).eval()
features = model({example_input(recipe)}).last_hidden_state{feature}
processor = AutoImageProcessor.from_pretrained("DIR")  # an image to pixel_values
"""
    pooler = (
        "`AutoModel` loads the same weights but reports a missing pooler and makes up a random one: its "
        "`pooler_output` means nothing. Load with `ViTModel` and `add_pooling_layer=False`."
    )
    return Usage(
        tags=("transformers",),
        contents=ENCODER,
        code=(code,),
        load='transformers.ViTModel.from_pretrained("DIR", add_pooling_layer=False); AutoModel would make up '
        "a random pooler",
        compared="Reloaded from this folder and compared with the trained encoder: all tokens, and the "
        "feature pooled from them as above",
        remarks=(pooler, *grey_remark(recipe)),
    )


def grey_remark(recipe: Recipe) -> tuple[str, ...]:
    """A trap of transformers 4's processor."""
    if recipe.encoder.in_chans == 3:
        return ()
    return ("The processor of transformers 4 takes a grey image as an array (height, width, 1).",)
