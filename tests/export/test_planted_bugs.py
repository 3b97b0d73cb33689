"""Whatever goes wrong in an export, its verification sees it and nothing appears.

Two kinds: the model that trained is not what the target builds (a bug on our side of the comparison),
and a fault in what is written.
"""

from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import nn

from selfsup.checkpoint import load_encoder, load_objective
from selfsup.export import facebook, huggingface, huggingface_mae, timm, torchvision

EXPORTS = {
    "timm": (timm, timm.export_timm),
    "hf": (huggingface, huggingface.export_hf),
    "hf-mae": (huggingface_mae, huggingface_mae.export_hf_mae),
    "mae": (facebook, facebook.export_mae),
    "torchvision": (torchvision, torchvision.export_torchvision),
}


def refused(export, run: Path, match: str = "NOT exported") -> None:
    with pytest.raises(ValueError, match=match):
        export(run)
    assert list((run / "export").iterdir()) == []


def tanh_gelu(model):
    for block in model.blocks:
        block.mlp.act = nn.GELU("tanh")


def quick_gelu(model):
    for block in model.blocks:
        block.mlp.act.forward = lambda x: x * torch.sigmoid(1.702 * x)


def small_eps(model):
    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = 1e-5


def dropped_norm(model):
    model.norm.forward = lambda tokens: tokens


def other_heads(model):
    model.blocks[-1].attn.num_heads = model.blocks[-1].attn.num_kv_heads = 1


ENCODER_BUGS = [tanh_gelu, quick_gelu, small_eps, dropped_norm, other_heads]


@pytest.mark.parametrize("to", EXPORTS)
@pytest.mark.parametrize("bug", ENCODER_BUGS)
def test_another_encoder_is_caught(make_run, monkeypatch, bug, to):
    module, export = EXPORTS[to]
    run = make_run()
    encoder, *rest = load_encoder(run)
    objective, *_ = load_objective(run)
    bug(encoder)
    bug(objective.encoder)
    monkeypatch.setattr(module, "load_encoder", lambda *_: (encoder, *rest), raising=False)
    monkeypatch.setattr(module, "load_objective", lambda *_: (objective, *rest), raising=False)
    refused(export, run, "largest difference")


@pytest.mark.parametrize("changes", [{"pool": "mean"}, {"pool": "mean", "class_token": False}])
@pytest.mark.parametrize("bug", ENCODER_BUGS)
def test_another_encoder_is_caught_whatever_the_pooling(make_run, monkeypatch, bug, changes):
    run = make_run({"encoder": changes})
    encoder, *rest = load_encoder(run)
    bug(encoder)
    monkeypatch.setattr(timm, "load_encoder", lambda *_: (encoder, *rest))
    refused(timm.export_timm, run, "largest difference")


def decoder_gelu(decoder):
    decoder.decoder_blocks[0].mlp.act = nn.GELU("tanh")


def decoder_heads(decoder):
    decoder.decoder_blocks[0].attn.num_heads = decoder.decoder_blocks[0].attn.num_kv_heads = 1


def no_decoder_norm(decoder):
    decoder.decoder_norm.forward = lambda tokens: tokens


@pytest.mark.parametrize("to", ["hf-mae", "mae"])
@pytest.mark.parametrize("bug", [decoder_gelu, small_eps, decoder_heads, no_decoder_norm])
def test_another_decoder_is_caught(make_run, monkeypatch, bug, to):
    module, export = EXPORTS[to]
    run = make_run()
    objective, *rest = load_objective(run)
    bug(objective.decoder)
    monkeypatch.setattr(module, "load_objective", lambda *_: (objective, *rest))
    refused(export, run, "largest difference")


@pytest.mark.parametrize("to", ["hf-mae", "mae"])
@pytest.mark.parametrize("change", [{"mask_ratio": 0.5}, {"norm_pix_loss": False}])
def test_another_objective_is_caught(make_run, monkeypatch, change, to):
    """What trained is not what the target is told: its prediction can be right and its loss wrong."""
    module, export = EXPORTS[to]
    run = make_run()
    told, original = load_objective(run)[0].config, module.mae_outputs

    def otherwise(model, images, noise):
        model.config = told.model_copy(update=change)
        outputs = original(model, images, noise)
        model.config = told
        return outputs

    monkeypatch.setattr(module, "mae_outputs", otherwise)
    refused(export, run, "largest difference")


def swapped(weights, a, b):
    return {**weights, a: weights[b], b: weights[a]}


def without(weights, name):
    return {k: v for k, v in weights.items() if k != name}


def transposed(weights, name):
    return {**weights, name: weights[name].T.contiguous()}


def grid_transposed(weights, name):
    """Positions of (h, w) given to (w, h); the class token's stays."""
    grid = rearrange(weights[name][:, 1:], "b (h w) d -> b (w h) d", h=4)
    return {**weights, name: torch.cat([weights[name][:, :1], grid], dim=1).contiguous()}


def channels_first(weights, name):
    """Pixels of a patch predicted in the order (channel, row, column)."""
    return {**weights, name: rearrange(weights[name], "(p q c) d -> (c p q) d", p=4, q=4).contiguous()}


def rolled_qkv(weights, name):
    """Query, key, value in another order inside the fused tensor."""
    return {**weights, name: weights[name].roll(32, dims=0)}


