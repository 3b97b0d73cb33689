"""Export to transformers' ViTMAEForPreTraining: encoder and decoder, under the names of transformers 4."""

from pathlib import Path
from typing import Any

from torch import Tensor

from selfsup.checkpoint import Weights, load_objective
from selfsup.export.card import AUTOENCODER, Usage, example_input, model_card
from selfsup.export.huggingface import (
    LAYER,
    check_processor,
    expect_transformers,
    grey_remark,
    processor_config,
    refuse_unlike_vit,
    reload_in_transformers,
    vit_config,
    vit_weights,
)
from selfsup.export.names import float_weights, rename, split_qkv, with_qkv_bias
from selfsup.export.verify import (
    Check,
    Outputs,
    compare,
    example_images,
    example_noise,
    expect_mae,
    mae_outputs,
)
from selfsup.export.write import ExportReport, destination, read_state, staged, write_json, write_weights
from selfsup.objectives.mae import MAE
from selfsup.recipe import Recipe

DECODER = ("decoder_embed", "mask_token", "decoder_pos_embed", "decoder_norm", "decoder_pred")


def export_hf_mae(source: Path, out: Path | None = None, weights: Weights = "trained") -> ExportReport:
    """Writes a folder that transformers' ViTMAEForPreTraining loads, decoder included.

    As `export_hf`; default RUN/export/hf-mae-step-N. Raises ValueError also where the objective is not mae.
    """
    model, recipe, checkpoint, passed_over = load_objective(source, weights)
    expect_mae("hf-mae", model, recipe)
    expect_transformers("hf-mae")
    refuse_unlike_vit("hf-mae", recipe.encoder)
    state, usage = read_state(checkpoint), _usage(recipe)
    final = destination("hf-mae", checkpoint, state["step"], out, weights)
    with staged(final) as tmp:
        write_weights(tmp, mae_weights(model))
        write_json(tmp / "config.json", mae_config(model))
        write_json(tmp / "preprocessor_config.json", processor_config(recipe))
        checks = verify(tmp, model, recipe)
        (tmp / "README.md").write_text(model_card(recipe, state, weights, checks, (), usage))
    return ExportReport(final, checkpoint, state["step"], checks, tuple(passed_over), usage.load)


def mae_weights(model: MAE) -> dict[str, Tensor]:
    """All of our MAE's tensors under the names of transformers 4's ViTMAEForPreTraining.

    Its decoder has the query, key, value bias that the encoder has; ours always has one. So an encoder
    without gets zeros.
    """
    encoder = vit_weights(with_qkv_bias(float_weights(model.encoder)))
    decoder = split_qkv(float_weights(model.decoder))
    outside = {name: f"decoder.{name}" for name in DECODER}
    return {
        **{f"vit.{name}": tensor for name, tensor in encoder.items()},
        **rename(decoder, outside, "decoder.decoder_layers.", LAYER),
    }


def mae_config(model: MAE) -> dict[str, Any]:
    """The content of a ViTMAEForPreTraining's `config.json`."""
    encoder, mae = model.encoder.config, model.config
    return {
        **vit_config(encoder),
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "qkv_bias": True,  # see mae_weights
        "decoder_hidden_size": mae.decoder_embed_dim,
        "decoder_num_hidden_layers": mae.decoder_depth,
        "decoder_num_attention_heads": mae.decoder_num_heads,
        "decoder_intermediate_size": int(mae.decoder_embed_dim * encoder.mlp_ratio),
        "mask_ratio": mae.mask_ratio,
        "norm_pix_loss": mae.norm_pix_loss,
    }


def verify(folder: Path, model: MAE, recipe: Recipe) -> tuple[Check, ...]:
    """As for ViTModel: predicted patches, mask and loss for a fixed noise, and the image processor."""
    noise = example_noise(model.encoder.config)

    def outputs(module: Any, images: Tensor) -> Outputs:
        output = module(images, noise=noise)
        return output.logits, output.mask, output.loss

    reloaded = reload_in_transformers(folder, "ViTMAEForPreTraining", {}, outputs)
    images = example_images(model.encoder.config)
    checks = compare(
        folder, model, lambda model, images: mae_outputs(model, images, noise), [reloaded], images
    )
    return (*checks, check_processor(folder, recipe))


def _usage(recipe: Recipe) -> Usage:
    code = f"""
import torch
from transformers import AutoImageProcessor, ViTMAEForPreTraining

model = ViTMAEForPreTraining.from_pretrained("DIR").eval()
output = model({example_input(recipe)})  # loss, logits, mask: of a random mask at every call
processor = AutoImageProcessor.from_pretrained("DIR")  # an image to pixel_values
"""
    return Usage(
        tags=("transformers",),
        contents=AUTOENCODER,
        code=(code,),
        load='transformers.ViTMAEForPreTraining.from_pretrained("DIR")',
        compared="Reloaded from this folder and compared with the trained model under a fixed mask: "
        "predicted patches, mask and loss",
        remarks=(
            "`AutoModel` gives the encoder alone, but masks its input too; for features take `--to hf`.",
            *grey_remark(recipe),
        ),
    )
