"""Our ViT against timm's, with the same weights, and what its configuration promises."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from selfsup.config import validate
from selfsup.encoders.vit import ViTConfig
from selfsup.layers.block import DropPath
from selfsup.layers.patch_embed import sincos_2d

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
FORMS = [
    {},
    {"pool": "mean"},
    {"pool": "mean", "class_token": False, "pos_embed": "learned"},
    {"in_chans": 1, "qkv_bias": False, "mlp_ratio": 2.5},
]


def timm_twin(config: ViTConfig, fused: bool) -> VisionTransformer:
    twin = VisionTransformer(
        img_size=config.img_size, patch_size=config.patch_size, in_chans=config.in_chans,
        embed_dim=config.embed_dim, depth=config.depth, num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio, qkv_bias=config.qkv_bias, class_token=config.class_token,
        global_pool="token" if config.pool == "cls" else "avg", fc_norm=False, num_classes=0,
    )  # fmt: skip
    for layer in twin.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = fused
    return twin.eval()


def shaken(config: ViTConfig) -> torch.nn.Module:
    """A model none of whose parameters is at a special value."""
    torch.manual_seed(0)
    model = config.build().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("fused,tolerance", [(False, 1e-6), (True, 1e-5)])
def test_equals_timm(form, fused, tolerance):
    config = validate(ViTConfig, {**SMALL, **form})
    ours, theirs = shaken(config), timm_twin(config, fused)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(3, config.in_chans, 32, 32)
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        largest = tokens.abs().max()
        assert (ours.forward_features(images) - tokens).abs().max() <= tolerance * largest
        assert (ours(images) - theirs(images)).abs().max() <= tolerance * largest
        steps = theirs.forward_intermediates(images, intermediates_only=True, output_fmt="NLC")
        for mine, other in zip(ours.intermediates(ours.embed(images)), steps, strict=True):
            assert (mine[:, ours.num_prefix_tokens :] - other).abs().max() <= tolerance * largest


def test_a_planted_difference_is_caught():
    config = validate(ViTConfig, SMALL)
    ours, theirs = shaken(config), timm_twin(config, False)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    for layer in ours.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            layer.eps = 1e-5
    with torch.no_grad():
        assert (ours(images) - theirs(images)).abs().max() > 1e-6 * theirs(images).abs().max()


def test_published_sizes():
    for size, dims in {
        "tiny": (192, 12, 3),
        "small": (384, 12, 6),
        "base": (768, 12, 12),
        "large": (1024, 24, 16),
    }.items():
        theirs = timm.create_model(f"vit_{size}_patch16_224", num_classes=0)
        config = validate(ViTConfig, dict(zip(("embed_dim", "depth", "num_heads"), dims, strict=True)))
        with torch.device("meta"):
            ours = config.build()
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }


def test_torch_kernel_equals_reference():
    ours = shaken(validate(ViTConfig, SMALL))
    fused = validate(ViTConfig, {**SMALL, "attention": "torch"}).build().eval()
    fused.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours(images), fused(images), atol=1e-5)


def test_positions_follow_the_published_layout():
    """A loop over facebookresearch/mae's definition: column (w) in the first half, then row."""
    positions, dim = sincos_2d(16, 3), 16
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                expected += [torch.tensor(a, dtype=torch.float64).sin() for a in angles]
                expected += [torch.tensor(a, dtype=torch.float64).cos() for a in angles]
            got = positions[row * 3 + column]
            assert torch.allclose(got.double(), torch.stack(expected), atol=1e-7)
    swapped = positions.view(3, 3, 16).transpose(0, 1).reshape(9, 16)
    assert not torch.allclose(swapped, positions)


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25).train(), torch.ones(20_000, 1, 2)
    y = drop(x)
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert (y[:, 0, 0] == y[:, 0, 1]).all() and abs(y.mean() - 1) < 0.02
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_drops_as_often_in_bfloat16():
    """A small rate, as in the first blocks of a deep encoder; numbers of 8 bits would make it 2/256."""
    torch.manual_seed(0)
    n, rate = 400_000, 0.009
    dropped = (DropPath(rate).train()(torch.ones(n, 1, 1, dtype=torch.bfloat16)) == 0).sum().item()
    assert abs(dropped - n * rate) < 5 * (n * rate) ** 0.5 < n * (rate - 2 / 256)


def test_wrong_image_size():
    with pytest.raises(ValueError, match="expected 32x32 pixels, got"):
        validate(ViTConfig, SMALL).build()(torch.zeros(1, 3, 40, 32))
