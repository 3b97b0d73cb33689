"""One doorway: runs, timm's and Hugging Face's models give the features their libraries give."""

import json

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from selfsup.checkpoint import find_checkpoint, load_encoder
from selfsup.export.load import load_frozen
from selfsup.export.timm import export_timm

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_run_checkpoint_and_export_are_the_same_encoder(make_run, pool):
    run = make_run({"encoder": {"pool": pool}})
    encoder, recipe, *_ = load_encoder(run)
    folder = export_timm(run).folder
    checkpoint, _ = find_checkpoint(run)
    for source in (run, checkpoint, folder):
        frozen = load_frozen(str(source))
        assert (frozen.img_size, frozen.in_chans) == (16, 3)
        assert frozen.mean == (0.4, 0.5, 0.6) and frozen.std == (0.2, 0.3, 0.4)
        assert torch.allclose(frozen.features(IMAGES), encoder(IMAGES), atol=1e-5)
        assert not frozen.features(IMAGES).requires_grad
        assert not any(p.requires_grad for p in frozen.module.parameters()) and not frozen.module.training
    assert load_frozen(str(run)).recipe == recipe and load_frozen(str(run)).checkpoint == checkpoint
    assert load_frozen(str(folder)).recipe is None


def test_saved_by_transformers_from_our_export(make_run, tmp_path):
    folder = export_timm(make_run()).folder
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "hf")
    transformers.AutoImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "hf")
    ours, theirs = load_frozen(str(folder)), load_frozen(str(tmp_path / "hf"))
    assert theirs.describe.startswith("transformers timm_wrapper")
    assert (theirs.mean, theirs.std, theirs.img_size) == (ours.mean, ours.std, ours.img_size)
    assert torch.allclose(theirs.features(IMAGES), ours.features(IMAGES), atol=1e-5)


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1}


def timm_folder(path, name, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    timm.models.save_for_hf(model, path, model_args=arguments, safe_serialization=True)
    return model


def test_timm_folders_of_others_lose_their_head_and_nothing_else(tmp_path):
    vit = timm_folder(tmp_path / "vit", "vit_tiny_patch16_224", **SMALL, global_pool="avg")
    torch.nn.init.normal_(vit.fc_norm.weight)
    save_file(vit.state_dict(), tmp_path / "vit" / "model.safetensors")
    expected = vit.forward_head(vit.forward_features(IMAGES), pre_logits=True)
    assert torch.allclose(load_frozen(str(tmp_path / "vit")).features(IMAGES), expected, atol=1e-6)
    resnet = timm_folder(tmp_path / "resnet", "test_resnet")
    frozen = load_frozen(str(tmp_path / "resnet"))
    images = torch.randn(2, 3, frozen.img_size, frozen.img_size)
    expected = resnet.forward_head(resnet.forward_features(images), pre_logits=True)
    assert torch.allclose(frozen.features(images), expected, atol=1e-5)


def test_timm_folder_with_a_missing_weight_is_refused(tmp_path):
    timm_folder(tmp_path / "vit", "vit_tiny_patch16_224", **SMALL)
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(ValueError, match="norm.weight"):
        load_frozen(str(tmp_path / "vit"))


SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def tiny_vit():
    return transformers.ViTModel(transformers.ViTConfig(**SIZES), add_pooling_layer=False)


def huggingface_folder(path, model, **processor):
    torch.manual_seed(0)
    model = model.eval()
    model.save_pretrained(path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, **processor).save_pretrained(path)
    return model


def test_huggingface_vit_gives_its_class_token(tmp_path):
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    model = huggingface_folder(tmp_path, tiny_vit(), image_mean=mean, image_std=std)
    frozen = load_frozen(str(tmp_path))
    assert frozen.mean == tuple(mean) and frozen.std == tuple(std) and frozen.img_size == 16
    expected = model(IMAGES).last_hidden_state[:, 0]
    assert torch.allclose(frozen.features(IMAGES), expected, atol=1e-6)


def test_huggingface_mae_is_not_masked(tmp_path):
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**SIZES, **decoder, mask_ratio=0.75)
    model = huggingface_folder(tmp_path, transformers.ViTMAEForPreTraining(config))
    frozen = load_frozen(str(tmp_path))
    first = frozen.features(IMAGES)
    assert torch.equal(first, frozen.features(IMAGES))
    model.config.mask_ratio = 0.0
    assert torch.allclose(first, model.vit(IMAGES).last_hidden_state[:, 0], atol=1e-5)
    model.config.mask_ratio = 0.75
    assert not torch.allclose(first, model.vit(IMAGES).last_hidden_state[:, 0], atol=1e-2)


