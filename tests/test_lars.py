"""LARS against its formula, value by value in Python's floats, and against timm's where the two agree."""

import json
import math

import pytest
import timm.optim
import torch
from safetensors.torch import load, save

from running import state_of
from selfsup import lars
from selfsup.checkpoint import optimizer_from_names, optimizer_to_names, restore
from selfsup.config import validate
from selfsup.lars import Lars
from selfsup.optim import LarsConfig, build_optimizer
from selfsup.recipe import Recipe
from selfsup.saving import save_checkpoint

CONFIG = LarsConfig(base_lr=0.8, weight_decay=0.02, momentum=0.7, trust_coefficient=0.05)
RATES = [0.8, 0.5, 0.9, 0.1]
"""A rate a step: unequal, so that its place inside or outside the momentum shows."""
RECIPE = {
    "objective": {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "encoder": {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "data": {"shards": "d"},
    "optim": {"name": "lars"},
    "run": {"dir": "r"},
}


def model(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Weights of two and four dimensions, biases, a norm."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), torch.nn.LayerNorm(12), torch.nn.Linear(12, 4)]
    made = torch.nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64))
    return made


def give_gradients(module: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def steps(module: torch.nn.Module, optimizer: torch.optim.Optimizer, rates: list[float]) -> torch.nn.Module:
    for step, rate in enumerate(rates):
        give_gradients(module, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return module


def by_hand(config: LarsConfig, rates: list[float]) -> dict[str, list[float]]:
    """The published update on lists of numbers: SimCLR's, BYOL's and MoCo-v3's g + decay * w inside the norm."""
    module, weights, velocities = model(), {}, {}
    for name, p in module.named_parameters():
        weights[name], velocities[name] = p.flatten().tolist(), [0.0] * p.numel()
    for step, rate in enumerate(rates):
        give_gradients(module, step)
        for name, p in module.named_parameters():
            w, g, share = weights[name], p.grad.flatten().tolist(), 1.0
            if p.ndim > 1:
                g = [b + config.weight_decay * a for a, b in zip(w, g)]
                length, slope = math.sqrt(sum(a * a for a in w)), math.sqrt(sum(b * b for b in g))
                if length > 0 and slope > 0:
                    share = config.trust_coefficient * length / slope
            v = [config.momentum * c + share * b for b, c in zip(g, velocities[name])]
            weights[name], velocities[name] = [a - rate * c for a, c in zip(w, v)], v
    return weights


def error(module: torch.nn.Module, expected: dict[str, list[float]]) -> float:
    """The largest difference over the largest value of its tensor."""
    exact = {name: torch.tensor(values, dtype=torch.float64) for name, values in expected.items()}
    pairs = [(p.double().flatten(), exact[name]) for name, p in module.named_parameters()]
    return max(((ours - right).abs().max() / right.abs().max()).item() for ours, right in pairs)


@pytest.mark.parametrize("decay", [0.02, 0.0])
def test_several_steps_by_hand(decay):
    config = CONFIG.model_copy(update={"weight_decay": decay})
    expected = by_hand(config, RATES)
    for dtype, allowed in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        module = model(dtype)
        assert error(steps(module, build_optimizer(config, module), RATES), expected) < allowed


class DecayedBiases(Lars):
    def _update(self, weights, group):
        if not group["adapt"]:
            for w in weights:
                w.grad = w.grad + CONFIG.weight_decay * w
        super()._update(weights, group)


class AdaptedBiases(Lars):
    def _update(self, weights, group):
        super()._update(weights, {**group, "adapt": True})


class RateInTheMomentum(Lars):
    """SimCLR's TensorFlow code."""

    def _update(self, weights, group):
        for w in weights:
            if "momentum_buffer" in self.state[w]:
                self.state[w]["momentum_buffer"] *= self.last / group["lr"]
        super()._update(weights, group)
        if not group["adapt"]:
            self.last = group["lr"]


def ratio_without_decay(weights, updates, trust_coefficient, split=False):
    return trust_ratios(weights, [w.grad for w in weights], trust_coefficient)


def sum_of_norms(weights, updates, trust_coefficient, split=False):
    """lightly's and timm's |g| + decay * |w|."""
    return [trust_coefficient * w.norm() / (w.grad.norm() + CONFIG.weight_decay * w.norm()) for w in weights]


def skipped_at_no_decay(weights, updates, trust_coefficient, split=False):
    """lightly's, and timm's unless always_adapt."""
    same = all(torch.equal(w.grad, u) for w, u in zip(weights, updates))
    return [torch.ones(())] * len(weights) if same else trust_ratios(weights, updates, trust_coefficient)


trust_ratios = lars.trust_ratios
BUGS = [
    ("Lars", DecayedBiases, 0.02),
    ("Lars", AdaptedBiases, 0.02),
    ("Lars", RateInTheMomentum, 0.02),
    ("ratios", ratio_without_decay, 0.02),
    ("ratios", sum_of_norms, 0.02),
    ("ratios", skipped_at_no_decay, 0.0),
]


@pytest.mark.parametrize("where,bug,decay", BUGS, ids=[bug.__name__ for _, bug, _ in BUGS])
def test_planted_bugs_are_caught(where, bug, decay, monkeypatch):
    config = CONFIG.model_copy(update={"weight_decay": decay})
    if where == "Lars":
        monkeypatch.setattr("selfsup.optim.Lars", bug)
    else:
        monkeypatch.setattr(lars, "trust_ratios", bug)
    module = model()
    assert error(steps(module, build_optimizer(config, module), RATES), by_hand(config, RATES)) > 1e-4


def test_without_decay_it_is_that_of_timm():
    """Which there must be asked to adapt then; without that its first step is of another order."""

    def run(make) -> tuple[torch.nn.Module, torch.nn.Module]:
        module = model()
        before = model()
        weights = [p for p in module.parameters() if p.ndim > 1]
        return steps(module, make(weights), RATES[:1] * 3), before

    ours, _ = run(lambda w: Lars(w, 1.0, trust_coefficient=0.001))
    settings = {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "trust_coeff": 0.001, "eps": 0.0}
    theirs, _ = run(lambda w: timm.optim.Lars(w, **settings, always_adapt=True))
    trapped, before = run(lambda w: timm.optim.Lars(w, **settings))
    for a, b, c, start in zip(*(m.parameters() for m in (ours, theirs, trapped, before))):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
        if a.ndim > 1:
            assert (c - start).norm() > 100 * (a - start).norm() > 0


@pytest.mark.parametrize("decay", [0.0, 1e-6])
def test_a_first_step_is_a_share_of_the_weight(decay):
    w = torch.nn.Parameter(torch.randn(30, 20, dtype=torch.float64))
    before, w.grad = w.detach().clone(), 1e4 * torch.randn_like(w)
    Lars([w], 6.4, weight_decay=decay).step()
    assert (w - before).norm().item() == pytest.approx(6.4 * 0.001 * before.norm().item(), rel=1e-12)


def test_nothing_is_divided_by_zero():
    zero_weight, zero_gradient = (torch.nn.Parameter(torch.full((2, 2), v)) for v in (0.0, 3.0))
    no_gradient = torch.nn.Parameter(torch.ones(2, 2))
    zero_weight.grad, zero_gradient.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer = Lars([zero_weight, zero_gradient, no_gradient], 0.5)
    optimizer.step()
    assert torch.equal(zero_weight, torch.full((2, 2), -0.5))  # ratio 1: it gets away from 0
    assert torch.equal(zero_gradient, torch.full((2, 2), 3.0))
    assert torch.equal(no_gradient, torch.ones(2, 2)) and no_gradient not in optimizer.state


def test_gradients_are_left_as_they_are_and_a_closure_is_called():
    module = model()
    optimizer = build_optimizer(CONFIG, module)
    give_gradients(module, 0)
    before = [p.grad.clone() for p in module.parameters()]
    assert optimizer.step(lambda: torch.ones((), requires_grad=True) * 2).requires_grad
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), before))


