"""Attention maps against timm's attention with the same weights."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from selfsup.config import validate
from selfsup.encoders.vit import ViTConfig
from selfsup.layers import attention as layers_attention
from selfsup.look import attention
from selfsup.look.attention import attention_maps, patch_maps

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
FORMS = [
    {},
    {"pool": "mean"},
    {"pool": "mean", "class_token": False},
    {"in_chans": 1, "qkv_bias": False, "pos_embed": "learned", "drop_path": 0.5},
    {"attention": "torch"},
]


def shaken(config: ViTConfig) -> nn.Module:
    """A model none of whose parameters is at a special value."""
    torch.manual_seed(0)
    model = config.build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def timm_weights(config: ViTConfig, ours: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(depth, b, heads, m, m) out of timm's own attention, at float64."""
    twin = VisionTransformer(
        img_size=config.img_size, patch_size=config.patch_size, in_chans=config.in_chans,
        embed_dim=config.embed_dim, depth=config.depth, num_heads=config.num_heads, qkv_bias=config.qkv_bias,
        class_token=config.class_token, global_pool="avg", fc_norm=False, num_classes=0,
    ).eval()  # fmt: skip
    twin.load_state_dict(ours.state_dict(), strict=True)
    twin.double()
    caught = []
    for block in twin.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, output: caught.append(inputs[0]))
    with torch.no_grad():
        twin(images.double())
    return torch.stack(caught)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_equals_timm(form):
    config = validate(ViTConfig, {**SMALL, **form})
    ours = shaken(config)
    images = torch.randn(2, config.in_chans, 32, 32)
    maps = attention_maps(ours, images)
    assert maps.shape == (3, 2, 4, config.num_patches + config.class_token)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(3, 2, 4))
    theirs = timm_weights(config, ours, images)
    expected = theirs[..., 0, :] if config.class_token else theirs.mean(dim=-2)
    assert expected.std() > 0.01  # not the uniform map, which any bug would give
    torch.testing.assert_close(maps.double(), expected, atol=2e-6, rtol=1e-4)
    assert ours.training and not any(block.attn._forward_hooks for block in ours.blocks)


def test_patch_maps_lie_as_the_image():
    maps = torch.arange(2 * 1 * 3 * 17).float().reshape(2, 1, 3, 17)
    laid = patch_maps(maps, 1)
    assert laid.shape == (2, 1, 3, 4, 4)
    for y in range(4):
        for x in range(4):
            torch.testing.assert_close(laid[..., y, x], maps[..., 1 + 4 * y + x])


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="expected a vit encoder of selfsup, got Identity"):
        attention_maps(nn.Identity(), torch.zeros(1, 3, 8, 8))


BEYOND_TIMM = [
    {"pos_embed": "rope"},
    {"pos_embed": "rope", "class_token": False, "pool": "mean", "reg_tokens": 3},
    {"reg_tokens": 2, "layer_scale": 0.5, "pre_norm": True},
]


@pytest.mark.parametrize("form", BEYOND_TIMM, ids=str)
def test_equals_the_softmax_of_what_reaches_the_kernel(form, monkeypatch):
    """For forms that timm's class has not: queries and keys caught at the kernel, the rest in float64."""
    ours = shaken(validate(ViTConfig, {**SMALL, **form})).eval()
    images, caught = torch.randn(2, 3, 32, 32), []

    def kernel(q, k, v, *rules, **options):
        caught.append((q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1))
        return (caught[-1] @ v.double()).float()

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(layers_attention, "attention_function", lambda name: kernel)
        ours.forward_features(images)
    prefix = ours.num_prefix_tokens
    weights = torch.stack(caught)
    expected = weights[..., 0, :] if ours.config.class_token else weights[..., prefix:, :].mean(dim=-2)
    maps = attention_maps(ours, images)
    torch.testing.assert_close(maps.double(), expected, atol=1e-5, rtol=1e-3)
    assert patch_maps(maps, prefix).shape == (3, 2, 4, 4, 4) and not ours.training


class TurnedLayer(nn.Module):
    """An attention layer that takes a step which the maps do not know of: queries are turned."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.heads, self.proj = layer.heads, layer.proj

    def forward(self, x, rotation, scope, cache):
        b, m, d = x.shape
        q, k, v = self.heads(x, rotation)
        q = torch.cat([-q[..., 1::2], q[..., ::2]], dim=-1)
        values = ((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)
        return self.proj(values.reshape(b, m, d))


def test_a_layer_that_the_maps_do_not_explain_is_refused():
    model = shaken(validate(ViTConfig, SMALL))
    model.blocks[1].attn = TurnedLayer(model.blocks[1].attn)
    with pytest.raises(ValueError, match="do not give its output"):
        attention_maps(model, torch.randn(2, 3, 32, 32))
    assert not any(block.attn._forward_hooks for block in model.blocks) and model.training


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k: attention_weights(k, q),
        lambda q, k: attention_weights(q, k, scale=1.0),
        lambda q, k: attention_weights(q, k).transpose(-2, -1),
    ],
    ids=["keys ask", "no scale", "transposed"],
)
def test_wrong_weights_are_caught(monkeypatch, wrong):
    monkeypatch.setattr(attention, "attention_weights", wrong)
    with pytest.raises(ValueError, match="do not give its output"):
        attention_maps(shaken(validate(ViTConfig, SMALL)), torch.randn(2, 3, 32, 32))


attention_weights = attention.attention_weights
