"""What a case expects of a kernel: the right numbers, or a property of the call.

Each takes (kernel, recipe, seed, device), returns findings, and lets KernelRaised pass where the kernel refuses.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selfsup.conformance.claims import Kernel, KernelRaised, gradients_of, read
from selfsup.conformance.inputs import InputRecipe, Inputs
from selfsup.conformance.judge import TENSORS, Finding, compare, expectation, judge, judge_call, judged
from selfsup.conformance.oracle import Answer, plain, truth

Expectation = Callable[[Kernel, InputRecipe, int, str], list[Finding]]


class NotApplicable(Exception):
    """The case has no meaning for this kernel; its text says why."""


def forward(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Output (and log-sum-exp) by the rule of judge.py."""
    inputs = recipe(seed, device)
    return judge_call(inputs, lambda: kernel.answer(inputs, gradients=False), gradients=False)


def gradients(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """The same with the gradients of q, k, v, and of a float mask that wants one."""
    inputs = recipe(seed, device)
    return judge_call(inputs, lambda: kernel.answer(inputs))


def forward_or_refused(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Right, or refused, whatever is claimed: two options of which one must not be dropped in silence."""
    try:
        return forward(kernel, recipe, seed, device)
    except KernelRaised as error:
        raise NotApplicable(f"refused, as it may: {str(error)[:80]}") from error


def absolute(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Within 4 eps of float64, element by element: what the plain run forgives as well is not forgiven here."""
    inputs = recipe(seed, device)
    right = truth(inputs, gradients=False).out
    out = kernel.answer(inputs, gradients=False).out.double().cpu()
    eps = torch.finfo(inputs.q.dtype).eps
    relative = float(((out - right).abs() / right.abs()).max()) if out.isfinite().all() else float("inf")
    fault = None if relative <= 4 * eps else f"relative error {relative:.2g}, limit 4 eps = {4 * eps:.2g}"
    return [Finding("out", fault, relative / eps)]


def uninitialised(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """torch.empty is filled with NaN during the call."""
    with _Filled():
        return forward(kernel, recipe, seed, device)


def uninitialised_gradients(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """The same, gradients included."""
    with _Filled():
        return gradients(kernel, recipe, seed, device)


class _Filled:
    """torch fills what torch.empty returns with NaN while its deterministic mode is on."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *exception: object) -> None:
        torch.use_deterministic_algorithms(self.before[0])
        torch.utils.deterministic.fill_uninitialized_memory = self.before[1]


def _verdict(name: str, fault: str | None) -> list[Finding]:
    return [Finding(name, fault, 0.0)]


def other_inputs_between(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """The second call, after one with other inputs, gives what the first gave; and new numbers in the same
    tensors are seen."""
    inputs, other = recipe(seed, device), recipe(seed + 1, device)
    first = kernel.answer(inputs, gradients=False).out.clone()
    kernel.answer(other, gradients=False)
    again = kernel.answer(inputs, gradients=False).out
    if not torch.equal(first, again):
        return _verdict("out", "another result for the same inputs")
    for x, y in zip(inputs[:3], other[:3]):
        x.copy_(y)
    return judge_call(inputs, lambda: kernel.answer(inputs, gradients=False), gradients=False)


def backward_twice(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """A graph that is kept gives the same gradients once more."""
    inputs = recipe(seed, device)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out, _ = kernel.outputs(*leaves, {})
    expected = expectation(inputs)
    gradients_of([out], leaves, [inputs.grad_out], retain_graph=True)
    return judged(expected, Answer(out.detach(), None, *gradients_of([out], leaves, [inputs.grad_out])))


def deterministic(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """20 calls with gradients (1,000 on an accelerator): the same bits."""
    inputs = recipe(seed, device)
    first = kernel.answer(inputs)
    for call in range(20 if device == "cpu" else 1000):
        for name, x, y in zip(TENSORS, first, kernel.answer(inputs)):
            if x is not None and not torch.equal(x, y):
                return _verdict(name, f"call {call + 2} gave other bits than the first")
    return _verdict("all", None)


def gradient_subsets(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Every choice of q, k, v (and a float mask) to want a gradient gives the right ones."""
    inputs = recipe(seed, device)
    right, expected = truth(inputs), plain(inputs)
    mask = inputs.options.get("attn_mask")
    tensors = [*inputs[:3]] if mask is None else [*inputs[:3], mask]
    names, findings = ("dq", "dk", "dv", "dmask")[: len(tensors)], []
    sizes = range(1, len(tensors) + 1)
    for wanted in itertools.chain.from_iterable(itertools.combinations(range(len(tensors)), n) for n in sizes):
        leaves = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
        out, _ = kernel.outputs(*leaves[:3], {} if mask is None else {"attn_mask": leaves[3]})
        chosen = [names[i] for i in wanted]
        for name, grad in zip(chosen, gradients_of([out], [leaves[i] for i in wanted], [inputs.grad_out])):
            if grad is None:
                findings.append(Finding(name, f"with only {chosen}: did not come back", 0.0))
                continue
            finding = compare(name, grad, getattr(right, name), getattr(expected, name), inputs.q.dtype, right)
            if finding.fault:
                findings.append(finding._replace(fault=f"with only {chosen}: {finding.fault}"))
    return findings or _verdict("all", None)


def mixed_dtypes(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """q of one dtype with k and v of another is refused, or computed as written."""
    inputs = recipe(seed, device)
    other = torch.float16 if inputs.q.dtype != torch.float16 else torch.float32
    inputs = inputs._replace(k=inputs.k.to(other), v=inputs.v.to(other))
    right = truth(inputs, gradients=False).out
    try:
        out, _ = kernel.outputs(*inputs[:3], {})
    except KernelRaised:
        return _verdict("call", None)
    error, limit = (out.double().cpu() - right).abs().max(), 8 * torch.finfo(torch.float16).eps * right.abs().max()
    wrong = not error <= limit
    return _verdict("call", f"q in {inputs.q.dtype}, k and v in {other}: wrong numbers came back" if wrong else None)


def head_counts_raise(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Five query heads with two key heads are refused."""
    inputs = recipe.at(recipe.shape._replace(h=5, hk=2))(seed, device)
    try:
        kernel(*inputs[:3], inputs.options)
    except KernelRaised:
        return _verdict("call", None)
    return _verdict("call", "5 query heads with 2 key heads: numbers came back")


_SECOND = "wrong; a backward pass that is not differentiable must raise where torch.is_grad_enabled()"


def second_derivative(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Right, or refused: never zero in silence."""
    inputs = recipe(seed, device)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out, _ = kernel.outputs(*leaves, {})
    try:
        grads = torch.autograd.grad(out, leaves, inputs.grad_out, create_graph=True)
        loss = sum(g.square().sum() for g in grads) + (out * inputs.grad_out).sum()  # a part needs no second
        second = torch.autograd.grad(loss, leaves)
    except Exception as error:
        raise NotApplicable(f"refused, as it may: {str(error)[:80]}") from error
    doubles = [x.detach().double().requires_grad_() for x in inputs[:3]]
    right = (doubles[0] @ doubles[1].mT * doubles[0].shape[-1] ** -0.5).softmax(-1) @ doubles[2]
    grads = torch.autograd.grad(right, doubles, inputs.grad_out.double(), create_graph=True)
    loss = sum(g.square().sum() for g in grads) + (right * inputs.grad_out.double()).sum()
    expected = torch.autograd.grad(loss, doubles)
    eps, findings = torch.finfo(inputs.q.dtype).eps, []
    for name, x, r in zip(("d2q", "d2k", "d2v"), second, expected):
        wrong = float((x.double() - r).abs().max()) > 1000 * eps * float(r.abs().max())
        findings.append(Finding(name, _SECOND if wrong else None, 0.0))
    return findings


def _same_as_called(inputs: Inputs, call: Callable[..., Tensor]) -> list[Finding]:
    """Another way to call, judged like a call: outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    try:
        out = call(*leaves)
        grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    except Exception as error:
        raise KernelRaised(f"{type(error).__name__}: {str(error).strip()[:300]}") from error
    return judge(inputs, Answer(read(out, False)[0].detach(), None, *grads))


def under_checkpoint(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Activation checkpointing computes it twice and gives the same."""
    return _same_as_called(
        recipe(seed, device),
        lambda q, k, v: checkpoint(lambda *x: kernel.raw(*x, {}), q, k, v, use_reentrant=False),
    )


def under_compile(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """torch.compile with fullgraph: no graph break, and the numbers of the eager call, gradients included."""
    torch.compiler.reset()
    call = torch.compile(kernel.call, fullgraph=True, backend="aot_eager")
    compiled = replace(kernel, call=call)
    return _same_as_called(recipe(seed, device), lambda q, k, v: compiled.raw(q, k, v, {}))


def under_compile_dynamic(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Compiled once with dynamic shapes, right for three lengths."""
    torch.compiler.reset()
    compiled = replace(kernel, call=torch.compile(kernel.call, dynamic=True, backend="aot_eager"))
    findings = []
    for n in (33, 47, 64):
        findings += forward(compiled, recipe.at(recipe.shape._replace(l=n, s=n)), seed, device)
    return findings


def under_autocast(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """fp32 in, autocast to bf16: the output is bf16 (as torch's own), right for bf16."""
    inputs = recipe(seed, device)
    rounded = inputs._replace(**{n: getattr(inputs, n).to(torch.bfloat16) for n in ("q", "k", "v", "grad_out")})
    expected, leaves = expectation(rounded), [x.detach().requires_grad_() for x in inputs[:3]]
    with torch.autocast(device, dtype=torch.bfloat16):
        out, _ = kernel.outputs(*leaves, {})
    grads = gradients_of([out], leaves, [rounded.grad_out.to(out.dtype)])
    if any(g is not None and g.dtype != torch.float32 for g in grads):
        return _verdict("gradients", "expected fp32 for fp32 inputs")
    return judged(expected, Answer(out.detach(), None, *(None if g is None else g.to(torch.bfloat16) for g in grads)))


def under_vmap(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """torch.vmap over a new dimension is right, or raises."""
    inputs = recipe.at(recipe.shape._replace(b=3))(seed, device)
    try:
        out = torch.vmap(lambda *x: kernel(*(t[None] for t in x), {})[0])(*inputs[:3])
    except Exception as error:
        raise NotApplicable(f"refused, as it may: {str(error)[:80]}") from error
    return judge(inputs, Answer(out))


def under_jvp(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Forward-mode differentiation is right, or raises: <jvp, g> = <tangent, vjp>."""
    inputs, tangents = recipe(seed, device), recipe(seed + 1, device)[:3]
    try:
        _, tangent_out = torch.func.jvp(lambda *x: kernel(*x, {}), tuple(inputs[:3]), tuple(tangents))
    except Exception as error:
        raise NotApplicable(f"refused, as it may: {str(error)[:80]}") from error
    right = truth(inputs)
    one = float((tangent_out.double().cpu() * inputs.grad_out.double().cpu()).sum())
    terms = [t.double().cpu() * g for t, g in zip(tangents, (right.dq, right.dk, right.dv))]
    other, size = float(sum(t.sum() for t in terms)), float(sum(t.abs().sum() for t in terms))
    wrong = abs(one - other) > 64 * torch.finfo(inputs.q.dtype).eps * size
    return _verdict("jvp", f"{one:.6g}, expected {other:.6g}" if wrong else None)


def opcheck(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """torch.library.opcheck, where the kernel is an operator."""
    operators = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch.library.CustomOpDef)
    if not isinstance(kernel.call, operators):
        raise NotApplicable("not an operator of torch.library")
    inputs = recipe(seed, device)
    results = torch.library.opcheck(kernel.call, tuple(x.requires_grad_() for x in inputs[:3]), raise_exception=False)
    return [Finding(name, None if r == "SUCCESS" else str(r)[:200], 0.0) for name, r in results.items()]


def linear_memory(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Forward and backward, the peak stays under half of an (l, s) matrix of single bytes."""
    inputs = recipe(seed, device)
    kernel.answer(recipe.at(recipe.shape._replace(l=64, s=64))(seed, device))  # what is loaded once
    peak = peak_memory(lambda: kernel.answer(inputs), device)
    if peak is None:
        raise NotApplicable("peak memory is not known here")
    limit = recipe.shape.l * recipe.shape.s // 2
    fault = f"{peak >> 20} MiB, limit {limit >> 20} MiB" if peak > limit else None
    return _verdict("memory", fault)


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call takes at its peak beyond what was taken before; None where it cannot be told."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        return None
    reset.write_text("5")  # the peak starts anew at what is resident now

    def kib(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    before = kib("VmRSS:")
    call()
    return (kib("VmHWM:") - before) << 10


