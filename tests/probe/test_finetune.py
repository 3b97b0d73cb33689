"""Fine-tuning: learning rates of every parameter by hand, targets, what moves, what repeats."""

import dataclasses
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy

from selfsup.data.images import train_batches
from selfsup.data.pack import pack_arrays
from selfsup.export.load import FrozenEncoder, load_frozen
from selfsup.export.timm import export_timm
from selfsup.probe import finetune as finetune_module
from selfsup.probe import fit
from selfsup.probe.finetune import (
    Classifier,
    FinetuneRecipe,
    build_classifier,
    build_mixup,
    build_optimizer,
    check_architecture,
    finetune,
    train_classifier,
)
from selfsup.probe.sources import Setup, open_labelled

CPU = torch.device("cpu")
RECIPE = FinetuneRecipe(epochs=1.0, batch_size=50, layer_decay=0.65)
KINDS = pytest.mark.parametrize("kind", ["run", "export"])


@pytest.fixture
def data(digits):
    return open_labelled(str(digits / "train"), str(digits / "test"))


def load(make_run, kind: str) -> FrozenEncoder:
    run = make_run()
    return load_frozen(str(run if kind == "run" else export_timm(run).folder))


# Learning rates


def expected_scale(name: str, decay: float, depth: int) -> float:
    """MAE's util/lr_decay.py: embeddings are layer 0, block i layer i + 1, the rest layer depth + 1."""
    if name.startswith(("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed")):
        layer = 0
    elif name.startswith("encoder.blocks."):
        layer = int(name.split(".")[2]) + 1
    else:
        layer = depth + 1
    return decay ** (depth + 1 - layer)


def rates(model: Classifier, recipe: FinetuneRecipe) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(model, recipe).param_groups
    return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


def wrong_rates(model: Classifier, recipe: FinetuneRecipe) -> list[str]:
    wrong = []
    found = rates(model, recipe)
    for name, p in model.named_parameters():
        if p.requires_grad:
            tokens = name in ("encoder.cls_token", "encoder.pos_embed")
            decay = 0.0 if p.ndim == 1 or tokens else 0.05
            scale = expected_scale(name, recipe.layer_decay, 2)
            if found[name] != (pytest.approx(scale, rel=1e-12), decay):
                wrong.append(name)
        elif name in found:
            wrong.append(name)
    return wrong


@KINDS
@pytest.mark.parametrize("decay", [0.65, 1.0])
def test_learning_rate_and_decay_of_every_parameter(kind, decay, make_run):
    recipe = dataclasses.replace(RECIPE, layer_decay=decay)
    model = build_classifier(load(make_run, kind), recipe, 10)
    assert wrong_rates(model, recipe) == []
    found = rates(model, recipe)
    assert found["encoder.patch_embed.proj.weight"] == (pytest.approx(decay**3), 0.05)
    assert found["encoder.blocks.0.attn.qkv.weight"] == (pytest.approx(decay**2), 0.05)
    assert found["encoder.blocks.1.norm1.bias"] == (pytest.approx(decay), 0.0)
    assert found["fc_norm.weight"] == found["head.bias"] == (1.0, 0.0) and found["head.weight"] == (1.0, 0.05)


@pytest.mark.parametrize(
    "matcher",
    [
        {"stem": r"^encoder\.patch_embed", "blocks": [(r"^encoder\.blocks\.(\d+)", None)]},
        {"stem": r"^encoder", "blocks": [(r"^encoder\.blocks\.(\d+)", None)]},
        {"stem": r"^(?!head)(?!encoder\.blocks)", "blocks": [(r"^encoder\.blocks\.(\d+)", None)]},
    ],
    ids=["tokens-with-the-head", "blocks-as-stem", "norm-as-stem"],
)
def test_planted_grouping_bugs_are_caught(matcher, make_run, monkeypatch):
    monkeypatch.setattr(Classifier, "group_matcher", lambda self, coarse: matcher)
    assert wrong_rates(build_classifier(load(make_run, "run"), RECIPE, 10), RECIPE)


def test_the_loop_applies_the_scales_and_the_schedule(make_run):
    model = build_classifier(load(make_run, "run"), RECIPE, 10)
    optimizer, seen = build_optimizer(model, RECIPE), []
    optimizer.step = lambda: seen.append([group["lr"] for group in optimizer.param_groups])
    batches = iter([(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))] * 3)
    with fit.own_generators(CPU):
        fit.fit(model, optimizer, batches, 3, [0.1, 0.4, 0.2].__getitem__, 0, False, "t")
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert seen == [[lr * scale for scale in scales] for lr in (0.1, 0.4, 0.2)]


