"""The head that never holds all logits, against torch's own cross-entropy on all of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mutants import exec_changed
from selfsup.layers import cross_entropy
from selfsup.layers.cross_entropy import LOGITS_AT_A_TIME, linear_cross_entropy

T, D, V = 11, 6, 17
Z = 0.03


def inputs(t=T, d=D, v=V, dtype=torch.float64, bias=True, scale=1.0):
    """hidden, weight, bias (or None), labels; what learns requires a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(t, d), (v, d), (v,)]
    hidden, weight, b = (
        scale * torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes
    )
    labels = torch.randint(v, (t,), generator=generator)
    return [hidden.requires_grad_(), weight.requires_grad_(), b.requires_grad_() if bias else None, labels]


def plain(hidden, weight, bias, labels, z_loss=0.0):
    """The published formula on all logits at once: loss and cross-entropy."""
    logits = F.linear(hidden, weight, bias)
    nll = F.cross_entropy(logits, labels, reduction="sum")
    return nll + z_loss * logits.logsumexp(-1).square().sum(), nll


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None])


def worst(ours, theirs):
    """The largest error over the largest entry, tensor by tensor."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def error(function, bias=True, z_loss=Z, chunk=4, upstream=1.0, **sizes):
    """How far `function` is from the formula: in values and in gradients."""
    made = inputs(bias=bias, **sizes)
    loss, nll = function(*made, chunk, z_loss)
    right, right_nll = plain(*made, z_loss)
    return worst(
        [loss, nll, *gradients(upstream * loss, *made[:3])],
        [right, right_nll, *gradients(upstream * right, *made[:3])],
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, Z])
@pytest.mark.parametrize("chunk", [None, *range(1, T + 2)])
def test_equals_torch(bias, z_loss, chunk):
    assert error(linear_cross_entropy, bias, z_loss, chunk) < 1e-13


@settings(deadline=None, max_examples=40)
@given(
    t=st.integers(1, 9), d=st.integers(1, 5), v=st.integers(1, 9), chunk=st.integers(1, 10),
    z_loss=st.sampled_from([0.0, 1e-4, 1.0]), upstream=st.sampled_from([-3.0, 1e-3, 1.0, 512.0]),
)  # fmt: skip
def test_equals_torch_for_any_shape_and_upstream_gradient(t, d, v, chunk, z_loss, upstream):
    made = inputs(t, d, v)
    loss, nll = linear_cross_entropy(*made, chunk, z_loss)
    right, right_nll = plain(*made, z_loss)
    ours, theirs = (gradients(upstream * x, *made[:3]) for x in (loss, right))
    for a, b in zip((loss, nll, *ours), (right, right_nll, *theirs), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12 * abs(upstream))


def test_the_gradient_of_each_tensor_alone():
    """Autograd asks for those that require one; the second output has none."""
    for learns in range(3):
        made = inputs()
        for i, tensor in enumerate(made[:3]):
            tensor.requires_grad_(i == learns)
        loss, nll = linear_cross_entropy(*made, 3, Z)
        assert not nll.requires_grad
        assert worst(gradients(loss, made[learns]), gradients(plain(*made, Z)[0], made[learns])) < 1e-13


@torch.no_grad()
def test_without_gradients_the_values_are_the_same():
    made = inputs()
    ours = linear_cross_entropy(*made, 3, Z)
    assert worst(ours, plain(*made, Z)) < 1e-14 and not ours[0].requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_no_labels_give_zero_and_zero_gradients_to_everything(bias):
    """DDP waits for every parameter: none may be left without a gradient on a rank that had no target."""
    made = inputs(t=0, bias=bias)
    loss, nll = linear_cross_entropy(*made)
    assert loss == 0 and nll == 0 and loss.dtype == torch.float64 and not nll.requires_grad
    for tensor, gradient in zip(made, gradients(loss, *made[:3])):
        assert gradient.shape == tensor.shape and not gradient.any()


def against_float64(dtype, function):
    """Errors of loss and gradients of one computation against float64, on the same rounded inputs."""
    made = inputs(64, 48, 300, torch.float32, scale=0.5)
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in made]
    right = plain(*exact, Z)[0]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = function(*made)
    assert loss.dtype == torch.float32
    found, expected = gradients(loss, *made[:3]), gradients(right, *exact[:3])
    assert all(g.dtype == torch.float32 for g in found)
    return [((a - b).norm() / b.norm()).item() for a, b in zip((loss, *found), (right, *expected))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [7, 64])
def test_no_less_exact_than_torch_in_float32_and_under_autocast(dtype, chunk):
    ours = against_float64(dtype, lambda *made: linear_cross_entropy(*made, chunk, Z)[0])
    theirs = against_float64(dtype, lambda *made: plain(*made, Z)[0])
    rounding = torch.finfo(dtype).eps
    assert theirs[1] > 1e-8
    for a, b in zip(ours, theirs, strict=True):
        assert a <= 2 * b + rounding / 4, (ours, theirs)


def test_half_precision_inputs_without_autocast():
    made = inputs(dtype=torch.bfloat16)
    loss, _ = linear_cross_entropy(*made, 4)
    found = gradients(loss, *made[:3])
    assert loss.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in found)
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in made]
    assert worst(found, gradients(plain(*exact)[0], *exact[:3])) < 0.02


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation gave back."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def largest(function, *made):
    with Largest() as mode:
        gradients(function(*made), *made[:3])
    return mode.elements


@pytest.mark.parametrize("chunk", [1, 8, 50])
def test_never_holds_all_logits(chunk):
    t, d, v = 400, 4, 100
    made = inputs(t, d, v)
    bound = max(t * d, v * d, chunk * v)
    assert largest(lambda *made: linear_cross_entropy(*made, chunk, Z)[0], *made) == bound
    assert largest(lambda *made: plain(*made, Z)[0], *made) == t * v  # this ruler sees them


def test_left_alone_it_holds_sixteen_mebibytes():
    t, d, v = 300, 2, 50_000
    made = inputs(t, d, v, torch.float32)
    assert t * v > LOGITS_AT_A_TIME == 16 * 2**20 // 4
    found = largest(lambda *made: linear_cross_entropy(*made)[0], *made)
    assert LOGITS_AT_A_TIME - v < found <= LOGITS_AT_A_TIME


def test_large_scores_do_not_overflow():
    made = inputs(dtype=torch.float32, scale=300.0)
    loss, _ = linear_cross_entropy(*made, 2, 1e-4)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, *made[:3]))


def test_uniform_scores_cost_the_logarithm_of_the_vocabulary():
    hidden, weight, labels = torch.zeros(5, 3), torch.zeros(7, 3), torch.arange(5)
    loss, nll = linear_cross_entropy(hidden, weight, None, labels, z_loss=2.0)
    assert nll.item() == pytest.approx(5 * math.log(7))
    assert loss.item() == pytest.approx(5 * (math.log(7) + 2 * math.log(7) ** 2))


MUTANTS = {
    "the next label": ("forward", "gather(1, labels[part, None])", "gather(1, labels.roll(1)[part, None])"),
    "the next label, in the gradient": ("forward", "add_(1, labels[part", "add_(1, labels.roll(1)[part"),
    "z-loss taken off": ("forward", "loss += z_loss", "loss -= z_loss"),
    "z-loss taken off, in the gradient": ("forward", "(1 + 2 * z_loss", "(1 - 2 * z_loss"),
    "no z-loss in the gradient": ("forward", "if z_loss:", "if False:"),
    "no bias in the scores": ("forward", "logits += bias", "pass"),
    "the last chunk only": ("forward", "nll += (", "nll = ("),
    "upstream gradient forgotten": ("backward", "(weight * g)", "weight"),
    "upstream gradient forgotten in the bias": ("backward", "(bias * g)", "bias"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, mutant):
    name, old, new = MUTANTS[mutant]
    broken = exec_changed(cross_entropy, f"_LinearCrossEntropy.{name}", old, new)
    monkeypatch.setattr(cross_entropy._LinearCrossEntropy, name, broken)
    assert error(linear_cross_entropy, upstream=0.5) > 1e-3


def test_a_missing_bias_gradient_is_caught(monkeypatch):
    broken = exec_changed(cross_entropy, "_accumulate", "dbias += dlogits.sum(dim=0)", "pass")
    monkeypatch.setattr(cross_entropy, "_accumulate", broken)
    assert error(linear_cross_entropy) > 0.1


def test_compiled_it_is_one_graph_for_any_number_of_rows():
    """Traced, its loop over chunks would be unrolled, and compiled again for each number of targets."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    weight = torch.randn(33, 8, requires_grad=True)

    def step(hidden, labels):
        return linear_cross_entropy(hidden * 2, weight, None, labels, chunk=3)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend)
    for t in (5, 7, 9, 11, 20, 31):
        hidden, labels = torch.randn(t, 8), torch.randint(0, 33, (t,))
        assert torch.equal(compiled(hidden, labels), step(hidden, labels))
    assert len(graphs) <= 2 and sum(len(graph.graph.nodes) for graph in graphs) < 20
    torch._dynamo.reset()
