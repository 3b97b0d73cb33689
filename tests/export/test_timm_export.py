"""A timm-format export loads in timm and transformers with the same outputs; a wrong one never appears."""

import importlib.util
import json

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from selfsup.checkpoint import find_checkpoint, load_encoder
from selfsup.export import timm as export
from selfsup.export.names import float_weights
from selfsup.export.timm import export_timm, verify
from selfsup.export.verify import check_outputs

VARIANTS = {
    "cls": {},
    "mean": {"encoder": {"pool": "mean"}},
    "no class token": {"encoder": {"pool": "mean", "class_token": False}},
    "learned positions": {"encoder": {"pos_embed": "learned"}},
    "grey": {"encoder": {"in_chans": 1}, "data": {"mean": [0.4], "std": [0.2]}},
    "no qkv bias, wide mlp, drop path": {"encoder": {"qkv_bias": False, "mlp_ratio": 3.5, "drop_path": 0.2}},
    "one token": {"encoder": {"pool": "mean", "patch_size": 8, "depth": 1, "num_heads": 1}},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_loads_in_timm_and_transformers(make_run, changes):
    run = make_run(changes)
    encoder, recipe, *_ = load_encoder(run)
    report = export_timm(run)
    assert report.folder == run / "export" / "timm-step-7"
    assert {p.name for p in report.folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    *outputs, transform = report.checks
    assert [(c.library.split()[0], c.dtype) for c in outputs] == [
        (library, dtype) for dtype in ("float32", "float64") for library in ("timm", "transformers")
    ]
    assert transform.library == f"timm {timm.__version__} transform"
    encoder.requires_grad_(False)
    images = torch.randn(3, recipe.encoder.in_chans, 16, 16)
    ours = encoder(images)
    limit = 1e-5 * max(1.0, float(ours.abs().max()))
    in_timm = timm.create_model(f"local-dir:{report.folder}", pretrained=True).eval()
    assert (in_timm(images) - ours).abs().max() <= limit
    tokens = encoder.forward_features(images)
    hf, info = transformers.AutoModel.from_pretrained(report.folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    output = hf.eval()(images)
    assert (output.pooler_output - ours).abs().max() <= limit
    assert (output.last_hidden_state - tokens).abs().max() <= 1e-5 * max(1.0, float(tokens.abs().max()))


def test_normalisation_and_size_reach_timm_and_transformers(make_run):
    folder = export_timm(make_run()).folder
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 16, 16)
    assert data["crop_pct"] == 1.0 and data["interpolation"] == "bicubic"
    assert [*data["mean"]] == [0.4, 0.5, 0.6] and [*data["std"]] == [0.2, 0.3, 0.4]
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = rearrange((pixels / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4], "h w c -> c h w")
    transform = timm.data.create_transform(**data)
    assert np.allclose(transform(Image.fromarray(pixels)), expected, atol=1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    processed = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert np.allclose(processed, expected, atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_downstream_use_in_timm(make_run, pool):
    """A head, other channels, another size: none of them loses the norm."""
    folder = export_timm(make_run({"encoder": {"pool": pool}})).folder
    encoder, *_ = load_encoder(folder.parents[1])
    for change in ({"num_classes": 5}, {"in_chans": 1}, {"img_size": 32}):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, **change)
        assert torch.equal(model.norm.weight, encoder.norm.weight)
        assert isinstance(model.fc_norm, nn.Identity)


def test_swapped_positions_are_caught(make_run, monkeypatch):
    weights_of = export.float_weights

    def swapped(encoder):
        weights = weights_of(encoder)
        grid = rearrange(weights["pos_embed"][:, 1:], "b (h w) d -> b (w h) d", h=4)
        return {**weights, "pos_embed": torch.cat([weights["pos_embed"][:, :1], grid], dim=1).contiguous()}

    run = make_run()
    monkeypatch.setattr(export, "float_weights", swapped)
    with pytest.raises(ValueError, match="largest difference"):
        export_timm(run)
    assert list((run / "export").iterdir()) == []


@pytest.mark.parametrize(
    ("pool", "fault"),
    [
        ("cls", {"act_layer": "gelu_tanh"}),
        ("mean", {"fc_norm": None}),  # timm's default: pool, then norm; our norm would be dropped
        ("cls", {"depth": 2}),
        ("cls", {"img_size": 32}),  # timm would resize the positions without a word
        ("cls", {"global_pool": "avg"}),
        ("cls", {"num_classes": 3}),
        ("cls", {"not_an_argument": 1}),
    ],
)
def test_fault_in_the_config_is_caught(make_run, monkeypatch, pool, fault):
    config_of = export.timm_config

    def faulty(encoder, mean, std):
        config = config_of(encoder, mean, std)
        return {**config, "model_args": {**config["model_args"], **fault}}

    run = make_run({"encoder": {"pool": pool}})
    monkeypatch.setattr(export, "timm_config", faulty)
    with pytest.raises(ValueError):
        export_timm(run)
    assert list((run / "export").iterdir()) == []


@pytest.mark.parametrize("fault", [{"mean": [0.5, 0.5, 0.5]}, {"std": [1, 1, 1]}, {"crop_pct": 0.875}])
def test_fault_in_the_normalisation_is_caught(make_run, monkeypatch, fault):
    """The features of normalised images are right then, and those of a user's images wrong."""
    config_of = export.timm_config

    def faulty(encoder, mean, std):
        config = config_of(encoder, mean, std)
        return {**config, "pretrained_cfg": {**config["pretrained_cfg"], **fault}}

    run = make_run()
    monkeypatch.setattr(export, "timm_config", faulty)
    with pytest.raises(ValueError, match="timm .* transform.* NOT exported"):
        export_timm(run)
    assert list((run / "export").iterdir()) == []


def test_verify_sees_nan_and_missing_weights(make_run):
    folder = export_timm(make_run()).folder
    encoder, recipe, *_ = load_encoder(folder.parents[1])
    with torch.no_grad():
        encoder.norm.bias[0] = float("nan")
    with pytest.raises(ValueError, match="NOT exported"):
        verify(folder, encoder, recipe)
    weights = {k: v for k, v in float_weights(encoder).items() if k != "blocks.0.norm1.bias"}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="norm1.bias"):
        verify(folder, encoder, recipe)


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_in_any_output_is_seen(tmp_path, place):
    ours = (torch.ones(2), torch.ones(3))
    theirs = tuple(output.clone() for output in ours)
    check_outputs(tmp_path, "library", ours, theirs, 1e-5)
    theirs[place][-1] = float("nan")
    with pytest.raises(ValueError, match="largest difference nan"):
        check_outputs(tmp_path, "library", ours, theirs, 1e-5)


def test_verify_restores_the_precision_it_needs(make_run):
    run = make_run()
    torch.set_float32_matmul_precision("medium")
    export_timm(run)
    assert torch.get_float32_matmul_precision() == "medium"


def test_without_transformers_it_says_so(make_run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {"transformers": None}.__getitem__)
    report = export_timm(make_run())
    assert report.notes == ("not checked in transformers: not installed",)
    assert {check.library.split()[0] for check in report.checks} == {"timm"}
    assert "not checked in transformers: not installed" in (report.folder / "README.md").read_text()


def test_sources_and_targets(make_run, tmp_path):
    run = make_run()
    checkpoint, _ = find_checkpoint(run)
    assert export_timm(checkpoint).folder == run / "export" / "timm-step-7"
    with pytest.raises(ValueError, match="already exists; remove it, or give another folder with --out"):
        export_timm(run)
    assert export_timm(run, tmp_path / "deep" / "er").folder == tmp_path / "deep" / "er"
    (tmp_path / "moved").mkdir()
    moved = checkpoint.rename(tmp_path / "moved" / "step")
    with pytest.raises(ValueError, match="--out"):
        export_timm(moved)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        export_timm(tmp_path / "nothing")
    with pytest.raises(ValueError, match="NOT written"):
        export_timm(moved, moved / "state.json" / "x")


def test_damaged_newest_checkpoint_is_reported(make_run):
    run = make_run(step=7)
    make_run(step=9)
    (run / "checkpoints" / "step-00000009" / "objective.safetensors").write_bytes(b"no")
    report = export_timm(run)
    assert report.step == 7
    assert "step-00000009: damaged checkpoint passed over" in report.notes[0]


def test_card_states_the_run_and_no_private_path(make_run):
    changes = {"data": {"shards": "/home/someone/digits/train"}, "encoder": {"pool": "mean"}}
    text = (export_timm(make_run(changes)).folder / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "timm"
    facts = ["1792 samples", "7 optimizer steps", "mean over patch tokens", "f1ngerpr1nt"]
    facts += ["[0.4, 0.5, 0.6]", "largest difference", "mask_ratio: 0.75", "local-dir:"]
    assert [fact for fact in facts if fact not in body] == []
    assert "someone" not in text and "digits/train" in text


def test_config_has_num_classes_at_the_top_only(make_run):
    config = json.loads((export_timm(make_run()).folder / "config.json").read_text())
    assert config["num_classes"] == 0
    assert "num_classes" not in config["model_args"] and "num_classes" not in config["pretrained_cfg"]