# The model


@KINDS
def test_classifier_is_norm_of_the_mean_of_unnormed_patch_tokens(kind, make_run):
    encoder = load(make_run, kind)
    model = build_classifier(encoder, RECIPE, 10).eval()
    with torch.no_grad():
        for p in (*model.fc_norm.parameters(), *model.head.parameters()):
            p.normal_()
    images = torch.randn(3, 1, 8, 8)
    ours = load_frozen(str(make_run())).module
    tokens = ours.intermediates(ours.embed(images))[-1][:, 1:].mean(dim=1)
    normed = F.layer_norm(tokens, (24,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
    assert torch.allclose(model(images), model.head(normed), atol=1e-5)
    drops = [m.drop for name, m in model.named_modules() if "drop_path" in name]
    assert drops == ([0.0, 0.1] if kind == "run" else [0.0, 0.0, 0.1, 0.1])
    assert encoder.module.norm.weight.shape == (24,) and not encoder.module.training  # a copy was taken apart


def test_a_timm_model_that_pools_with_a_norm_of_its_own(tmp_path):
    sizes = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "global_pool": "avg",
    }
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)
    timm.models.save_for_hf(model, tmp_path, model_args=sizes, safe_serialization=True)
    classifier = build_classifier(load_frozen(str(tmp_path)), RECIPE, 10)
    assert not any("encoder.fc_norm" in name for name, _ in classifier.named_parameters())
    assert classifier(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_what_cannot_be_fine_tuned_is_refused(make_run, tmp_path):
    model = timm.create_model("test_resnet", pretrained=False)
    timm.models.save_for_hf(model, tmp_path / "resnet", safe_serialization=True)
    with pytest.raises(ValueError, match="expected a vision transformer .* got ResNet"):
        check_architecture(load_frozen(str(tmp_path / "resnet")), False)
    with pytest.raises(ValueError, match="--scratch: .* has no recipe of ours"):
        check_architecture(load(make_run, "export"), True)


# Targets


def test_mixed_targets_are_distributions_and_the_loss_is_timms():
    labels = torch.arange(10).repeat(2)
    for seed in range(12):
        np.random.seed(seed)
        images, targets = build_mixup(FinetuneRecipe(), 10)(torch.randn(20, 1, 8, 8), labels)
        assert torch.allclose(targets.sum(dim=1), torch.ones(20), atol=1e-6) and targets.min() >= 0.01 - 1e-6
        logits = torch.randn(20, 10)
        assert torch.allclose(F.cross_entropy(logits, targets), SoftTargetCrossEntropy()(logits, targets))
    recipe = FinetuneRecipe(mixup=0.0, cutmix=0.0)
    before = torch.randn(20, 1, 8, 8)
    images, targets = build_mixup(recipe, 10)(before.clone(), labels)
    smooth = F.one_hot(labels, 10) * 0.9 + 0.01
    assert torch.equal(images, before) and torch.allclose(targets, smooth)


def test_labels_stay_with_their_images(data, make_run):
    """The views of the loop against the index, row by row."""
    encoder = load(make_run, "run")
    views = fit.train_views(encoder, data.train, (0.5, 1.0), 3, 40, 20, 0, CPU)
    config = fit.ImageData(shards=str(data.train.folder), crop_scale=(0.5, 1.0), mean=(0.3,), std=(0.4,))
    plan = fit.BatchPlan(40, 20, 0, 1)
    for _, (images, labels), batch in zip(
        range(30), views, train_batches(config, data.train, 3, 8, 1, plan, 0, 0)
    ):
        assert labels.tolist() == [int(data.train.label[row]) for row in batch.index]
        assert torch.allclose(images, (batch.images / 255 - 0.3) / 0.4, atol=1e-6)


# The training


@KINDS
@pytest.mark.parametrize("bf16", [False, True])
def test_everything_learns_but_fixed_positions(kind, bf16, data, make_run):
    encoder = load(make_run, kind)
    untouched = {name: p.clone() for name, p in encoder.module.state_dict().items()}
    with fit.own_generators(CPU):
        fit.seed_generators(0)
        start = build_classifier(encoder, RECIPE, data.classes).state_dict()
        model, _ = train_classifier(encoder, data, CPU, Setup(bf16=bf16), RECIPE, 0)
    same = [name for name, p in model.state_dict().items() if torch.equal(p, start[name])]
    assert same == (["encoder.pos_embed"] if kind == "run" else [])
    assert all(torch.equal(untouched[name], p) for name, p in encoder.module.state_dict().items())


def test_from_scratch_starts_anew_by_the_same_path(data, make_run):
    encoder = load(make_run, "run")
    recipe = dataclasses.replace(RECIPE, scratch=True, layer_decay=1.0)
    torch.manual_seed(5)
    expected = encoder.recipe.encoder.build()
    torch.manual_seed(5)
    model = build_classifier(encoder, recipe, 10)
    for name in ("patch_embed.proj.weight", "blocks.1.mlp.fc2.weight"):
        assert torch.equal(model.encoder.get_parameter(name), expected.get_parameter(name))
    assert finetune(encoder, data, CPU, Setup(), recipe)[0].details["loss"] > 0


def test_same_seed_same_result_whatever_ran_before_and_however_it_is_loaded(data, make_run):
    encoder = load(make_run, "run")
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    zero, one = finetune(encoder, data, CPU, Setup(seeds=(0, 1)), RECIPE)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # Python's own beartype draws from, in tests
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert finetune(encoder, data, CPU, Setup(seeds=(1,)), RECIPE) == [one]
    assert finetune(encoder, data, CPU, Setup(seeds=(1,), workers=1), RECIPE) == [one]
    assert zero.details["loss"] != one.details["loss"]


def test_an_unseeded_step_is_caught(data, make_run, monkeypatch):
    """The mutant: mixing, erasing and drop path from wherever the generators stand."""
    encoder = load(make_run, "run")
    (expected,) = finetune(encoder, data, CPU, Setup(), RECIPE)
    original = fit.seed_generators
    monkeypatch.setattr(fit, "seed_generators", lambda seed, step=None: step is None and original(seed))
    np.random.seed(123)
    assert finetune(encoder, data, CPU, Setup(), RECIPE) != [expected]


def test_labels_with_meaning_are_learned_and_others_give_chance(make_run, tmp_path):
    """Bright or dark noise, which crops and flips leave as it is; then the same with shuffled labels."""
    rng, names = np.random.default_rng(0), ["dark", "bright"]
    labels = rng.integers(0, 2, 300)
    images = (rng.integers(0, 150, (300, 8, 8)) + 100 * labels[:, None, None]).astype(np.uint8)
    pack_arrays(images[:200], labels[:200], names, tmp_path / "train", 150)
    pack_arrays(images[200:], labels[200:], names, tmp_path / "test", 150)
    data = open_labelled(str(tmp_path / "train"), str(tmp_path / "test"))
    shuffled = rng.permutation(data.train.label)
    meaningless = data._replace(train=dataclasses.replace(data.train, label=shuffled))
    recipe = dataclasses.replace(RECIPE, epochs=8.0, batch_size=20, base_lr=2e-2)
    encoder = load(make_run, "run")
    learned, chance = (
        finetune(encoder, each, CPU, Setup(), recipe)[0].accuracies["finetune"]
        for each in (data, meaningless)
    )
    assert learned > 0.95 and 0.3 < chance < 0.7  # of 100 test images: a half and four standard deviations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 51}, "--batch-size: expected an even number"),
        ({"layer_decay": 1.5}, "--layer-decay: expected 0 < x <= 1, got 1.5"),
        ({"drop_path": 1.0}, "--drop-path"),
        ({"erase": 2.0}, "--erase: expected 0 to 1"),
        ({"crop_scale": (0.5, 0.2)}, "--crop-scale: expected 0 < least <= largest <= 1, got 0.5 0.2"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        FinetuneRecipe(**changes)


def test_refusals(data, make_run, monkeypatch):
    encoder = load(make_run, "run")
    with pytest.raises(ValueError, match="--batch-size: expected at most the 400"):
        finetune(encoder, data, CPU, Setup(), dataclasses.replace(RECIPE, batch_size=402))
    monkeypatch.setattr(finetune_module, "warmup_cosine", lambda *a: float("inf"))
    with pytest.raises(ValueError, match="fine-tune, seed 0: the loss is not finite"):
        finetune(encoder, data, CPU, Setup(), RECIPE)
