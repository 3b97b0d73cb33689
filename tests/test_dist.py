"""Collectives with gradient on real processes, against one process that holds the global batch."""

import pytest
import torch

from ranks import on_ranks
from selfsup import dist

B, D = 3, 4


def own_slot_only(x):
    """A gather without gradient, the rank's own rows put back in."""
    first = dist.rank() * len(x)
    everyone = dist.all_gather(x)
    return torch.cat([everyone[:first], x, everyone[first + len(x) :]])


class Unsummed(torch.autograd.Function):
    """The gradient of the own slot as this rank's loss has it."""

    @staticmethod
    def forward(ctx, x):
        return dist.all_gather(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(dist.world_size())[dist.rank()]


class Averaged(Unsummed):
    @staticmethod
    def backward(ctx, grad):
        return dist.all_reduce(grad).chunk(dist.world_size())[dist.rank()] / dist.world_size()


class FirstSlot(Unsummed):
    @staticmethod
    def backward(ctx, grad):
        return dist.all_reduce(grad).chunk(dist.world_size())[0]


BUGS = {
    "own slot only": own_slot_only,
    "unsummed": Unsummed.apply,
    "averaged": Averaged.apply,
    "first slot": FirstSlot.apply,
}


def loss_of(x, everyone):
    """The rank's rows against all rows, and a factor in which all rows are: a sum over ranks of such losses."""
    return (x @ everyone.T).double().logsumexp(1).sum() * everyone.double().square().sum()


def error(gather, dtype: torch.dtype) -> float:
    """Of this rank's gradient, over the norm of that of the global batch in float64."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(B * dist.world_size(), D, generator=generator, dtype=torch.float64).to(dtype)
    whole = values.double().clone().requires_grad_()
    loss_of(whole, whole).backward()
    rows = slice(dist.rank() * B, dist.rank() * B + B)
    x = values[rows].clone().requires_grad_()
    everyone = gather(x)
    assert torch.equal(everyone, values)  # rank-major, nothing rounded
    loss_of(x, everyone).backward()
    return ((x.grad.double() - whole.grad[rows]).norm() / whole.grad.norm()).item()


def check_gather() -> dict[str, float]:
    ours = dist.all_gather_with_grad
    found = {str(dtype): error(ours, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    found |= {bug: error(gather, torch.float64) for bug, gather in BUGS.items()}
    images = torch.full((1, 2, 3, 1), float(dist.rank()))  # any number of dimensions
    assert ours(images)[:, 0, 0, 0].tolist() == list(range(dist.world_size()))
    assert ours(torch.ones(0, 2)).shape == (0, 2)
    half = torch.full((3,), 1 + 2**-7, dtype=torch.bfloat16)
    assert torch.equal(dist.all_reduce(half), (half.float() * dist.world_size()).bfloat16())
    with torch.no_grad():
        assert not ours(torch.ones(2, 2, requires_grad=True)).requires_grad
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_the_gradient_is_that_of_the_global_batch(world, tmp_path):
    answers = on_ranks(world, check_gather, tmp_path)
    for found in answers:
        assert found.pop("torch.float64") < 1e-14
        assert found.pop("torch.float32") < 1e-6
        assert found.pop("torch.bfloat16") < 0.01
    for bug in BUGS:  # a planted one is seen on some rank
        assert max(found[bug] for found in answers) > 0.05, bug


def test_one_process_needs_no_group():
    x = torch.randn(2, 3, requires_grad=True)
    assert dist.all_gather_with_grad(x) is x
    assert torch.equal(dist.all_gather(x), x) and not dist.all_gather(x).requires_grad
    assert torch.equal(dist.all_reduce(x), x) and dist.all_reduce(x).data_ptr() != x.data_ptr()


def check_compiled() -> float:
    def double(x):
        return dist.all_gather_with_grad(x * 2) * 3

    x = torch.ones(2, 2, requires_grad=True)
    torch.compile(double, backend="eager")(x).sum().backward()
    return x.grad[0, 0].item()


def test_compiled_code_breaks_its_graph_there(tmp_path):
    import torch._dynamo  # noqa: F401  # once, before the ranks are forked

    assert on_ranks(2, check_compiled, tmp_path) == [12.0, 12.0]
