"""Runs whose encoder is a backbone of timm's: exported, refused by name, and rebuilt where timm lacks the stem."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from running import save_untrained
from selfsup.checkpoint import load_encoder, load_objective
from selfsup.config import merge
from selfsup.export import timm as to_timm
from selfsup.export.facebook import export_mae
from selfsup.export.huggingface import export_hf
from selfsup.export.huggingface_mae import export_hf_mae
from selfsup.export.load import load_frozen
from selfsup.export.timm import export_timm
from selfsup.export.torchvision import RESNETS, export_torchvision

SIMCLR = {"name": "simclr", "hidden_dim": 8, "out_dim": 4}
BYOL = {"name": "byol", "hidden_dim": 8, "out_dim": 4}
CONTENT = {
    "objective": SIMCLR,
    "encoder": {"name": "timm", "model": "test_resnet", "img_size": 32},
    "data": {
        "shards": "somewhere/digits/train", "views": "simclr-32",
        "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4],
    },
    "run": {"dir": "r"},
}  # fmt: skip
CIFAR = {"model": "resnet18", "stem": "cifar"}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_backbone(tmp_path: Path) -> Callable[..., Path]:
    """make_backbone({"model": "resnet18"}, objective=BYOL) -> run folder; no tensor has its initial value."""

    def make(encoder: dict[str, Any] | None = None, name: str = "run", **sections: Any) -> Path:
        whole = CONTENT["encoder"] if "name" not in (encoder or {}) else {}
        content = {**CONTENT, **sections, "encoder": {**whole, **(encoder or {})}}
        return save_untrained(tmp_path / name, content, 0.05, {"git_revision": "abc123"}, 7)

    return make


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory) -> dict[str, Path]:
    """Runs of a ResNet-18 by stem; export them to folders of their own."""
    folder = tmp_path_factory.mktemp("resnet18")
    contents = {stem: merge(CONTENT, {"encoder": {**CIFAR, "stem": stem}}) for stem in ("cifar", "default")}
    return {stem: save_untrained(folder / stem, content, 0.05, {}, 7) for stem, content in contents.items()}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


GREY = {"data": {**CONTENT["data"], "mean": [0.4], "std": [0.2]}}


@pytest.mark.parametrize(
    ("encoder", "sections"),
    [({}, {}), ({"in_chans": 1}, GREY), ({"model": "test_vit"}, {})],
    ids=["resnet", "grey", "vit"],
)
def test_loads_in_timm_and_transformers(make_backbone, run_card, encoder, sections):
    run = make_backbone(encoder, **sections)
    ours, recipe, *_ = load_encoder(run)
    report = export_timm(run)
    assert {p.name for p in report.folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    *outputs, transform = report.checks
    assert [(c.library.split()[0], c.dtype) for c in outputs] == [
        (library, dtype) for dtype in ("float32", "float64") for library in ("timm", "transformers")
    ]
    images = IMAGES[:, : recipe.encoder.in_chans]
    theirs = timm.create_model(f"local-dir:{report.folder}", pretrained=True).eval()
    assert close(theirs(images), ours(images)) and not close(theirs(images), ours(images + 1))
    for name, value in ours.model.state_dict().items():
        found = load_file(report.folder / "model.safetensors")[name]
        assert torch.equal(found, value) and found.dtype == value.dtype, name
    in_timm, in_transformers = run_card(report.folder, images)
    assert close(in_timm["features"], ours(images)) and close(in_transformers["features"], ours(images))
    frozen = load_frozen(str(report.folder))
    assert close(frozen.features(images), ours(images))
    assert close(frozen.tokens(images), load_frozen(str(run)).tokens(images))
    assert (frozen.mean, frozen.std, frozen.img_size) == (recipe.data.mean, recipe.data.std, 32)


def test_the_cifar_stem_is_built_as_the_card_says(resnet18, tmp_path, run_card):
    ours, *_ = load_encoder(resnet18["cifar"])
    report = export_timm(resnet18["cifar"], tmp_path / "out")
    (note,) = report.notes
    assert "not checked in transformers: it builds timm's own stem" in note
    (card,) = run_card(report.folder, IMAGES)
    assert close(card["features"], ours(IMAGES)) and card["model"].conv1.stride == (1, 1)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = (pixels / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    assert np.allclose(card["transform"](Image.fromarray(pixels)).movedim(0, -1), expected, atol=1e-5)
    twin = torchvision.models.resnet18().eval()
    twin.conv1, twin.maxpool, twin.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    twin.load_state_dict(load_file(report.folder / "model.safetensors"))
    assert close(twin(IMAGES), ours(IMAGES))
    frozen = load_frozen(str(report.folder))
    assert close(frozen.features(IMAGES), ours(IMAGES)) and frozen.tokens(IMAGES).shape == (3, 16, 512)


def test_neither_library_takes_the_cifar_stem_for_its_own(resnet18, tmp_path):
    """What loads without these three lines must not load at all: features would be wrong in silence."""
    folder = export_timm(resnet18["cifar"], tmp_path / "out").folder
    with pytest.raises(RuntimeError, match="size mismatch for conv1"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        load_frozen(str(folder))


def other_eps(encoder):
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-3


def pooled_stem(encoder):
    encoder.model.maxpool = nn.MaxPool2d(3, 1, 1)


def other_pooling(encoder):
    encoder.model.reset_classifier(0, "max")


def training_mode(encoder):
    encoder.model.bn1.train()


@pytest.mark.parametrize(
    ("stem", "bug"),
    [
        ("cifar", pooled_stem),
        ("cifar", other_pooling),
        ("cifar", training_mode),
        ("default", other_eps),
        ("default", training_mode),
    ],
)
def test_another_model_is_caught(resnet18, tmp_path, monkeypatch, stem, bug):
    export = {"cifar": export_timm, "default": export_torchvision}[stem]
    encoder, *rest = load_encoder(resnet18[stem])
    bug(encoder)
    monkeypatch.setattr(f"{export.__module__}.load_encoder", lambda *_: (encoder, *rest))
    with pytest.raises(ValueError, match="largest difference.*NOT exported"):
        export(resnet18[stem], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_statistics_that_were_not_written_are_caught(make_backbone, monkeypatch):
    weights_of = to_timm.float_weights

    def fresh(module):
        return {k: v.fill_(1.0) if k.endswith("running_var") else v for k, v in weights_of(module).items()}

    run = make_backbone()
    encoder, *rest = load_encoder(run)
    copies = {id(encoder.model): load_encoder(run)[0].model}
    monkeypatch.setattr(to_timm, "load_encoder", lambda *_: (encoder, *rest))
    monkeypatch.setattr(to_timm, "float_weights", lambda module: fresh(copies[id(module)]))
    with pytest.raises(ValueError, match="largest difference"):
        export_timm(run)


@pytest.mark.parametrize(
    ("encoder", "fault"),
    [
        ({}, {"architecture": "test_resnet2"}),
        ({}, {"architecture": "test_efficientnet"}),
        (CIFAR, {"selfsup_stem": "default"}),
        (CIFAR, {"architecture": "resnet34"}),
        ({}, {"selfsup_stem": "cifar"}),
        ({}, {"num_classes": 3}),
        ({"model": "test_vit"}, {"model_args": {"img_size": 64}}),
    ],
)
def test_fault_in_the_config_is_caught(resnet18, make_backbone, tmp_path, monkeypatch, encoder, fault):
    config_of = to_timm.timm_config
    run = resnet18["cifar"] if encoder == CIFAR else make_backbone(encoder)
    monkeypatch.setattr(to_timm, "timm_config", lambda *arguments: {**config_of(*arguments), **fault})
    with pytest.raises(ValueError, match="NOT exported"):
        export_timm(run, tmp_path / "exports" / "out")
    assert list((tmp_path / "exports").iterdir()) == []


def test_cards_say_which_architecture_it_is(resnet18, make_backbone, tmp_path):
    plain = (export_timm(make_backbone()).folder / "README.md").read_text()
    cifar = (export_timm(resnet18["cifar"], tmp_path / "out").folder / "README.md").read_text()
    for text, model, width in ((plain, "test_resnet", 96), (cifar, "resnet18", 512)):
        header, body = text.split("---\n", 2)[1:]
        assert model in yaml.safe_load(header)["tags"] and f"timm's {model}" in body
        assert f"Feature: {width} numbers, as timm pools" in body and "ision transformer" not in body
        assert "Weights:" not in body and "simclr" in body and "7 optimizer steps" in body
    assert "3x3 convolution of stride 1" in cifar and "3x3 convolution" not in plain
    assert "# resnet18 for small images, simclr" in cifar and "# test_resnet, simclr" in plain


@pytest.mark.parametrize("model", RESNETS)
def test_torchvision_gives_its_resnets_the_same_names(model):
    with torch.device("meta"):
        ours, theirs = timm.create_model(model, num_classes=0), getattr(torchvision.models, model)()
    theirs.fc = nn.Identity()
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_torchvision_has_the_same_resnet(resnet18, tmp_path, run_card):
    encoder, *_ = load_encoder(resnet18["default"])
    report = export_torchvision(resnet18["default"], tmp_path / "out")
    assert json.loads((report.folder / "config.json").read_text()) == {"model": "resnet18"}
    assert [c.dtype for c in report.checks] == ["float32", "float64"]
    twin = torchvision.models.resnet18().eval()
    twin.fc = nn.Identity()
    twin.load_state_dict(load_file(report.folder / "model.safetensors"), strict=True)
    assert close(twin(IMAGES), encoder(IMAGES))
    (card,) = run_card(report.folder, IMAGES)
    assert close(card["features"], encoder(IMAGES))


@pytest.mark.parametrize(
    ("export", "to", "encoder", "reason"),
    [
        (
            export_hf,
            "hf",
            {},
            r"encoder.name is timm \(test_resnet\), expected vit; NOT exported, use --to timm",
        ),
        (export_hf_mae, "hf-mae", {}, "expected objective.name mae, got simclr; NOT .* with --to timm$"),
        (export_mae, "mae", {}, "expected objective.name mae, got simclr; NOT .* with --to timm$"),
        (export_torchvision, "torchvision", {}, "encoder.model is test_resnet.*resnet18.*try --to timm"),
        (export_torchvision, "torchvision", CIFAR, "encoder.stem is cifar.*try --to timm"),
        (
            export_torchvision,
            "torchvision",
            {"model": "resnet18", "in_chans": 1},
            "encoder.in_chans is 1.*try --to timm",
        ),
    ],
    ids=["hf", "hf-mae", "mae", "torchvision", "stem", "grey"],
)
def test_what_a_target_cannot_express_is_refused(resnet18, make_backbone, export, to, encoder, reason):
    grey = GREY if encoder.get("in_chans") == 1 else {}
    run = resnet18["cifar"] if encoder == CIFAR else make_backbone(encoder, **grey)
    with pytest.raises(ValueError, match=f"^--to {to}: {reason}"):
        export(run)
    assert not (run / "export").exists()


def test_a_vit_trained_otherwise_is_exported_as_ever(make_backbone):
    vit = {
        "name": "vit",
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 2,
        "frozen_patch_embed": True,
    }
    run = make_backbone({**vit, "img_size": 32})
    for export in (export_timm, export_hf, export_torchvision):
        assert export(run).checks
    with pytest.raises(ValueError, match="expected objective.name mae, got simclr; .*--to timm or --to hf"):
        export_mae(run)


def test_the_target_network_is_asked_for_by_name(make_backbone):
    run = make_backbone(objective=BYOL, data={**CONTENT["data"], "views": "byol"})
    objective, *_ = load_objective(run)
    online, target = load_encoder(run)[0], load_encoder(run, "target")[0]
    for encoder, part in ((online, objective.encoder), (target, objective.target_encoder)):
        expected = part.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in encoder.state_dict().items())
        assert not encoder.training and any("running_var" in name for name in expected)
    assert not torch.equal(online(IMAGES), target(IMAGES))
    plain, averaged = export_timm(run), export_timm(run, weights="target")
    assert averaged.folder.name == "timm-step-7-target" and plain.folder.name == "timm-step-7"
    cards = [(report.folder / "README.md").read_text() for report in (plain, averaged)]
    assert ["Weights: the target network's, which byol averages" in card for card in cards] == [False, True]
    exported = timm.create_model(f"local-dir:{averaged.folder}", pretrained=True).eval()
    assert close(exported(IMAGES), target(IMAGES)) and not close(exported(IMAGES), online(IMAGES))


def test_a_target_network_that_is_not_there(make_backbone):
    run = make_backbone()
    with pytest.raises(ValueError, match="holds no target network, its objective simclr .*use `trained`"):
        load_encoder(run, "target")
    with pytest.raises(ValueError, match="weights: a target network is an encoder, not a whole objective"):
        load_objective(run, "target")
    with pytest.raises(ValueError, match="--weights target: .* is no run of selfsup"):
        load_frozen("timm:resnet18", "target")
    with pytest.raises(ValueError, match="keeps no averaged weights"):
        load_encoder(run, "ema")
