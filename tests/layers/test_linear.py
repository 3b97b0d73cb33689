"""The bfloat16 backward pass written by hand, against float64 and against nn.Linear."""

import pytest
import torch
from torch import nn

from selfsup.layers import linear
from selfsup.layers.linear import Linear

WIDE = [(64, 1024), (1024, 64), (1024, 1024)]


def gradients(layer: nn.Linear, x: torch.Tensor, grad_out: torch.Tensor, bf16: bool) -> list[torch.Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(x)
    y.backward(grad_out.to(y.dtype))
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]


def twins(sizes: tuple[int, int]) -> tuple[Linear, nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ours, theirs = Linear(*sizes), nn.Linear(*sizes)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(4, 33, sizes[0]), torch.randn(4, 33, sizes[1])


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]


@pytest.mark.parametrize("sizes", WIDE, ids=str)
def test_bfloat16_error_is_that_of_torch(sizes):
    ours, theirs, x, g = twins(sizes)
    double = nn.Linear(*sizes).double()
    double.load_state_dict(ours.state_dict())
    exact = gradients(double, x.double(), g.double(), False)
    mine, other = gradients(ours, x, g, True), gradients(theirs, x, g, True)
    assert [t.dtype for t in mine] == [t.dtype for t in other]
    for ours_off, theirs_off in zip(errors(mine, exact), errors(other, exact), strict=True):
        assert 0 < ours_off < 1.1 * theirs_off < 0.01


@pytest.mark.parametrize("sizes", [*WIDE, (64, 64)], ids=str)
def test_without_autocast_nothing_changes(sizes):
    ours, theirs, x, g = twins(sizes)
    for mine, other in zip(gradients(ours, x, g, False), gradients(theirs, x, g, False), strict=True):
        assert torch.equal(mine, other)


def test_the_fast_way_is_taken_where_it_should_be(monkeypatch):
    calls = []
    real = linear._Bfloat16Linear.apply
    monkeypatch.setattr(linear._Bfloat16Linear, "apply", lambda *a: calls.append(1) or real(*a))
    x = torch.randn(4, 64)
    for bf16, sizes, expected in ((True, (64, 1024), 1), (True, (64, 64), 0), (False, (64, 1024), 0)):
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            Linear(*sizes)(x)
        assert len(calls) == expected


def test_frozen_parts_get_no_gradient():
    ours, _, x, g = twins((64, 1024))
    ours.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        ours(x).backward(g.bfloat16())  # x needs none either
    assert ours.weight.grad is None and ours.bias.grad is not None


@pytest.mark.parametrize("bug", ["transposed", "mean", "stale"])
def test_planted_bugs_are_caught(bug, monkeypatch):
    real = linear._Bfloat16Linear.backward

    def broken(ctx, *grads):
        gx, gw, gb = real(ctx, *grads)
        return {"transposed": (gx, gw.t(), gb), "mean": (gx, gw, gb / 4), "stale": (gx * 0, gw, gb)}[bug]

    monkeypatch.setattr(linear._Bfloat16Linear, "backward", staticmethod(broken))
    with pytest.raises(AssertionError):
        test_bfloat16_error_is_that_of_torch((1024, 1024))
