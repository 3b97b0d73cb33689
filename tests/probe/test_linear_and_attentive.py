"""The frozen supervised probes: LARS and the heads against float64 by hand, nothing learned but the head."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from timm.optim import Lars
from torch import nn

from selfsup.data.order import sample_order
from selfsup.export.load import FrozenEncoder, load_frozen
from selfsup.export.timm import export_timm
from selfsup.probe import attentive, features, fit, linear
from selfsup.probe.attentive import AttentiveHead, AttentiveRecipe, heads_of, probe_attentive
from selfsup.probe.features import encoder_tokens
from selfsup.probe.linear import LinearRecipe, fit_linear, lars, linear_head, probe_linear
from selfsup.probe.sources import Setup, open_labelled

CPU = torch.device("cpu")
LINEAR = LinearRecipe(epochs=4.0, batch_size=100, base_lr=20.0)
ATTENTIVE = AttentiveRecipe(epochs=6.0, batch_size=50, lr=1e-2)
PROBES = {"linear": (probe_linear, LINEAR), "attentive": (probe_attentive, ATTENTIVE)}
both = pytest.mark.parametrize("name", PROBES)


@pytest.fixture
def data(digits):
    return open_labelled(str(digits / "train"), str(digits / "test"))


def run_probe(name, encoder, data, seeds=(0,), setup=None, **changes):
    probe, recipe = PROBES[name]
    setup = setup or Setup(seeds=seeds)
    return probe(encoder, data, CPU, setup, dataclasses.replace(recipe, **changes))


# LARS


def lars_error(build) -> float:
    """The largest relative error of three steps against LARS by hand in float64, MAE's util/lars.py."""
    torch.manual_seed(0)
    recipe = LinearRecipe(batch_size=16384)
    head = nn.Linear(7, 5).double()
    gradients = [[torch.randn_like(p) for p in head.parameters()] for _ in range(3)]
    expected = []
    for i, p in enumerate(head.parameters()):
        value, momentum = p.detach().numpy().copy(), 0.0
        for step in range(3):
            update = gradients[step][i].numpy()
            if value.ndim > 1:
                update = update * (0.001 * np.sqrt((value**2).sum()) / np.sqrt((update**2).sum()))
            momentum = 0.9 * momentum + update
            value = value - 6.4 * momentum
        expected.append(value)
    optimizer = build(head, recipe)
    assert recipe.peak_lr == 6.4
    for step in range(3):
        for p, gradient in zip(head.parameters(), gradients[step]):
            p.grad = gradient.clone()
        optimizer.step()
    pairs = zip(head.parameters(), expected)
    return max(np.abs(p.detach().numpy() - value).max() / np.abs(value).max() for p, value in pairs)


def test_lars_is_maes():
    assert lars_error(lars) < 1e-7  # timm adds 1e-8 to the norm of the gradient


@pytest.mark.parametrize(
    "groups",
    [
        lambda weight, bias: [{"params": [weight, bias], "always_adapt": False}],  # the trap: wd = 0
        lambda weight, bias: [{"params": [weight, bias], "always_adapt": True}],
    ],
    ids=["never-adapts", "adapts-biases"],
)
def test_planted_lars_bugs_are_caught(groups):
    def build(head, recipe):
        parameters = groups(head.weight, head.bias)
        return Lars(parameters, lr=recipe.peak_lr, momentum=0.9, weight_decay=0.0, trust_coeff=0.001)

    assert lars_error(build) > 0.1


# The linear head


def test_linear_head_starts_as_published():
    torch.manual_seed(0)
    norm, layer = linear_head(400, 50)
    assert norm.eps == 1e-6 and norm.affine is False and norm.weight is None
    assert abs(float(layer.weight.detach().std()) - 0.01) < 2e-4 and not layer.bias.any()


