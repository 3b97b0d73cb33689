"""MoCo-v3's two measures against instability: another initialisation, and a patch projection that stays random."""

import math

import pytest
import torch
from scipy.stats import kstest

from selfsup.encoders.vit import ViTConfig
from selfsup.optim import param_groups

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
BOUND = {"mae": math.sqrt(6 / (4 * 48)), "mocov3": math.sqrt(6 / (2 * 48))}
"""Xavier's sqrt(6 / (fan in + fan out)): of one (3d x d) matrix, of each of three (d x d)."""


def built(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return ViTConfig(**SMALL, **options).build()


def uniform_within(weight: torch.Tensor, bound: float) -> bool:
    return kstest(weight.detach().flatten().numpy(), "uniform", (-bound, 2 * bound)).pvalue > 1e-3


@pytest.mark.parametrize("init", BOUND)
def test_bounds_of_queries_keys_and_values(init):
    other = next(name for name in BOUND if name != init)
    for block in built(init=init).blocks:
        parts = block.attn.qkv.weight.detach().chunk(3)
        assert all(uniform_within(part, BOUND[init]) for part in parts)
        assert all(float(part.abs().max()) <= BOUND[init] for part in parts)
        assert not any(uniform_within(part, BOUND[other]) for part in parts)
        assert len({float(part[0, 0]) for part in parts}) == 3
        assert (block.attn.qkv.bias == 0).all()


def test_the_class_token_starts_near_zero():
    tokens = {init: built(init=init).cls_token.detach().flatten() for init in BOUND}
    assert 0.5e-6 < tokens["mocov3"].std() < 2e-6 and 0.01 < tokens["mae"].std() < 0.04


@pytest.mark.parametrize("init", BOUND)
def test_everything_else_is_the_same(init):
    model = built(init=init)
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.ndim > 1 and "qkv" not in name:
            flat = p.flatten(1)  # the convolution as the linear layer it is
            assert uniform_within(flat, math.sqrt(6 / sum(flat.shape))), name


def test_what_training_would_do_to_a_frozen_projection():
    frozen, free = built(frozen_patch_embed=True), built()
    for model, expected in ((frozen, []), (free, ["patch_embed.proj.bias", "patch_embed.proj.weight"])):
        model(torch.randn(2, 3, 16, 16)).square().sum().backward()
        named = [name for group in param_groups(model, 0.1) for name, _ in group["params"]]
        assert sorted(name for name in named if "patch_embed" in name) == expected
        graded = {name for name, p in model.named_parameters() if p.grad is not None}
        assert graded == set(named)
        rest = {name for name, _ in model.named_parameters() if "patch_embed" not in name} - {"pos_embed"}
        assert rest <= graded


def test_a_frozen_projection_stays_and_the_rest_moves():
    model = built(frozen_patch_embed=True, init="mocov3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert still == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
