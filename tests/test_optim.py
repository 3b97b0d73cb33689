"""Schedule and learning rate against closed forms; AdamW against the paper's update by hand."""

import math

import pytest
import torch

from selfsup.config import validate
from selfsup.optim import OptimConfig, build_optimizer
from selfsup.schedule import warmup_cosine


def test_schedule_closed_form():
    rates = [warmup_cosine(step, 100, 2.0, 0.1, 0.5) for step in range(100)]
    assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(0.5 + 1.5 / 2)
    assert rates[99] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * 89 / 90)) / 2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_schedule_edges():
    assert warmup_cosine(0, 1, 1.0, 0.0, 0.0) == 1.0
    assert warmup_cosine(4, 5, 1.0, 1.0, 0.0) == 1.0  # all warm-up
    assert warmup_cosine(5, 5, 1.0, 0.0, 0.25) == pytest.approx(0.25)


def test_learning_rate_scales_with_the_global_batch():
    assert OptimConfig(base_lr=1.5e-4, batch_size=4096).peak_lr == pytest.approx(2.4e-3)
    with pytest.raises(ValueError, match="min_lr: expected at most the peak"):
        validate(OptimConfig, {"min_lr": 1.0})


def test_adamw_step_by_hand():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone().double(), layer.bias.detach().clone().double()
    config = OptimConfig(base_lr=0.256, batch_size=100, weight_decay=0.3, betas=(0.8, 0.9))
    optimizer = build_optimizer(config, layer)
    lr, moments = config.peak_lr, {}
    for t in (1, 2, 3):
        layer.zero_grad()
        layer(torch.randn(5, 3)).square().sum().backward()
        for name, value, decay in (("weight", weight, 0.3), ("bias", bias, 0.0)):
            g = getattr(layer, name).grad.double()
            m, v = moments.get(name, (0.0, 0.0))
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            moments[name] = (m, v)
            value.mul_(1 - lr * decay)
            value.sub_(lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8))
        optimizer.step()
    assert torch.allclose(layer.weight.double(), weight, rtol=1e-5) and torch.allclose(
        layer.bias.double(), bias, rtol=1e-5
    )