def test_linear_probe_separates_what_is_separable_and_normalises_by_running_statistics():
    """Against scikit-learn on clusters apart, and the whole head in float64 from the batches it saw."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    values = (3 + rng.normal(size=(3, 8))[labels] * 30 + rng.normal(size=(600, 8))) * np.logspace(-2, 2, 8)
    values = values.astype(np.float32)
    inputs, targets = torch.from_numpy(values[:500]), torch.from_numpy(labels[:500])
    recipe = LinearRecipe(epochs=10.0, batch_size=50, base_lr=50.0)
    batches = fit.cached_batches(inputs, targets, 3, 50, CPU)
    with fit.own_generators(CPU):
        head, loss = fit_linear(batches, 8, 3, 500, CPU, recipe, 3)
    held_out = torch.from_numpy(values[500:]), torch.from_numpy(labels[500:])
    by_sklearn = LogisticRegression().fit(
        (values[:500] - values[:500].mean(0)) / values[:500].std(0), labels[:500]
    )
    scaled = (values[500:] - values[:500].mean(0)) / values[:500].std(0)
    accuracy = fit.accuracy(head, fit.in_order(*held_out, CPU), bf16=False)
    assert accuracy == by_sklearn.score(scaled, labels[500:]) == 1.0 and loss < 0.6
    mean, variance = np.zeros(8), np.ones(8)
    for step in range(100):
        epoch, position = np.divmod(np.arange(50 * step, 50 * step + 50), 500)
        rows = sample_order(3, epoch, position, 500, "shuffled")
        batch = values[rows].astype(np.float64)
        mean = 0.9 * mean + 0.1 * batch.mean(axis=0)
        variance = 0.9 * variance + 0.1 * batch.var(axis=0, ddof=1)
    weight, bias = (p.detach().double().numpy() for p in head[1].parameters())
    expected = (values[500:] - mean) / np.sqrt(variance + 1e-6) @ weight.T + bias
    assert np.allclose(head(held_out[0]).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


# The attentive head


def slow_attentive(head: AttentiveHead, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """V-JEPA's pooler and classifier, one image, head and token at a time."""

    def affine(x, layer):
        return layer.weight @ x + layer.bias

    def norm(x, layer):
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * layer.weight + layer.bias

    width = tokens.shape[2] // heads
    outputs = []
    for image in tokens:
        query = head.query[0, 0]
        q = affine(query, head.q)
        kv = [affine(norm(token, head.norm1), head.kv) for token in image]
        read = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            keys = [each[: tokens.shape[2]][part] for each in kv]
            values = [each[tokens.shape[2] :][part] for each in kv]
            scores = torch.stack([q[part] @ key / width**0.5 for key in keys]).exp()
            read.append(sum(score * value for score, value in zip(scores, values)) / scores.sum())
        query = query + affine(torch.cat(read), head.proj)
        hidden = affine(norm(query, head.norm2), head.mlp.fc1)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        outputs.append(affine(query + affine(hidden, head.mlp.fc2), head.classifier))
    return torch.stack(outputs)


def test_attentive_head_is_the_slow_loop():
    torch.manual_seed(0)
    head = AttentiveHead(12, 3, 2.0, 5).double()
    with torch.no_grad():
        for p in head.parameters():
            p += 0.3 * torch.randn_like(p)
    tokens = torch.randn(4, 7, 12, dtype=torch.float64)
    assert torch.allclose(head(tokens), slow_attentive(head, tokens, 3), atol=1e-12)
    shuffled = tokens[:, torch.randperm(7)]  # it reads a set
    assert torch.allclose(head(tokens), head(shuffled), atol=1e-12)
    assert not torch.allclose(head(tokens), slow_attentive(head, tokens, 2), atol=1e-3)


def test_attentive_head_starts_as_published():
    torch.manual_seed(0)
    head = AttentiveHead(256, 4, 4.0, 10)
    for layer, std in ((head.q, 0.02), (head.kv, 0.02), (head.proj, 0.02 / 2**0.5), (head.mlp.fc1, 0.02)):
        assert abs(float(layer.weight.detach().std()) / std - 1) < 0.02 and not layer.bias.any()
    assert abs(float(head.mlp.fc2.weight.detach().std()) / (0.02 / 2**0.5) - 1) < 0.02
    bound = 256**-0.5  # torch's own start of a linear layer: uniform, weights and biases
    for start in (head.classifier.weight.detach(), head.classifier.bias.detach()):
        assert start.any() and float(start.abs().max()) <= bound
    assert abs(float(head.classifier.weight.detach().std()) / (bound / 3**0.5) - 1) < 0.05
    assert [heads_of(dim, None) for dim in (24, 192, 768)] == [1, 3, 12] and heads_of(24, 6) == 6
    with pytest.raises(ValueError, match="--num-heads: expected a divisor of the tokens' width 24, got 5"):
        heads_of(24, 5)


# The whole probes


