"""The ViT's options, each against a library model that has it, with the same weights, in float64."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, DINOv3ViTConfig, DINOv3ViTModel

from selfsup.batch import ImageBatch
from selfsup.config import validate
from selfsup.encoders.vit import ViT, ViTConfig
from selfsup.layers import block
from selfsup.objectives.mae import MAEConfig

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
# eager attention in transformers computes its softmax in float32, whatever the model is in
SIZES = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3,
         "image_size": 32, "patch_size": 8, "attn_implementation": "sdpa"}  # fmt: skip
CLOSE = 1e-10


def shaken(**options) -> ViT:
    """A float64 model none of whose parameters is at a special value."""
    torch.manual_seed(0)
    model = validate(ViTConfig, {**SMALL, **options}).build().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def in_timm(model: ViT) -> Tensor:
    config = model.config
    twin = VisionTransformer(
        img_size=config.img_size, patch_size=config.patch_size, embed_dim=config.embed_dim, depth=config.depth,
        num_heads=config.num_heads, num_classes=0, global_pool="token", reg_tokens=config.reg_tokens,
        pre_norm=config.pre_norm, act_layer=config.activation, init_values=config.layer_scale,
    ).double().eval()  # fmt: skip
    assert list(model.state_dict()) == list(twin.state_dict())
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.forward_features(IMAGES)


@pytest.mark.parametrize(
    "options",
    [
        {"reg_tokens": 4},
        {"pre_norm": True, "patch_bias": False},
        {"activation": "quick_gelu"},
        {"layer_scale": 0.1},
        {
            "reg_tokens": 2,
            "pre_norm": True,
            "patch_bias": False,
            "activation": "quick_gelu",
            "layer_scale": 1e-5,
        },
    ],
    ids=str,
)
@torch.no_grad()
def test_equals_timm(options):
    model = shaken(**options)
    assert (model.forward_features(IMAGES) - in_timm(model)).abs().max() < CLOSE


@torch.no_grad()
def test_planted_differences_from_timm_are_caught(monkeypatch):
    registers, scaled, quick = shaken(reg_tokens=2), shaken(layer_scale=0.1), shaken(activation="quick_gelu")
    expected = [in_timm(model) for model in (registers, scaled, quick)]
    prefix = torch.cat([registers.reg_token, registers.cls_token], dim=1) + registers.pos_embed[:, :3]
    registers.prepend_prefix = lambda patches: torch.cat([prefix.expand(3, -1, -1), patches], dim=1)
    monkeypatch.setattr(block.LayerScale, "forward", lambda self, x: x)
    monkeypatch.setattr(block.QuickGELU, "forward", lambda self, x: x * torch.sigmoid(1.7 * x))
    for model, theirs in zip((registers, scaled, quick), expected, strict=True):
        assert (model.forward_features(IMAGES) - theirs).abs().max() > 1e4 * CLOSE


def split_qkv(model: ViT, layer: int) -> dict[str, Tensor]:
    attention = model.blocks[layer].attn
    weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    return {
        f"{name}_proj.{kind}": value
        for kind, values in (("weight", weights), ("bias", biases))
        for name, value in zip("qkv", values, strict=True)
    }


def linear(name: str, layer: torch.nn.Module) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


@torch.no_grad()
def test_equals_clip():
    """CLIP's image tower: a norm after the embeddings, no bias in the patches, quick GELU, learned positions."""
    model = shaken(pre_norm=True, patch_bias=False, activation="quick_gelu", pos_embed="learned")
    twin = CLIPVisionModel(CLIPVisionConfig(**SIZES, layer_norm_eps=1e-6)).double().eval()
    state = {
        "embeddings.class_embedding": model.cls_token[0, 0],
        "embeddings.patch_embedding.weight": model.patch_embed.proj.weight,
        "embeddings.position_embedding.weight": model.pos_embed[0],
        **linear("pre_layrnorm", model.norm_pre),
        **linear("post_layernorm", model.norm),
    }
    for i, layer in enumerate(model.blocks):
        at = f"encoder.layers.{i}."
        state |= {f"{at}self_attn.{k}": v for k, v in split_qkv(model, i).items()}
        state |= linear(f"{at}self_attn.out_proj", layer.attn.proj) | linear(f"{at}layer_norm1", layer.norm1)
        state |= linear(f"{at}mlp.fc1", layer.mlp.fc1) | linear(f"{at}mlp.fc2", layer.mlp.fc2)
        state |= linear(f"{at}layer_norm2", layer.norm2)
    twin.load_state_dict(state, strict=True)
    before_norm = model.intermediates(model.embed(IMAGES))[-1]
    output = twin(IMAGES)
    assert (before_norm - output.last_hidden_state).abs().max() < CLOSE
    assert (model(IMAGES) - output.pooler_output).abs().max() < CLOSE


