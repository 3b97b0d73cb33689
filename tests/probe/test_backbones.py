"""Every probe on runs whose encoder is a backbone of timm's, and on a target network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from einops import rearrange

from running import save_untrained
from selfsup import cli
from selfsup.batch import normalise
from selfsup.checkpoint import load_encoder
from selfsup.config import merge
from selfsup.data.images import eval_batches
from selfsup.data.index import open_shards
from selfsup.export.load import load_frozen
from selfsup.probe.features import encoder_features, encoder_tokens, random_encoder
from selfsup.probe.finetune import FinetuneRecipe, build_classifier, build_optimizer, check_architecture
from selfsup.probe.online import OnlineMonitor

CPU = torch.device("cpu")


@pytest.fixture
def make_backbone(tmp_path: Path, digits: Path) -> Callable[..., Path]:
    """make_backbone({"encoder": {...}}, name="run") -> run folder of a small timm model on digits."""

    def make(changes: dict[str, Any] | None = None, name: str = "run") -> Path:
        content = {
            "objective": {"name": "simclr", "hidden_dim": 8, "out_dim": 4},
            "encoder": {"name": "timm", "model": "test_resnet", "img_size": 32, "in_chans": 1},
            "data": {"shards": str(digits / "train"), "views": "simclr-32", "mean": [0.3], "std": [0.4]},
            "run": {"dir": "r"},
        }
        return save_untrained(tmp_path / name, merge(content, changes or {}), 0.02, {}, 7)

    return make


def selfsup(monkeypatch, line: str) -> int:
    monkeypatch.setattr("sys.argv", ["selfsup", *line.split(), "--device", "cpu"])
    return cli.main()


@pytest.mark.parametrize(
    ("model", "prefix"), [("test_resnet", None), ("test_vit", 1)], ids=["a map", "tokens"]
)
def test_features_and_tokens_are_the_encoder_s_own(make_backbone, digits, model, prefix):
    run, index = make_backbone({"encoder": {"model": model}}), open_shards(str(digits / "test"))
    encoder, recipe, *_ = load_encoder(run)
    theirs = timm.create_model(
        model, num_classes=0, in_chans=1, **({"img_size": 32} if prefix else {})
    ).eval()
    theirs.load_state_dict(encoder.model.state_dict(), strict=True)
    (images, _, rows) = next(iter(eval_batches(index, 32, 1, 100, 0)))
    assert rows.tolist() == list(range(100))
    with torch.no_grad():
        inputs = normalise(images, (0.3,), (0.4,))
        features, tokens = theirs(inputs), theirs.forward_features(inputs)
    tokens = rearrange(tokens, "b d h w -> b (h w) d") if prefix is None else tokens[:, prefix:]
    frozen = load_frozen(str(run))
    assert np.allclose(encoder_features(frozen, index).values, features, atol=1e-5)
    assert torch.allclose(encoder_tokens(frozen, index), tokens, atol=1e-5)
    assert not any(p.requires_grad for p in frozen.module.parameters()) and not frozen.module.training
    assert frozen.describe.startswith(f"timm {model}, ") and "with the CIFAR stem" not in frozen.describe


def test_a_random_start_is_the_run_s_own(make_backbone):
    _, recipe, *_ = load_encoder(make_backbone({"seed": 3}))
    torch.manual_seed(3)
    expected = recipe.objective.build(recipe.encoder).encoder.model.state_dict()
    found = random_encoder(recipe, 3).module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


COMMANDS = {
    "linear": "probe linear {} --epochs 1 --batch-size 100",
    "attentive": "probe attentive {} --epochs 1 --batch-size 100",
    "fewshot": "probe fewshot {} --per-class 1 3 --seeds 0",
    "representation": "probe representation {} --samples 20 --views 2 --view-samples 10",
    "frozen": "probe {} --baselines random",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, make_backbone, monkeypatch):
    run = make_backbone()
    assert selfsup(monkeypatch, COMMANDS[name].format(run)) == 0
    (path,) = (run / "probe").glob("*.json")
    result = json.loads(path.read_text())
    source = result["source"] if name == "representation" else result["sources"][0]
    assert source["feature"] == "timm test_resnet, pooling 'avg' of timm"
    assert source["recipe"]["encoder"]["model"] == "test_resnet" and source["weights"] == "trained"


def test_the_monitor_leaves_running_statistics_alone(make_backbone, digits):
    encoder, recipe, *_ = load_encoder(make_backbone())
    encoder.train()
    encoder.model.layer1.eval()  # a frozen part
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    values = OnlineMonitor(recipe, open_shards(str(digits / "train")), CPU).measure(encoder)
    assert {"feature_std", "rankme", "knn"} <= values.keys()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert [module.training for module in encoder.modules()] == modes


def test_finetuning_says_why_it_cannot(make_backbone, monkeypatch, capsys):
    run = make_backbone()
    assert selfsup(monkeypatch, f"probe finetune {run}") == 2
    error = capsys.readouterr().err
    assert "expected a vision transformer of selfsup's or timm's, got ResNet" in error
    assert "use selfsup probe linear or attentive" in error


@pytest.mark.parametrize("scratch", [False, True])
def test_a_vision_transformer_of_timm_is_finetuned(make_backbone, scratch):
    frozen = load_frozen(str(make_backbone({"encoder": {"model": "test_vit"}})))
    check_architecture(frozen, scratch)
    recipe = FinetuneRecipe(scratch=scratch, layer_decay=0.5)
    model = build_classifier(frozen, recipe, 10)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    scales = {group["lr_scale"] for group in build_optimizer(model, recipe).param_groups}
    assert scales == {0.5**i for i in range(len(frozen.module.blocks) + 2)}
    same = torch.equal(model.encoder.blocks[0].norm1.weight, frozen.module.blocks[0].norm1.weight)
    assert same != scratch


def test_a_target_network_has_results_of_its_own(make_backbone, monkeypatch, capsys, digits, tmp_path):
    run = make_backbone({"objective": {"name": "byol"}, "data": {"views": "byol"}})
    for weights in ("trained", "target"):
        assert selfsup(monkeypatch, f"probe fewshot {run} --per-class 1 --seeds 0 --weights {weights}") == 0
    title = "pretrained, target network"
    assert title in " ".join(capsys.readouterr().out.split())
    stems = {path.stem for path in (run / "probe").glob("*.json")}
    assert len(stems) == 2 and sum(stem.endswith("-target") for stem in stems) == 1
    out = tmp_path / "features.npz"
    assert selfsup(monkeypatch, f"embed {run} {digits / 'test'} --out {out} --weights target") == 0
    expected = encoder_features(load_frozen(str(run), "target"), open_shards(str(digits / "test")))
    with np.load(out) as file:
        assert np.array_equal(file["features"], expected.values)
        assert json.loads(str(file["about"]))["weights"] == "target"
    trained = encoder_features(load_frozen(str(run)), open_shards(str(digits / "test")))
    assert not np.allclose(trained.values, expected.values, atol=1e-3)


def test_the_target_of_a_run_without_one(make_backbone, monkeypatch, capsys):
    assert selfsup(monkeypatch, f"probe linear {make_backbone()} --weights target") == 2
    assert "holds no target network, its objective simclr keeps no target" in capsys.readouterr().err