LAYER = "encoder.layer.1."
ATTENTION = f"{LAYER}attention.attention."
BLOCK = "encoder.layers.encoder_layer_1."
DECODER = "decoder.decoder_layers.0."
# export, the function that makes its weights, a fault in them
WEIGHTS = [
    ("hf", "vit_weights", swapped, f"{ATTENTION}query.weight", f"{ATTENTION}key.weight"),
    ("hf", "vit_weights", swapped, f"{LAYER}layernorm_before.weight", f"{LAYER}layernorm_after.weight"),
    ("hf", "vit_weights", transposed, f"{ATTENTION}value.weight"),
    ("hf", "vit_weights", without, "embeddings.position_embeddings"),
    ("hf", "vit_weights", grid_transposed, "embeddings.position_embeddings"),
    ("hf-mae", "mae_weights", swapped, f"vit.{ATTENTION}query.bias", f"vit.{ATTENTION}key.bias"),
    ("hf-mae", "mae_weights", without, "decoder.decoder_pos_embed"),
    ("hf-mae", "mae_weights", without, "decoder.mask_token"),
    ("hf-mae", "mae_weights", grid_transposed, "decoder.decoder_pos_embed"),
    ("hf-mae", "mae_weights", transposed, f"{DECODER}attention.output.dense.weight"),
    ("hf-mae", "mae_weights", transposed, "decoder.decoder_embed.weight"),
    ("hf-mae", "mae_weights", channels_first, "decoder.decoder_pred.weight"),
    ("mae", "mae_weights", rolled_qkv, "blocks.0.attn.qkv.weight"),
    ("mae", "mae_weights", without, "pos_embed"),
    ("mae", "mae_weights", without, "decoder_pos_embed"),
    ("mae", "mae_weights", without, "mask_token"),
    ("mae", "mae_weights", grid_transposed, "decoder_pos_embed"),
    ("mae", "mae_weights", transposed, "decoder_blocks.0.attn.proj.weight"),
    ("mae", "mae_weights", transposed, "decoder_embed.weight"),
    ("mae", "mae_weights", channels_first, "decoder_pred.weight"),
    ("torchvision", "torchvision_weights", rolled_qkv, f"{BLOCK}self_attention.in_proj_weight"),
    ("torchvision", "torchvision_weights", swapped, f"{BLOCK}ln_1.bias", f"{BLOCK}ln_2.bias"),
    ("torchvision", "torchvision_weights", without, "encoder.pos_embedding"),
    ("torchvision", "torchvision_weights", grid_transposed, "encoder.pos_embedding"),
]


@pytest.mark.parametrize(
    ("to", "maker", "fault", "names"),
    [(to, maker, fault, names) for to, maker, fault, *names in WEIGHTS],
    ids=[f"{to}-{fault.__name__}-{names[0]}" for to, _, fault, *names in WEIGHTS],
)
def test_fault_in_the_weights_is_caught(make_run, monkeypatch, to, maker, fault, names):
    module, export = EXPORTS[to]
    original = getattr(module, maker)
    monkeypatch.setattr(module, maker, lambda model: fault(original(model), *names))
    refused(export, make_run())


VIT = [
    {"layer_norm_eps": 1e-12},  # transformers' default
    {"layer_norm_eps": 1e-5},
    {"hidden_act": "quick_gelu"},
    {"hidden_act": "gelu_pytorch_tanh"},
    {"num_attention_heads": 2},
    {"num_hidden_layers": 2},
    {"num_hidden_layers": 4},
    {"image_size": 32},
    {"intermediate_size": 96},
    {"qkv_bias": False},
]
MAE = [*VIT, {"norm_pix_loss": False}, {"mask_ratio": 0.5}, {"decoder_num_attention_heads": 4}]
PIXELS = [
    {"image_mean": [0.5, 0.5, 0.5]},  # transformers' default
    {"image_std": [0.5, 0.5, 0.5]},
    {"rescale_factor": 1 / 127.5},
    {"do_normalize": False},
    {"crop_size": {"height": 8, "width": 8}},
    {"image_processor_type": "NoSuchProcessor"},
]
TORCHVISION = [{"image_size": 32}, {"num_heads": 2}, {"num_layers": 2}, {"mlp_dim": 96}, {"nonsense": 1}]
CONFIGS = [("hf", "vit_config", fault) for fault in VIT]
CONFIGS += [("hf-mae", "mae_config", fault) for fault in MAE]
CONFIGS += [(to, "processor_config", fault) for to in ("hf", "hf-mae") for fault in PIXELS]


@pytest.mark.parametrize(("to", "maker", "fault"), CONFIGS)
def test_fault_in_the_config_is_caught(make_run, monkeypatch, to, maker, fault):
    module, export = EXPORTS[to]
    original = getattr(module, maker)
    monkeypatch.setattr(module, maker, lambda source: {**original(source), **fault})
    refused(export, make_run())


@pytest.mark.parametrize("fault", [*TORCHVISION, {"layer_norm_eps": 1e-12}, {"layer_norm_eps": 1e-5}])
def test_fault_in_torchvisions_config_is_caught(make_run, monkeypatch, fault):
    original = torchvision.torchvision_config

    def faulty(encoder):
        config = original(encoder)
        if "layer_norm_eps" in fault:
            return {**config, **fault}
        return {**config, "arguments": {**config["arguments"], **fault}}

    monkeypatch.setattr(torchvision, "torchvision_config", faulty)
    refused(torchvision.export_torchvision, make_run())


@pytest.mark.parametrize("to", EXPORTS)
def test_a_tensor_without_a_place_is_never_dropped(make_run, monkeypatch, to):
    """A feature that the encoder gets later, and an export has not heard of."""
    module, export = EXPORTS[to]
    original = module.float_weights

    def with_more(model):
        return {**original(model), "register_tokens": torch.zeros(1, 4, 32)}

    monkeypatch.setattr(module, "float_weights", with_more)
    refused(export, make_run(), "register_tokens")