def dinov3_twin(model: ViT) -> DINOv3ViTModel:
    registers, layers = model.config.reg_tokens, {}
    for i, layer in enumerate(model.blocks):
        at = f"model.layer.{i}."
        layers |= {f"{at}attention.{k}": v for k, v in split_qkv(model, i).items()}
        layers |= linear(f"{at}attention.o_proj", layer.attn.proj)
        layers |= linear(f"{at}norm1", layer.norm1) | linear(f"{at}norm2", layer.norm2)
        layers |= linear(f"{at}mlp.up_proj", layer.mlp.fc1) | linear(f"{at}mlp.down_proj", layer.mlp.fc2)
        layers |= {f"{at}layer_scale1.lambda1": layer.ls1.gamma, f"{at}layer_scale2.lambda1": layer.ls2.gamma}
    config = DINOv3ViTConfig(**SIZES, num_register_tokens=registers, key_bias=True, layer_norm_eps=1e-6)
    twin = DINOv3ViTModel(config)
    state = {
        "embeddings.cls_token": model.cls_token,
        "embeddings.mask_token": torch.zeros(1, 1, 48),
        "embeddings.register_tokens": model.reg_token,
        **linear("embeddings.patch_embeddings", model.patch_embed.proj),
        **linear("norm", model.norm),
        **layers,
    }
    twin = twin.double().eval()
    twin.load_state_dict(state, strict=True)
    return twin


ROPE = {"pos_embed": "rope", "reg_tokens": 4, "layer_scale": 0.5}


@torch.no_grad()
def test_rotary_positions_equal_dinov3():
    model = shaken(**ROPE)
    theirs = dinov3_twin(model)(IMAGES).last_hidden_state
    # Theirs computes the angles in float32; ours does too from here on, so they agree to that.
    assert (model.forward_features(IMAGES) - theirs).abs().max() < 2e-6
    model.rotation = model.rotation.flip(1)  # row and column ends exchanged
    assert (model.forward_features(IMAGES) - theirs).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, ROPE], ids=["sincos", "rope"])
def test_patches_keep_their_positions_in_any_order(options):
    """Blocks have no order of their own: a shuffled subset gives the rows of the same subset unshuffled."""
    model, ids = shaken(**options), torch.stack([torch.randperm(16)[:7] for _ in range(3)])
    patches = model.embed(IMAGES)
    shuffled = model.encode(patches.gather(1, ids[..., None].expand(-1, -1, 48)), ids)
    ordered, order = ids.sort(dim=1)
    straight = model.encode(patches.gather(1, ordered[..., None].expand(-1, -1, 48)), ordered)
    prefix = model.num_prefix_tokens
    expected = straight[:, prefix:].gather(1, order.argsort(1)[..., None].expand(-1, -1, 48))
    assert (shuffled[:, prefix:] - expected).abs().max() < CLOSE
    assert (shuffled[:, :prefix] - straight[:, :prefix]).abs().max() < CLOSE
    if options:  # a planted bug: the positions of other patches
        wrong = model.encode(patches.gather(1, ids[..., None].expand(-1, -1, 48)), ids.roll(1, dims=1))
        assert (wrong[:, prefix:] - expected).abs().max() > 1e-3


def test_mae_learns_with_every_option():
    torch.manual_seed(0)
    vit = validate(
        ViTConfig, {**SMALL, **ROPE, "pre_norm": True, "activation": "quick_gelu", "patch_bias": False}
    )
    mae = MAEConfig(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2).build(vit)
    rows = torch.arange(3)
    batch = ImageBatch(IMAGES.float(), 0, torch.zeros_like(rows), rows, rows)
    optimizer, losses = torch.optim.AdamW(mae.parameters(), lr=3e-3), []
    for _ in range(30):
        loss = mae(batch, 3.0).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    unused = [name for name, p in mae.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert unused == [] and losses[-1] < 0.9 * losses[0]


def test_rope_needs_four_channels():
    with pytest.raises(ValueError, match="rope needs a multiple of 4 channels a head, got 6"):
        validate(ViTConfig, {**SMALL, "embed_dim": 18, "num_heads": 3, "pos_embed": "rope"})
