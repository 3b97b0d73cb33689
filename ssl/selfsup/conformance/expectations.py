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

from selfsup.conformance.claims import Kernel, KernelRaised
from selfsup.conformance.inputs import InputRecipe, Inputs
from selfsup.conformance.judge import TENSORS, Finding, compare, judge
from selfsup.conformance.oracle import Answer, plain, truth

Expectation = Callable[[Kernel, InputRecipe, int, str], list[Finding]]


class NotApplicable(Exception):
    """The case has no meaning for this kernel; its text says why."""


def forward(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Output (and log-sum-exp) by the rule of judge.py."""
    inputs = recipe(seed, device)
    return judge(inputs, kernel.answer(inputs, gradients=False))


def gradients(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """The same with the gradients of q, k, v, and of a float mask that wants one."""
    inputs = recipe(seed, device)
    return judge(inputs, kernel.answer(inputs))


def absolute(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Within 4 eps of float64, element by element: what the plain run forgives as well is not forgiven here."""
    inputs = recipe(seed, device)
    out, right = kernel.answer(inputs, gradients=False).out.double().cpu(), truth(inputs, gradients=False).out
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


def inputs_unchanged(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """q, k and v are as they were."""
    inputs = recipe(seed, device)
    before = [x.clone() for x in inputs[:3]]
    kernel.answer(inputs, gradients=False)
    changed = [n for n, x, y in zip("qkv", inputs[:3], before) if not torch.equal(x, y)]
    return _verdict("inputs", f"{', '.join(changed)} written to" if changed else None)


def same_twice(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """The second call, after one with other inputs, gives what the first gave, bit for bit."""
    inputs, other = recipe(seed, device), recipe(seed + 1, device)
    first = kernel.answer(inputs, gradients=False).out.clone()
    kernel.answer(other, gradients=False)
    again = kernel.answer(inputs, gradients=False).out
    return _verdict("out", None if torch.equal(first, again) else "another result for the same inputs")


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
    """Every choice of q, k, v and the mask to want a gradient gives the right ones."""
    inputs = recipe(seed, device)
    right, expected = truth(inputs), plain(inputs)
    names, findings = ("dq", "dk", "dv", "dmask"), []
    for wanted in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in (1, 2, 3, 4)):
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((*inputs[:3], inputs.options["attn_mask"]))]
        out = kernel(*leaves[:3], {"attn_mask": leaves[3]})
        try:
            grads = torch.autograd.grad(out, [leaves[i] for i in wanted], inputs.grad_out)
        except Exception as error:
            raise KernelRaised(f"backward to {[names[i] for i in wanted]}: {error}") from error
        for i, grad in zip(wanted, grads):
            name = names[i]
            reference = getattr(right, name), getattr(expected, name)
            finding = compare(name, grad, *reference, inputs.q.dtype, right)
            if finding.fault:
                findings.append(finding._replace(fault=f"with only {[names[j] for j in wanted]}: {finding.fault}"))
    return findings or _verdict("all", None)


def _must_raise(call: Callable[[], object], what: str) -> list[Finding]:
    try:
        call()
    except KernelRaised:
        return _verdict("call", None)
    return _verdict("call", f"{what}: numbers came back")


def mixed_dtypes_raise(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """q of one dtype with k and v of another is refused."""
    q, k, v = recipe(seed, device)[:3]
    other = torch.float16 if q.dtype != torch.float16 else torch.float32
    return _must_raise(lambda: kernel(q, k.to(other), v.to(other), {}), f"q in {q.dtype}, k and v in {other}")


def head_counts_raise(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Five query heads with two key heads are refused."""
    inputs = recipe.at(recipe.shape._replace(h=5, hk=2))(seed, device)
    return _must_raise(lambda: kernel(*inputs[:3], inputs.options), "5 query heads with 2 key heads")


def second_derivative(kernel: Kernel, recipe: InputRecipe, seed: int, device: str) -> list[Finding]:
    """Right, or refused: never zero in silence."""
    inputs = recipe(seed, device)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = kernel(*leaves, {})
    try:
        grads = torch.autograd.grad(out, leaves, inputs.grad_out, create_graph=True)
        loss = sum(g.square().sum() for g in grads) + (out * inputs.grad_out).sum()  # a part needs no second
        second = torch.autograd.grad(loss, leaves)
    except RuntimeError as error:
        raise NotApplicable(f"refused, as it may: {str(error)[:80]}") from error
    doubles = [x.detach().double().requires_grad_() for x in inputs[:3]]
    right = (doubles[0] @ doubles[1].mT * doubles[0].shape[-1] ** -0.5).softmax(-1) @ doubles[2]
    grads = torch.autograd.grad(right, doubles, inputs.grad_out.double(), create_graph=True)
    loss = sum(g.square().sum() for g in grads) + (right * inputs.grad_out.double()).sum()
    expected = torch.autograd.grad(loss, doubles)
    eps, findings = torch.finfo(inputs.q.dtype).eps, []
    for name, x, r in zip(("d2q", "d2k", "d2v"), second, expected):
        wrong = float((x.double() - r).abs().max()) > 1000 * eps * float(r.abs().max())
        findings.append(Finding(name, "second derivative wrong" if wrong else None, 0.0))
    return findings


def _same_as_called(inputs: Inputs, call: Callable[..., Tensor]) -> list[Finding]:
    """Another way to call, judged like a call: outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    try:
        out = call(*leaves)
        grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    except Exception as error:
        raise KernelRaised(f"{type(error).__name__}: {str(error).strip()[:300]}") from error
    return judge(inputs, Answer(out.detach(), None, *grads))


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
    with torch.autocast(device, dtype=torch.bfloat16):
        out = kernel.answer(inputs, gradients=False).out
    rounded = inputs._replace(**{n: getattr(inputs, n).to(torch.bfloat16) for n in "qkv"})
    return judge(rounded, Answer(out))


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
    """Forward and backward, the peak stays under half of one (l, s) matrix."""
    inputs = recipe(seed, device)
    kernel.answer(recipe.at(recipe.shape._replace(l=64, s=64))(seed, device))  # what is loaded once
    peak = peak_memory(lambda: kernel.answer(inputs), device)
    if peak is None:
        raise NotApplicable("peak memory is not known here")
    limit = recipe.shape.l * recipe.shape.s * inputs.q.element_size() // 2
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


