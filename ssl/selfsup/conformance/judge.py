"""Is an answer right? By rows, against float64, with the error of a plain run as the measure.

The rule: max over a row of |x - r| <= 2 max over the row of |p - r| + 4 eps (max |r| of the row + mean |r|),
where x is the kernel, r the float64 loop, p the plain run in the kernel's precision. By rows, because one bad
row hides in a maximum or a mean over the whole tensor; never relative to the worst element, which lets a
negated gradient pass.

Gradients of scores are differences, P (dP - <dO, O>): with a single key they are zero, exactly so in a plain
run, but eps times the terms in every kernel that computes <dO, O> from a rounded O, as all fused ones do. So
for dq, dk and the mask's gradient 2 eps times the sum of the terms' sizes is added to the limit. And whoever
computes exp(score - log-sum-exp) rounds both: twice what that changes is added, in the precision of sums (fp32,
fp64 for fp64), where it matters for logits far from zero only.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from selfsup.conformance.inputs import Inputs
from selfsup.conformance.oracle import Answer, plain, truth, visible

TENSORS = ("out", "lse", "dq", "dk", "dv", "dmask")


class Finding(NamedTuple):
    """What was seen of one tensor: right, or wrong and where."""

    tensor: str
    fault: str | None
    """None: right."""
    score: float
    """Largest error of the kernel over that of the plain run."""
    silent: bool = True
    """Wrong without a sign: False for NaN or infinity, which nobody takes for a result."""


class Expected(NamedTuple):
    """What a call must give, computed before the kernel has had the inputs in its hands."""

    right: Answer
    usual: Answer
    """The plain run."""
    dead: dict[str, Tensor]
    dtype: torch.dtype


def expectation(inputs: Inputs, gradients: bool = True) -> Expected:
    """The float64 loop, the plain run, and where zeros are exact."""
    right = truth(inputs, gradients)
    usual = right if min(inputs.q.numel(), inputs.k.numel()) == 0 else plain(inputs, gradients)
    return Expected(right, usual, _structural_zeros(inputs, right), inputs.q.dtype)


def judge(inputs: Inputs, answer: Answer) -> list[Finding]:
    """One finding for each tensor of an answer to inputs that are as they were."""
    gradients = any(x is not None for x in (answer.dq, answer.dk, answer.dv))
    return judged(expectation(inputs, gradients), answer)


def judged(expected: Expected, answer: Answer) -> list[Finding]:
    """The same with the expectation at hand."""
    findings = []
    for name in TENSORS:
        x, r, p = getattr(answer, name), getattr(expected.right, name), getattr(expected.usual, name)
        if r is None:
            if x is not None:
                findings.append(Finding(name, "came back, but was not asked for", 0.0))
            continue
        if x is None:
            findings.append(Finding(name, "did not come back", 0.0))
            continue
        findings.append(compare(name, x, r, p, expected.dtype, expected.right, expected.dead.get(name)))
    return findings


def judge_call(inputs: Inputs, call: Callable[[], Answer], gradients: bool = True) -> list[Finding]:
    """Calls the kernel and judges what comes back; what it was given must be as it was, bit for bit."""
    expected = expectation(inputs, gradients)
    given = {n: getattr(inputs, n) for n in ("q", "k", "v", "grad_out", "grad_lse")}
    given |= {n: x for n, x in inputs.options.items() if isinstance(x, Tensor)}
    before = {n: x.detach().clone() for n, x in given.items() if x is not None}
    findings = judged(expected, call())
    changed = [n for n, x in before.items() if not torch.equal(x, given[n])]
    return [*findings, Finding(", ".join(changed), "written to", 0.0)] if changed else findings


def compare(
    name: str,
    x: Tensor,
    r: Tensor,
    p: Tensor,
    dtype: torch.dtype,
    right: Answer,
    dead: Tensor | None = None,
) -> Finding:
    """The rule for one tensor. dtype: the kernel's precision; right: the whole answer that r belongs to;
    dead: True where r is zero by structure."""
    if x.shape != r.shape:
        return Finding(name, f"shape {tuple(x.shape)}, expected {tuple(r.shape)}", 0.0)
    if name == "lse":  # one number a row
        x, r, p = x[..., None], r[..., None], p[..., None]
        if x.dtype not in (torch.promote_types(dtype, torch.float32), torch.float64):
            return Finding(name, f"dtype {x.dtype}, expected fp32 (fp64 for fp64)", 0.0)
    elif x.dtype != dtype:
        return Finding(name, f"dtype {x.dtype}, expected {dtype}", 0.0)
    if r.numel() == 0:
        return Finding(name, None, 0.0)
    x, p = x.detach().cpu().double(), p.detach().cpu().double()
    finite = r.isfinite()
    if not torch.equal(x[~finite], r[~finite]):
        at = tuple(((x != r) & ~finite).nonzero()[0].tolist())
        return Finding(name, f"{float(x[at]):g} at {at}, expected {float(r[at]):g}", 0.0, not x[at].isnan())
    if not x[finite].isfinite().all():
        at = tuple((finite & ~x.isfinite()).nonzero()[0].tolist())
        return Finding(name, f"{float(x[at]):g} at {at}, expected {float(r[at]):.4g}{_where(at)}", 0.0, False)
    if dead is not None and (x[dead.expand_as(x)] != 0).any():
        at = tuple((dead.expand_as(x) & (x != 0)).nonzero()[0].tolist())
        return Finding(name, f"{float(x[at]):g} at {at}, expected an exact zero{_where(at)}", 0.0)
    x, r, p = (torch.where(finite, t, 0.0) for t in (x, r, p))
    error, usual = (x - r).abs(), torch.nan_to_num((p - r).abs(), nan=0.0)
    # A row of few numbers can be right by luck in the plain run: its usual error is at least the tensor's median.
    usual = usual.amax(-1, keepdim=True)
    usual = usual.maximum(usual.flatten().median())
    eps = torch.finfo(dtype if name != "lse" else p.dtype if dtype == torch.float64 else torch.float32).eps
    noise = r.abs().mean()
    limit = 2 * usual + 4 * eps * (r.abs().amax(-1, keepdim=True) + noise)
    if name in right.terms:
        limit = limit + 2 * eps * right.terms[name].amax(-1, keepdim=True)
        noise = noise + right.terms[name].mean()
    if name in right.by_logits:
        wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        limit = limit + 2 * wide * right.by_logits[name].amax(-1, keepdim=True)
    score = float(error.max()) / max(float(usual.max()), eps * float(noise), 1e-300)
    over = error - limit
    if not (over > 0).any():
        return Finding(name, None, score)
    at = tuple((over == over.max()).nonzero()[0].tolist())
    rows = (over > 0).any(-1)
    return Finding(
        name,
        f"{float(x[at]):.6g} at {at}, expected {float(r[at]):.6g}: error {float(error[at]):.2g}, limit "
        f"{float(limit[(*at[:-1], 0)]):.2g}; {int(rows.sum())} of {rows.numel()} rows wrong{_where(at)}",
        score,
    )


def _where(at: tuple[int, ...]) -> str:
    """In which tile, for the usual sizes of tiles, a row lies."""
    if len(at) < 4:
        return ""
    tiles = ", ".join(f"{at[2] // n} of {n}" for n in (16, 64, 128))
    return f"; row {at[2]} lies in tile {tiles}"


def _structural_zeros(inputs: Inputs, right: Answer) -> dict[str, Tensor]:
    """Where zeros are exact: rows of queries that see no key, of keys that no query sees, masked scores."""
    seen = visible(inputs)
    b, hk, keys = inputs.k.shape[:3]
    no_key = ~seen.any(-1, keepdim=True)  # (b, h, l, 1)
    unseen = ~seen.any(-2).reshape(b, hk, -1, keys).any(2)[..., None] if seen.numel() else None
    zeros = {"out": no_key, "dq": no_key}
    if unseen is not None:
        zeros |= {"dk": unseen, "dv": unseen}
    if right.dmask is not None and right.dmask.shape == seen.shape:
        zeros["dmask"] = ~seen
    return zeros
