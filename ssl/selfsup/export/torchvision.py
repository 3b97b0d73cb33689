"""Export to torchvision: VisionTransformer or a ResNet, its tensors and a config.json with its arguments."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from selfsup.checkpoint import Weights, load_encoder
from selfsup.encoders import Encoder, EncoderConfig
from selfsup.encoders.timm import TimmConfig, TimmEncoder
from selfsup.export.card import ENCODER, Usage, example_input, model_card
from selfsup.export.names import float_weights, rename, with_qkv_bias
from selfsup.export.verify import (
    Check,
    Outputs,
    Reloaded,
    compare,
    example_images,
    load_strictly,
    reload_in,
)
from selfsup.export.write import (
    ExportReport,
    destination,
    expect_images,
    read_state,
    refuse,
    staged,
    unlike_plain_vit,
    write_json,
    write_weights,
)
from selfsup.layers.block import LAYER_NORM_EPS
from selfsup.recipe import Recipe

OUTSIDE = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj",
    "norm": "encoder.ln",
}
LAYER = {
    "norm1": "ln_1",
    "attn.qkv": "self_attention.in_proj",
    "attn.proj": "self_attention.out_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""The same layers under the same names in timm and torchvision."""


def _refuse(encoder: EncoderConfig) -> None:
    """The one place for what our configs can say and torchvision's models cannot."""
    if isinstance(encoder, TimmConfig):
        refuse(
            "torchvision",
            {
                f"encoder.model is {encoder.model}, expected vit, or one of timm's {', '.join(RESNETS)}": (
                    encoder.model not in RESNETS
                ),
                "encoder.stem is cifar, torchvision's ResNets have another": encoder.stem != "default",
                "encoder.in_chans is 1, torchvision's ResNets take 3": encoder.in_chans != 3,
            },
        )
        return
    refuse(
        "torchvision",
        {
            "encoder.class_token is false, torchvision's ViT always has one": not encoder.class_token,
            "encoder.pool is mean, torchvision's ViT gives the class token": encoder.pool != "cls",
            "encoder.in_chans is 1, torchvision's ViT takes 3": encoder.in_chans != 3,
            **unlike_plain_vit(encoder),
        },
    )


def export_torchvision(source: Path, out: Path | None = None, weights: Weights = "trained") -> ExportReport:
    """Writes `model.safetensors` and `config.json` for a model of torchvision's without head:
    VisionTransformer, or the ResNet of the same name.

    Arguments, errors and the way it appears as in `export_timm`; default RUN/export/torchvision-step-N.
    Raises ValueError also for an encoder that torchvision cannot express.
    """
    encoder, recipe, checkpoint, passed_over = load_encoder(source, weights)
    _refuse(expect_images("torchvision", recipe.encoder))
    state, usage = read_state(checkpoint), _usage(recipe)
    final = destination("torchvision", checkpoint, state["step"], out, weights)
    with staged(final) as tmp:
        write_weights(tmp, torchvision_weights(encoder))
        write_json(tmp / "config.json", torchvision_config(recipe.encoder))
        checks = verify(tmp, encoder)
        (tmp / "README.md").write_text(model_card(recipe, state, weights, checks, (), usage))
    return ExportReport(final, checkpoint, state["step"], checks, tuple(passed_over), usage.load)


def torchvision_weights(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's tensors under torchvision's names; a query, key, value bias of zeros where none is."""
    if isinstance(encoder, TimmEncoder):
        return float_weights(encoder.model)
    renamed = rename(with_qkv_bias(float_weights(encoder)), OUTSIDE, "encoder.layers.encoder_layer_", LAYER)
    # nn.MultiheadAttention holds these two itself, not in a layer.
    return {name.replace("in_proj.", "in_proj_"): tensor for name, tensor in renamed.items()}


def torchvision_config(encoder: EncoderConfig) -> dict[str, Any]:
    """A ResNet's name; or arguments of VisionTransformer, and the LayerNorm epsilon of its `norm_layer`."""
    if isinstance(encoder, TimmConfig):
        return {"model": encoder.model}
    return {
        "arguments": {
            "image_size": encoder.img_size,
            "patch_size": encoder.patch_size,
            "num_layers": encoder.depth,
            "num_heads": encoder.num_heads,
            "hidden_dim": encoder.embed_dim,
            "mlp_dim": int(encoder.embed_dim * encoder.mlp_ratio),
        },
        "layer_norm_eps": LAYER_NORM_EPS,
    }


def verify(folder: Path, encoder: Encoder) -> tuple[Check, ...]:
    """Builds the model from the folder and compares its feature with `encoder`'s.

    In float32 and float64. Raises ValueError where weights are missing or unexpected, or outputs
    differ (see `compare`).
    """

    def ours(encoder: Any, images: Tensor) -> Outputs:
        return (encoder(images),)

    return compare(folder, encoder, ours, [_reload(folder)], example_images(encoder.config))


def _reload(folder: Path) -> Reloaded:
    import torchvision

    library = f"torchvision {torchvision.__version__}"
    config = json.loads((folder / "config.json").read_text())
    if "model" in config:
        build, head = getattr(torchvision.models, config["model"]), "fc"
    else:
        norm_layer = partial(nn.LayerNorm, eps=config["layer_norm_eps"])
        build = partial(torchvision.models.VisionTransformer, **config["arguments"], norm_layer=norm_layer)
        head = "heads"
    module = reload_in(folder, library, build)
    setattr(module, head, nn.Identity())
    load_strictly(folder, library, load_file(folder / "model.safetensors"), module)
    return Reloaded(library, module, lambda module, images: (module(images),))


def _usage(recipe: Recipe) -> Usage:
    if isinstance(recipe.encoder, TimmConfig):
        return _resnet_usage(recipe)
    code = f"""
import json, torch
from functools import partial
from safetensors.torch import load_file
from torchvision.models import VisionTransformer

config = json.load(open("DIR/config.json"))
norm_layer = partial(torch.nn.LayerNorm, eps=config["layer_norm_eps"])
model = VisionTransformer(**config["arguments"], norm_layer=norm_layer).eval()
model.heads = torch.nn.Identity()  # for features; keep them for a classifier, and load with strict=False
model.load_state_dict(load_file("DIR/model.safetensors"))
features = model({example_input(recipe)})
"""
    return Usage(
        tags=("torchvision",),
        contents=ENCODER,
        code=(code,),
        load='torchvision.models.VisionTransformer and load_file("DIR/model.safetensors"), as DIR/README.md says',
        compared="Rebuilt from this folder and compared with the trained encoder: the class token",
    )


def _resnet_usage(recipe: Recipe) -> Usage:
    name = recipe.encoder.model
    code = f"""
import torch, torchvision
from safetensors.torch import load_file

model = torchvision.models.{name}().eval()
model.fc = torch.nn.Identity()  # for features; keep it for a classifier, and load with strict=False
model.load_state_dict(load_file("DIR/model.safetensors"))
features = model({example_input(recipe)})
"""
    return Usage(
        tags=("torchvision",),
        contents=ENCODER,
        code=(code,),
        load=f'torchvision.models.{name} and load_file("DIR/model.safetensors"), as DIR/README.md says',
        compared="Rebuilt from this folder and compared with the trained encoder: the pooled feature",
    )
