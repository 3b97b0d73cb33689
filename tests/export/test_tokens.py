"""Patch tokens of every kind of encoder: those of its own library, without what stands before them."""

import pytest
import timm
import torch
import transformers

from selfsup.checkpoint import load_encoder
from selfsup.export.load import load_frozen
from selfsup.export.timm import export_timm

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}


@pytest.mark.parametrize("class_token", [True, False])
def test_tokens_of_a_run_and_its_export(make_run, class_token):
    run = make_run({"encoder": {"class_token": class_token, "pool": "mean"}})
    encoder, *_ = load_encoder(run)
    expected = encoder.forward_features(IMAGES)[:, int(class_token) :]
    for source in (run, export_timm(run).folder):
        frozen = load_frozen(str(source))
        tokens = frozen.tokens(IMAGES)
        assert tokens.shape == (3, 16, 32) and not tokens.requires_grad
        assert torch.allclose(tokens, expected, atol=1e-5)
        assert torch.allclose(tokens.mean(dim=1), frozen.features(IMAGES), atol=1e-5)


def test_tokens_through_transformers_timm_wrapper(make_run, tmp_path):
    folder = export_timm(make_run()).folder
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "hf")
    transformers.AutoImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "hf")
    ours, theirs = load_frozen(str(folder)), load_frozen(str(tmp_path / "hf"))
    assert torch.allclose(theirs.tokens(IMAGES), ours.tokens(IMAGES), atol=1e-5)


@pytest.mark.parametrize(("name", "last"), [("test_resnet", 1), ("swin_tiny_patch4_window7_224", 3)])
def test_tokens_of_a_map_are_its_positions(name, last, tmp_path):
    sizes = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)} if "swin" in name else {}
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **sizes).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=sizes, safe_serialization=True)
    frozen = load_frozen(str(tmp_path))
    images = torch.randn(2, 3, frozen.img_size, frozen.img_size)
    with torch.no_grad():
        features = model.forward_features(images)
    tokens = frozen.tokens(images)
    channel_last = features.movedim(last, -1)  # (b, h, w, d)
    assert torch.allclose(tokens[:, 1], channel_last[:, 0, 1], atol=1e-5)
    assert torch.allclose(tokens[:, -1], channel_last[:, -1, -1], atol=1e-5)
    assert torch.allclose(tokens.mean(dim=1), frozen.features(images), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "model", "prefix"),
    [
        (transformers.ViTConfig(**VISION), transformers.ViTModel, 1),
        (transformers.DeiTConfig(**VISION), transformers.DeiTModel, 2),
        (
            transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3),
            transformers.Dinov2WithRegistersModel,
            4,
        ),
    ],
    ids=["class", "distillation", "registers"],
)
def test_what_stands_before_the_patches_is_left_out(config, model, prefix, tmp_path):
    torch.manual_seed(0)
    module = model(config).eval()
    module.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    frozen = load_frozen(str(tmp_path))
    with torch.no_grad():
        expected = module(IMAGES).last_hidden_state
    assert expected.shape[1] == 16 + prefix
    assert torch.allclose(frozen.tokens(IMAGES), expected[:, prefix:], atol=1e-5)
    assert torch.allclose(frozen.features(IMAGES), expected[:, 0], atol=1e-5)


def test_tokens_of_transformers_mae_are_unmasked_and_in_order(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(**VISION, decoder_hidden_size=16, decoder_num_attention_heads=2)
    module = transformers.ViTMAEModel(config).eval()
    module.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    tokens = load_frozen(str(tmp_path)).tokens(IMAGES)
    module.config.mask_ratio = 0.0
    with torch.no_grad():
        shuffled = module(IMAGES)
    expected = torch.gather(
        shuffled.last_hidden_state[:, 1:], 1, shuffled.ids_restore[..., None].expand(-1, -1, 24)
    )
    assert torch.allclose(tokens, expected, atol=1e-5)
