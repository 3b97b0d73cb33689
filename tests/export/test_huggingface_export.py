"""ViTModel and ViTMAEForPreTraining give, from our folder, what our model gives."""

import importlib.util

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from selfsup.checkpoint import load_encoder, load_objective
from selfsup.data.images import _resize_and_crop
from selfsup.export import huggingface_mae
from selfsup.export.huggingface import export_hf
from selfsup.export.huggingface_mae import export_hf_mae
from selfsup.export.load import load_frozen
from selfsup.objectives.mae import mae_loss, patchify

GREY = {"encoder": {"in_chans": 1}, "data": {"mean": [0.4], "std": [0.2]}}
ENCODERS = {
    "cls": {},
    "mean": {"encoder": {"pool": "mean"}},
    "learned positions": {"encoder": {"pos_embed": "learned"}},
    "grey": GREY,
    "no qkv bias, wide mlp, drop path": {"encoder": {"qkv_bias": False, "mlp_ratio": 3.5, "drop_path": 0.2}},
    "one head, one block": {"encoder": {"patch_size": 8, "depth": 1, "num_heads": 1}},
}
AUTOENCODERS = {
    **ENCODERS,
    "pixels": {"objective": {"norm_pix_loss": False}},
    "half": {"objective": {"mask_ratio": 0.5}},
    "no decoder blocks": {"objective": {"decoder_depth": 0}},
    "deep decoder": {"objective": {"decoder_depth": 3, "decoder_num_heads": 4}},
}
FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