def test_huggingface_models_without_a_class_token_are_averaged(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    model = huggingface_folder(tmp_path, transformers.ResNetModel(config), do_normalize=False)
    frozen = load_frozen(str(tmp_path))
    assert frozen.mean == (0.0, 0.0, 0.0) and frozen.std == (1.0, 1.0, 1.0) and frozen.img_size == 16
    assert torch.allclose(frozen.features(IMAGES), model(IMAGES).pooler_output.flatten(1), atol=1e-6)


def test_huggingface_input_scales_other_than_ours_are_refused(tmp_path):
    huggingface_folder(tmp_path, tiny_vit(), rescale_factor=1 / 127.5)
    with pytest.raises(ValueError, match="1/255"):
        load_frozen(str(tmp_path))


def test_missing_huggingface_weights_are_refused(tmp_path):
    huggingface_folder(tmp_path, tiny_vit())
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in weights if "layernorm_before.weight" in key)
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="layernorm_before.weight"):
        load_frozen(str(tmp_path))


def test_names_go_to_the_libraries_and_ask_for_safetensors(monkeypatch):
    asked = []
    create = timm.create_model

    def offline(name, pretrained, pretrained_cfg_overlay):
        asked.append((name, pretrained, pretrained_cfg_overlay))
        return create(name, pretrained=False)

    monkeypatch.setattr(timm, "create_model", offline)
    for source in ("timm:test_vit.r160_in1k", "test_vit.r160_in1k"):
        assert load_frozen(source).features(torch.zeros(1, 3, 160, 160)).shape == (1, 64)
    assert asked == [("test_vit.r160_in1k", True, {"hf_hub_filename": "model.safetensors"})] * 2
    with pytest.raises(ValueError, match="safetensors"):
        load_frozen("timm:gcvit_tiny.in1k")  # published as a .pth only


def test_errors_of_the_libraries_come_through_as_one_line(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", offline)
    for source in ("timm:test_vit", "hf:someone/something"):
        with pytest.raises(ValueError, match=f"^{source}: cannot load it: We couldn't connect to the hub$"):
            load_frozen(source)


def test_everything_else_is_refused_with_what_is_accepted(tmp_path, make_run):
    accepted = "timm:NAME or a timm model name, hf:NAME"
    for source in ("", "nothing", "timm:", "hf:", "some/where/else", "torchvision:resnet18", str(tmp_path)):
        with pytest.raises(ValueError, match=accepted):
            load_frozen(source)
    with pytest.raises(ValueError, match="has no model 'nonsense'"):
        load_frozen("timm:nonsense")
    for text, message in (("{", "not JSON"), ("[]", "neither model_type nor architecture"), ("{}", accepted)):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_frozen(str(tmp_path))


def test_pickled_weights_are_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    torch.save({"x": Bomb()}, tmp_path / "pytorch_model.bin")
    for config in ({"architecture": "test_vit", "pretrained_cfg": {}}, {"model_type": "vit"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="no pickled weights"):
            load_frozen(str(tmp_path))


def test_code_in_a_folder_is_never_run(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="cannot load it"):
        load_frozen(str(tmp_path))


def test_normalisation_of_a_huggingface_model_is_its_own_processor(tmp_path):
    """Our resize-free path and its processor feed the model the same numbers."""
    huggingface_folder(tmp_path, tiny_vit())
    frozen = load_frozen(str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
    assert np.allclose((pixels / 255 - frozen.mean) / frozen.std, theirs, atol=1e-5)
