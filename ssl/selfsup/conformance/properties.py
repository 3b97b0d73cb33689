"""What holds of attention whatever the numbers: no oracle needed. Shapes are drawn, and shrunk, by hypothesis."""

import math
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from torch import Tensor

from selfsup.conformance.claims import Kernel, KernelRaised, gradients_of
from selfsup.conformance.inputs import InputRecipe, Inputs, Shape
from selfsup.conformance.judge import Finding

EXAMPLES = 12
NEEDS: dict[str, tuple[str, ...]] = {
    "permuted-keys": (),
    "permuted-heads": (),
    "shifted-keys": (),
    "linear-in-v": (),
    "constant-v": (),
    "entries-alone": (),
    "hidden-keys": ("bool_mask",),
    "split-and-merged": ("lse", "cross"),
    "leaking-documents": ("documents",),
    "shifted-keys-gradient": ("backward",),
    "inner-product": ("backward",),
}
"""The properties with the features that each needs."""

Property = Callable[[Kernel, Inputs, torch.Generator], None]


def _expectation(holds: Property) -> Callable[[Kernel, InputRecipe, int, str], list[Finding]]:
    """Runs a property over drawn shapes; a refused shape is passed over, all refused is a refusal."""

    def expectation(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
        raised: list[KernelRaised] = []
        ran: list[Shape] = []
        tried = {8, 16, 64, recipe.shape.d}
        widths = [d for d in tried if kernel.claims is None or kernel.claims.cover((), Shape(l=0, s=0, d=d, dv=d))]
        cross = kernel.claims is None or not kernel.claims.declared or "cross" in kernel.claims.features

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(
            b=st.integers(1, 2),
            h=st.integers(1, 3),
            length=st.integers(1, 40),
            more=st.integers(0, 40) if cross else st.just(0),
            d=st.sampled_from(sorted(widths) or [recipe.shape.d]),
            draw=st.integers(0, 999),
        )
        def run(b: int, h: int, length: int, more: int, d: int, draw: int) -> None:
            step = kernel.claims.length_multiple if kernel.claims else 1
            length, more = -(-length // step) * step, -(-more // step) * step
            shape = Shape(b, h, h, length, length + more, d, d)
            inputs = recipe.at(shape)(seed * 1000 + draw, device)
            try:
                holds(kernel, inputs, torch.Generator().manual_seed(draw))
                ran.append(shape)
            except KernelRaised as error:
                raised.append(error)
                assume(False)
            except AssertionError as error:
                raise AssertionError(f"{error} ({shape}, seed {seed * 1000 + draw})") from None

        try:
            run()
        except AssertionError as error:
            return [Finding("property", str(error), 0.0)]
        except Unsatisfiable:
            pass  # every drawn shape was refused: said below
        if not ran:
            raise raised[-1]
        return [Finding("property", None, 0.0)]

    expectation.__name__ = expectation.__qualname__ = holds.__name__
    expectation.__doc__ = holds.__doc__
    return expectation


def _close(x: Tensor, y: Tensor, what: str, factor: float = 64.0) -> None:
    """Equal up to `factor` roundings of the largest number."""
    limit = factor * torch.finfo(x.dtype).eps * max(1.0, float(y.double().abs().max()) if y.numel() else 0.0)
    error = float((x.double() - y.double()).abs().max()) if x.numel() else 0.0
    assert error <= limit, f"{what}: differs by {error:.3g}, limit {limit:.3g}"


def _out(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return kernel.outputs(q, k, v, options)[0]


@_expectation
def permuted_keys(kernel: Kernel, inputs: Inputs, generator: torch.Generator) -> None:
    """The order of the keys does not matter."""
    q, k, v = inputs[:3]
    order = torch.randperm(k.shape[2], generator=generator)
    _close(_out(kernel, q, k[:, :, order], v[:, :, order]), _out(kernel, q, k, v), "keys permuted")


@_expectation
def permuted_heads(kernel: Kernel, inputs: Inputs, generator: torch.Generator) -> None:
    """Heads do not see each other."""
    q, k, v = inputs[:3]
    order = torch.randperm(q.shape[1], generator=generator)
    _close(_out(kernel, q[:, order], k[:, order], v[:, order]), _out(kernel, q, k, v)[:, order], "heads permuted")


@_expectation
def shifted_keys(kernel: Kernel, inputs: Inputs, generator: torch.Generator) -> None:
    """One vector added to all keys adds one number to all scores of a row: nothing changes."""
    q, k, v = inputs[:3]
    shift = torch.randn(k.shape[-1], generator=generator).to(k) / 4
    _close(_out(kernel, q, k + shift, v), _out(kernel, q, k, v), "keys shifted")


@_expectation
def linear_in_v(kernel: Kernel, inputs: Inputs, generator: torch.Generator) -> None:
    """Attention is linear in v."""
    q, k, v = inputs[:3]
    other = torch.randn(v.shape, generator=generator).to(v)
    together = _out(kernel, q, k, 2 * v - other)
    _close(together, 2 * _out(kernel, q, k, v) - _out(kernel, q, k, other), "2 v - w")


@_expectation
def constant_v(kernel: Kernel, inputs: Inputs, generator: torch.Generator) -> None:
    """The weights of a row sum to one."""
    q, k, v = inputs[:3]
    _close(_out(kernel, q, k, v[:, :, :1].expand_as(v)), v[:, :, :1].expand(-1, -1, q.shape[2], -1), "v constant")


@_expectation
def entries_alone(kernel: Kernel, inputs: Inputs, generator: torch.Generator) -> None:
    """An entry of a batch does not see the others."""
    q, k, v = inputs[:3]
    _close(_out(kernel, q[:1], k[:1], v[:1]), _out(kernel, q, k, v)[:1], "the first entry alone")


@_expectation
def hidden_keys(kernel: Kernel, inputs: Inputs, generator: torch.Generator) -> None:
    """What a mask hides does not matter, whatever it is."""
    q, k, v = inputs[:3]
    keep = torch.rand(k.shape[2], generator=generator) < 0.5
    keep[0] = True
    mask = keep.to(q.device).expand(q.shape[2], -1)
    changed = [torch.where(keep[:, None].to(x.device), x, 30 + x * 9) for x in (k, v)]
    assert torch.equal(_out(kernel, q, k, v, attn_mask=mask), _out(kernel, q, *changed, attn_mask=mask)), "leaks"


@_expectation
def split_and_merged(kernel: Kernel, inputs: Inputs, generator: torch.Generator) -> None:
    """Attention over two halves of the keys, merged by their log-sum-exps, is attention over all."""
    q, k, v = inputs[:3]
    if k.shape[2] < 2:
        return
    half = k.shape[2] // 2
    with torch.no_grad():
        parts = [
            kernel.outputs(q, k[:, :, at], v[:, :, at], {"return_lse": True}) for at in (slice(half), slice(half, None))
        ]
    logs = torch.stack([lse for _, lse in parts]).double()
    shares = logs.softmax(dim=0)[..., None]
    merged = sum(share * out.double() for share, (out, _) in zip(shares, parts))
    _close(_out(kernel, q, k, v), merged, "halves merged")


@_expectation
def leaking_documents(kernel: Kernel, inputs: Inputs, generator: torch.Generator) -> None:
    """Another text in one document changes no bit of another."""
    q, k, v = (x[:, :, : inputs.q.shape[2]] for x in inputs[:3])
    ids = (torch.arange(q.shape[2], device=q.device) >= (q.shape[2] + 1) // 2).long().expand(q.shape[0], -1)
    second = ids[:, None, :, None].bool()
    changed = [torch.where(second, 30 + x * 9, x) for x in (q, k, v)]
    one, two = (_out(kernel, *x, document_ids=ids) for x in ((q, k, v), changed))
    assert torch.equal(one[~second.expand_as(one)], two[~second.expand_as(two)]), "leaks between documents"


def _grads(kernel: Kernel, inputs: Inputs, k: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (inputs.q, k, inputs.v)]
    out, _ = kernel.outputs(*leaves, {})
    grads = gradients_of([out], leaves, [inputs.grad_out])
    assert all(g is not None for g in grads), "a gradient did not come back"
    return out, *grads


@_expectation
def shifted_keys_gradient(kernel: Kernel, inputs: Inputs, generator: torch.Generator) -> None:
    """The gradients of a row's scores sum to zero: a vector added to all keys leaves dq as it was."""
    shift = torch.randn(inputs.k.shape[-1], generator=generator).to(inputs.k) / 4
    moved, still = _grads(kernel, inputs, inputs.k + shift), _grads(kernel, inputs, inputs.k)
    _close(moved[1], still[1], "dq", factor=256.0)


@_expectation
def inner_product(kernel: Kernel, inputs: Inputs, generator: torch.Generator) -> None:
    """<dO, O> = <dV, V>, since O is linear in V."""
    out, _, _, dv = (x.double() for x in _grads(kernel, inputs, inputs.k))
    grad, v = inputs.grad_out.double(), inputs.v.double()
    one, two, size = (grad * out).sum(), (dv * v).sum(), (dv * v).abs().sum()
    limit = 64 * torch.finfo(inputs.q.dtype).eps * float(size)
    assert abs(float(one - two)) <= limit, f"<dO, O> = {float(one):.6g}, <dV, V> = {float(two):.6g}"


def dropout_share(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """With v the identity the output is the weights: the share of zeros is p, what is left is scaled by 1/(1-p)."""
    n, p = 64, 0.3
    recipe = recipe.at(Shape(2, 4, 4, n, n, n, n))
    q, k, _ = recipe(seed, device)[:3]
    v = torch.eye(n, device=device, dtype=q.dtype).expand(2, 4, n, n)
    torch.manual_seed(seed)
    whole, dropped = _out(kernel, q, k, v), _out(kernel, q, k, v, dropout_p=p)
    zeros, count = int((dropped == 0).sum()), dropped.numel()
    deviations = (zeros - p * count) / math.sqrt(count * p * (1 - p))
    kept = dropped != 0
    findings = [Finding("share", f"{zeros / count:.4f} dropped, expected {p}" if abs(deviations) > 4.9 else None, 0.0)]
    off = (dropped[kept].double() * (1 - p) / whole[kept].double() - 1).abs().amax() if kept.any() else torch.tensor(0.0)
    wrong = float(off) > 16 * torch.finfo(q.dtype).eps
    findings.append(Finding("scale", f"kept weights off by {float(off):.2g}" if wrong else None, 0.0))
    masks = kept.flatten(0, 1)  # (b * h, l, s)
    same = any(torch.equal(masks[i], masks[j]) for i in range(len(masks)) for j in range(i))
    return [*findings, Finding("heads", "two heads or batch entries drop the same" if same else None, 0.0)]


def dropout_backward(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """The backward pass drops what the forward pass dropped: its gradients are those of finite differences.

    The same seed drops the same, so a nudge of q, k or v changes the output by what the gradient says.
    """
    inputs = recipe(seed, device)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]

    def out(*tensors: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return kernel.outputs(*tensors, {"dropout_p": 0.5})[0]

    grads, findings = gradients_of([out(*leaves)], leaves, [inputs.grad_out]), []
    generator = torch.Generator().manual_seed(seed)
    for i, (name, grad) in enumerate(zip(("dq", "dk", "dv"), grads)):
        if grad is None:
            findings.append(Finding(name, "did not come back", 0.0))
            continue
        nudge, step = torch.randn(grad.shape, generator=generator).to(grad), 2**-6
        ends = []
        for sign in (step, -step):
            moved = [x.detach() + sign * nudge if j == i else x.detach() for j, x in enumerate(leaves)]
            ends.append(float((out(*moved).detach().double() * inputs.grad_out.double()).sum()))
        measured, told = (ends[0] - ends[1]) / (2 * step), float((grad.double() * nudge.double()).sum())
        size = float((grad.double() * nudge.double()).square().sum().sqrt())
        wrong = abs(measured - told) > 0.1 * size + 1000 * torch.finfo(grad.dtype).eps * max(map(abs, ends)) / step
        fault = f"{told:.4g} along a nudge, finite differences give {measured:.4g}" if wrong else None
        findings.append(Finding(name, fault, 0.0))
    return findings


def dropout_seeds(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Two calls drop differently; the same seed drops the same."""
    q, k, v = recipe(seed, device)[:3]
    runs = []
    for state in (seed, None, seed):
        if state is not None:
            torch.manual_seed(state)
        runs.append(_out(kernel, q, k, v, dropout_p=0.5))
    findings = [Finding("seed", None if torch.equal(runs[0], runs[2]) else "not repeated by its seed", 0.0)]
    constant = torch.equal(runs[0], runs[1])
    return [*findings, Finding("calls", "two calls dropped the same" if constant else None, 0.0)]