def with_batch_norm() -> FrozenEncoder:
    """A small convolutional encoder with running statistics."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 6, 4, 4), nn.BatchNorm2d(6)).eval().requires_grad_(False)
    return FrozenEncoder(
        "conv", module, 8, 1, (0.3,), (0.4,), "conv",
        pooled=lambda images: module(images).mean(dim=(2, 3)),
        patches=lambda images: module(images).flatten(2).transpose(1, 2),
    )  # fmt: skip


def unchanged(encoder: FrozenEncoder, name: str, data, mode: str) -> bool:
    before = {key: value.clone() for key, value in encoder.module.state_dict().items()}
    run_probe(name, encoder, data, mode=mode, epochs=1.0)
    return all(torch.equal(before[key], value) for key, value in encoder.module.state_dict().items())


@both
@pytest.mark.parametrize("mode", ["fast", "paper"])
def test_frozen_means_frozen(name, mode, data, make_run):
    encoder = load_frozen(str(make_run()))
    assert unchanged(encoder, name, data, mode) and unchanged(with_batch_norm(), name, data, mode)
    assert not encoder.module.training and not any(p.requires_grad for p in encoder.module.parameters())


@both
def test_an_encoder_left_in_train_mode_is_caught(name, data):
    encoder = with_batch_norm()
    encoder.module.train()
    assert not unchanged(encoder, name, data, "fast")


@both
@pytest.mark.parametrize("mode", ["fast", "paper"])
def test_same_seed_same_result(name, mode, data, make_run):
    encoder = load_frozen(str(make_run()))
    torch.manual_seed(7)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    zero, one = run_probe(name, encoder, data, (0, 1), mode=mode, epochs=1.0)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    torch.manual_seed(8)
    assert run_probe(name, encoder, data, (1,), mode=mode, epochs=1.0) == [one]  # whatever ran before
    assert zero.details["loss"] != one.details["loss"]


@both
def test_augmentation_is_what_the_modes_differ_in(name, data, make_run, monkeypatch):
    """With crops of the whole image and no flips, what differs is gone but for rounding."""
    encoder = load_frozen(str(make_run()))
    fast, augmented = (
        run_probe(name, encoder, data, mode=mode)[0].details["loss"] for mode in ("fast", "paper")
    )
    assert abs(fast - augmented) > 1e-3
    original = fit.ImageData
    monkeypatch.setattr(
        fit, "ImageData", lambda **options: original(**options, hflip=0.0, crop_ratio=(1.0, 1.0))
    )
    whole = run_probe(name, encoder, data, mode="paper", crop_scale=(1.0, 1.0))[0].details["loss"]
    assert abs(fast - whole) < 1e-4


@both
def test_labels_without_meaning_give_chance(name, data, make_run):
    encoder = load_frozen(str(make_run()))
    shuffled = np.random.default_rng(0).permutation(data.train.label)
    leak_free = data._replace(train=dataclasses.replace(data.train, label=shuffled))
    long = {"epochs": 40.0} if name == "linear" else {"epochs": 15.0, "batch_size": 20}
    learned, chance = (
        run_probe(name, encoder, each, **long)[0].accuracies[name] for each in (data, leak_free)
    )
    assert learned > 0.35 and chance < 0.25  # of 100 test images: 0.1 and four standard deviations


@both
def test_refusals(name, data, make_run, monkeypatch):
    encoder = load_frozen(str(make_run()))
    with pytest.raises(ValueError, match="--batch-size: expected at most the 400 training images, got 500"):
        run_probe(name, encoder, data, batch_size=500)
    module = linear if name == "linear" else attentive
    monkeypatch.setattr(module, "warmup_cosine", lambda *a: float("inf"))
    with pytest.raises(ValueError, match=f"{name}, seed 0: the loss is not finite"):
        run_probe(name, encoder, data)


def test_tokens_that_do_not_fit_are_refused_with_the_way_out(data, make_run, monkeypatch):
    encoder = load_frozen(str(make_run()))
    assert encoder_tokens(encoder, data.test, bf16=True).dtype == torch.bfloat16
    tokens = encoder_tokens(encoder, data.test, batch_size=33)
    assert tokens.shape == (100, 16, 24) and tokens.dtype == torch.float32
    pooled = torch.from_numpy(
        features.encoder_features(load_frozen(str(make_run({"encoder": {"pool": "mean"}}))), data.test).values
    )
    assert torch.allclose(tokens.mean(dim=1), pooled, atol=1e-5)
    monkeypatch.setattr(features, "TOKEN_LIMIT", tokens.nbytes - 1)
    with pytest.raises(ValueError, match="--bf16 halves them, --mode paper keeps none"):
        run_probe("attentive", encoder, data)
    assert run_probe("attentive", encoder, data, mode="paper", epochs=0.5)
    encoder.module.norm.bias[0] = float("nan")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="NaN or infinite"):
        run_probe("attentive", encoder, data)


def test_an_export_probes_like_its_run(data, make_run):
    run = make_run()
    results = [
        run_probe("attentive", load_frozen(str(source)), data)[0] for source in (run, export_timm(run).folder)
    ]
    assert abs(results[0].details["loss"] - results[1].details["loss"]) < 1e-3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LinearRecipe(epochs=0.0), "--epochs: expected > 0"),
        (lambda: LinearRecipe(batch_size=1), "for batch norm"),
        (lambda: AttentiveRecipe(lr=-1.0), "--lr: expected > 0, got -1.0"),
        (lambda: Setup(seeds=()), "--seeds: expected one or more different seeds, got none"),
        (lambda: Setup(seeds=(1, 1)), "--seeds: .*got 1 1"),
        (lambda: Setup(seeds=(-1,)), "--seeds: expected 0 <= seed"),
        (lambda: Setup(threads=0), "--threads: expected >= 1, got 0"),
    ],
)
def test_settings_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()