def close(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def loaded(kind, folder, **options):
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("changes", ENCODERS.values(), ids=ENCODERS)
def test_vit_model(make_run, run_card, changes):
    run = make_run(changes)
    encoder, recipe, *_ = load_encoder(run)
    encoder.requires_grad_(False)
    report = export_hf(run)
    assert report.folder == run / "export" / "hf-step-7"
    assert {p.name for p in report.folder.iterdir()} == FILES
    library = f"transformers {transformers.__version__}"
    assert [(c.library, c.dtype) for c in report.checks] == [
        (f"{library} ViTModel", "float32"),
        (f"{library} ViTModel", "float64"),
        (f"{library} image processor", "float32"),
    ]
    images = torch.randn(3, recipe.encoder.in_chans, 16, 16)
    model = loaded(transformers.ViTModel, report.folder, add_pooling_layer=False)
    assert close(model(images).last_hidden_state, encoder.forward_features(images))
    (variables,) = run_card(report.folder, images)
    assert close(variables["features"], encoder(images))
    assert tuple(variables["processor"].image_mean) == recipe.data.mean


@pytest.mark.parametrize("changes", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_vit_mae_for_pretraining(make_run, run_card, changes):
    run = make_run(changes)
    ours, recipe, *_ = load_objective(run)
    ours.requires_grad_(False)
    report = export_hf_mae(run)
    assert report.folder == run / "export" / "hf-mae-step-7"
    assert {p.name for p in report.folder.iterdir()} == FILES
    assert [c.dtype for c in report.checks] == ["float32", "float64", "float32"]
    theirs = loaded(transformers.ViTMAEForPreTraining, report.folder)
    images = torch.randn(3, recipe.encoder.in_chans, 16, 16)
    noise = torch.rand(3, recipe.encoder.num_patches)
    output = theirs(images, noise=noise)
    pred, mask = ours.predict(images, noise)
    target = patchify(images, recipe.encoder.patch_size)
    assert torch.equal(mask, output.mask)
    assert close(output.logits, pred)
    assert close(output.loss, mae_loss(pred, target, mask, recipe.objective.norm_pix_loss).mean())
    (variables,) = run_card(report.folder, images)
    assert variables["output"].logits.shape == pred.shape


def test_gradients_are_the_same(make_run):
    """What is exported can be trained further: the same loss has the same slope."""
    run = make_run()
    ours, *_ = load_objective(run)
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(export_hf_mae(run).folder).eval()
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    theirs(images, noise=noise).loss.backward()
    pred, mask = ours.predict(images, noise)
    mae_loss(pred, patchify(images, 4), mask, True).mean().backward()
    for mine, other in (
        ("encoder.patch_embed.proj.weight", "vit.embeddings.patch_embeddings.projection.weight"),
        ("decoder.mask_token", "decoder.mask_token"),
        ("decoder.decoder_pred.weight", "decoder.decoder_pred.weight"),
    ):
        a, b = ours.get_parameter(mine).grad, theirs.get_parameter(other).grad
        assert (a - b).norm() <= 1e-5 * b.norm(), mine


def test_names_on_disk_are_those_of_version_4(make_run):
    """Version 5's names load in version 5 too, and in 4 give a random model."""
    layer = {
        f"{part}.{leaf}"
        for part in (
            "attention.attention.query", "attention.attention.key", "attention.attention.value",
            "attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after",
        )
        for leaf in ("weight", "bias")
    }  # fmt: skip
    encoder = {f"encoder.layer.{i}.{name}" for i in range(3) for name in layer}
    encoder |= {
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "layernorm.weight",
        "layernorm.bias",
    }
    encoder |= {f"embeddings.patch_embeddings.projection.{leaf}" for leaf in ("weight", "bias")}
    decoder = {f"decoder.decoder_layers.0.{name}" for name in layer}
    decoder |= {"decoder.mask_token", "decoder.decoder_pos_embed"}
    for part in ("decoder_embed", "decoder_norm", "decoder_pred"):
        decoder |= {f"decoder.{part}.weight", f"decoder.{part}.bias"}
    run = make_run()
    assert load_file(export_hf(run).folder / "model.safetensors").keys() == encoder
    saved = load_file(export_hf_mae(run).folder / "model.safetensors")
    assert saved.keys() == {f"vit.{name}" for name in encoder} | decoder


@pytest.mark.parametrize("changes", [{}, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("shape", [(16, 16), (24, 37), (52, 17)])
def test_the_processor_prepares_an_image_as_our_probes_do(make_run, changes, shape):
    """Where an odd number of rows has to go, the two crops may lie one row apart: not so here."""
    run = make_run(changes)
    recipe = load_encoder(run)[1]
    channels = recipe.encoder.in_chans
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (recipe.data.mean, recipe.data.std))
    ours = (_resize_and_crop(pixels, 16) / 255 - mean) / std
    processor = transformers.AutoImageProcessor.from_pretrained(export_hf(run).folder)
    image = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() <= 1.01 / 255 / std.min()  # one level of 8 bits, by rounding


def test_automodel_makes_up_a_pooler_and_the_card_says_so(make_run):
    folder = export_hf(make_run()).folder
    _, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert {str(key) for key in info["missing_keys"]} == {"pooler.dense.weight", "pooler.dense.bias"}
    text = (folder / "README.md").read_text()
    assert "its `pooler_output` means nothing" in text and "add_pooling_layer=False" in text


def test_our_own_loader_takes_them(make_run):
    run = make_run()
    encoder, *_ = load_encoder(run)
    images = torch.randn(3, 3, 16, 16)
    for export in (export_hf, export_hf_mae):
        frozen = load_frozen(str(export(run).folder))
        assert close(frozen.features(images), encoder(images))
        assert frozen.mean == (0.4, 0.5, 0.6) and frozen.std == (0.2, 0.3, 0.4) and frozen.img_size == 16


@pytest.mark.parametrize("export", [export_hf, export_hf_mae])
def test_what_vit_cannot_express_is_refused(make_run, monkeypatch, export):
    run = make_run({"encoder": {"class_token": False, "pool": "mean"}})
    with pytest.raises(ValueError, match="--to hf.*class_token is false.*NOT exported, try --to timm"):
        export(run)
    monkeypatch.setattr(importlib.util, "find_spec", {"transformers": None}.__getitem__)
    with pytest.raises(ValueError, match="transformers is not installed"):
        export(make_run(name="other"))
    assert not (run / "export").exists()


def test_only_a_masked_autoencoder_has_its_decoder(make_run, monkeypatch):
    run = make_run()
    _, *rest = load_objective(run)
    monkeypatch.setattr(huggingface_mae, "load_objective", lambda *_: (nn.Identity(), *rest))
    with pytest.raises(ValueError, match="--to hf-mae: expected objective.name mae"):
        export_hf_mae(run)
    assert not (run / "export").exists()