def test_norms_of_half_precision_are_float32():
    w = torch.nn.Parameter(
        torch.full((300, 300), 300.0, dtype=torch.float16)
    )  # its norm is 90,000: not a float16
    w.grad = torch.full_like(w, 2.0)
    Lars([w], 1.0, trust_coefficient=0.01).step()
    assert torch.equal(w, torch.full_like(w, 297.0))


def through_a_file(optimizer: torch.optim.Optimizer) -> tuple[dict, list]:
    tensors, groups = optimizer_to_names(optimizer)
    return load(save(tensors)), json.loads(json.dumps(groups))


def test_a_resumed_run_is_bitwise_the_same():
    whole, first = model(torch.float32), model(torch.float32)
    steps(whole, build_optimizer(CONFIG, whole), [0.5] * 4)
    halfway = build_optimizer(CONFIG, first)
    steps(first, halfway, [0.5] * 2)
    names = {name for name, _ in first.named_parameters()}
    assert set(optimizer_to_names(halfway)[0]) == {f"momentum_buffer:{name}" for name in names}

    def resumed(with_state: bool) -> list[torch.Tensor]:
        second = model(torch.float32)
        second.load_state_dict(first.state_dict())
        optimizer = build_optimizer(CONFIG, second)
        if with_state:
            optimizer_from_names(optimizer, *through_a_file(halfway))
        for step in (2, 3):
            give_gradients(second, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.5
            optimizer.step()
        return [*second.parameters()]

    assert all(map(torch.equal, resumed(True), whole.parameters()))
    assert not any(map(torch.equal, resumed(False), whole.parameters()))


def test_a_checkpoint_holds_it(tmp_path):
    recipe = validate(Recipe, RECIPE)
    saved = state_of(recipe, 0)
    restored = restore(save_checkpoint(tmp_path, saved), state_of(recipe, 1, steps=0))
    ours, theirs = optimizer_to_names(saved.optimizer), optimizer_to_names(restored.optimizer)
    assert ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in ours[0]) and ours[0]
    decayed, rest = restored.optimizer.param_groups
    assert (decayed["adapt"], decayed["weight_decay"], rest["adapt"]) == (True, 1e-6, False)
