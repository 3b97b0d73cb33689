"""One case on one kernel: the verdict, and for a wrong answer the smallest call that is still wrong."""

import math
import time
import warnings
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from selfsup.attention.dispatch import KERNELS
from selfsup.conformance.cases import Case, Level, cases
from selfsup.conformance.claims import FEATURES, NEEDS_CLAIM, Claims, Kernel, KernelRaised, Target
from selfsup.conformance.expectations import NotApplicable, forward, gradients
from selfsup.conformance.inputs import InputRecipe, Inputs, Shape
from selfsup.conformance.judge import compare
from selfsup.conformance.oracle import truth

Verdict = Literal["PASS", "FAIL", "REFUSED", "WRONG-SILENT", "CRASH", "TIMEOUT"]
BAD: tuple[Verdict, ...] = ("FAIL", "WRONG-SILENT", "CRASH", "TIMEOUT")

INTERPRETED_COST = 24_000
"""Scores from which a case is left out under Triton's interpreter, which takes 10 to 25 ms a tile."""
SHRINKING_SECONDS = 10.0
PLAIN_LENGTH = 128
"""Queries and keys of the first call, a multiple of what kernels usually ask for."""
WIDTHS = (16, 64, 32, 128, 8, 96, 256)
"""Of q, k and v, to be tried in this order."""


class Result(NamedTuple):
    """What came of a case."""

    id: str
    verdict: Verdict
    detail: str = ""
    error_ratio: float | None = None
    """Largest error over that of a plain run in the same precision."""
    reproducer: str | None = None
    cites: str = ""
    seconds: float = 0.0
    requires: list[str] = []


class Base(NamedTuple):
    """What the cases that are about no dtype and no width are run with: the first that the kernel takes."""

    dtype: str
    width: int


def prepare(target: Target, device: str) -> tuple[Kernel, Base]:
    """Loads a kernel and finds the dtype and the width that most cases run with.

    Of a kernel that declares nothing, what it accepts is what it claims, and where l != s its is_causal is
    tried. Raises ValueError where it cannot be found, or refuses a plain call in every dtype and width.
    """
    kernel, errors = target.load(), []
    declared = kernel.claims
    if declared is None:
        kernel = replace(kernel, claims=Claims(frozenset(FEATURES) - NEEDS_CLAIM, declared=False))
    for base in (Base(dtype, d) for dtype in ("fp32", "fp16", "bf16") for d in WIDTHS):
        shape = Shape(l=PLAIN_LENGTH, s=PLAIN_LENGTH, d=base.width, dv=base.width)
        if not kernel.claims.cover({base.dtype}, shape):
            continue
        try:
            kernel.answer(InputRecipe(shape, base.dtype)(0, device), gradients=False)
        except KernelRaised as error:
            errors.append(f"{base.dtype}, width {base.width}: {error}")
            continue
        return (kernel if declared is not None else _found(kernel, base, device)), base
    reasons = errors[0] if errors else f"it claims no width of {WIDTHS} in fp32, fp16 or bf16"
    raise ValueError(f"{target.name}: a plain call on {device} raises: {reasons}")


def _found(kernel: Kernel, base: Base, device: str) -> Kernel:
    """The kernel with what is found by trying: which lengths it takes, and how its is_causal is aligned."""

    def tried(rows: int, keys: int, **options: object) -> tuple[Inputs, Tensor] | None:
        shape = Shape(l=rows, s=keys, d=base.width, dv=base.width)
        inputs = InputRecipe(shape, base.dtype, options=options)(0, device)
        try:
            return inputs, kernel.answer(inputs, gradients=False).out
        except KernelRaised:
            return None

    multiple = next((n for n, length in ((1, 33), (16, 48), (32, 96), (64, 64)) if tried(length, length)), PLAIN_LENGTH)
    kernel = replace(kernel, claims=replace(kernel.claims, length_multiple=multiple))
    if (found := tried(5 * multiple, 9 * multiple, is_causal=True)) is None:
        return kernel
    inputs, out = found
    right = truth(inputs._replace(options={"is_causal": True, "causal_align": "bottom_right"}), gradients=False)
    fits = compare("out", out, right.out, right.out, inputs.q.dtype, right).fault is None
    return replace(kernel, causal_align="bottom_right") if fits else kernel


def select(kernel: Kernel, level: Level, base: Base, interpret: bool) -> tuple[list[Case], int]:
    """The cases to run, those without a dtype or width of their own in `base`'s; and how many are left out
    as too large for the interpreter. What is tried only where claimed, and is not, is no case."""
    chosen, seen = [], set()
    for case in cases(level):
        if case.requires & NEEDS_CLAIM and not case.requires & NEEDS_CLAIM <= kernel.claims.features:
            continue
        if kernel.layout == "THD" and case.id.startswith("documents/returning"):
            continue  # packed segments are runs: it cannot be said there
        case = _rebased(case, base, kernel.claims.length_multiple)
        if case.id not in seen:
            seen.add(case.id)
            chosen.append(case)
    kept = [c for c in chosen if not interpret or c.cost <= INTERPRETED_COST]
    return kept, len(chosen) - len(kept)


def _rebased(case: Case, base: Base, multiple: int) -> Case:
    """The case with `base` for fp32 and for a width of 16, the suite's own choice, and with lengths that the
    kernel takes; widths and lengths that are what a case is about stay."""
    if base.dtype != "fp32" and case.make_inputs.dtype == "fp32":
        recipe, needs = replace(case.make_inputs, dtype=base.dtype), case.requires - {"fp32"} | {base.dtype}
        case = replace(case, id=case.id.replace("fp32", base.dtype), make_inputs=recipe, requires=needs)
    shape = case.make_inputs.shape
    if case.group != "width" and (shape.d, shape.dv) in ((16, 16), (8, 8), (4, 4), (32, 32)) and base.width != 16:
        shape = shape._replace(d=base.width, dv=base.width)
    if multiple > 1 and case.group not in ("tail", "empty"):
        shape = shape._replace(l=-(-shape.l // multiple) * multiple, s=-(-shape.s // multiple) * multiple)
    return case if shape == case.make_inputs.shape else replace(case, make_inputs=case.make_inputs.at(shape))


def run_case(kernel: Kernel, case: Case, seed: int, device: str, shrinking: bool = True) -> Result:
    """Runs one case. Whatever the kernel raises is a verdict."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = _verdict(kernel, case, seed, device)
        if shrinking and result.verdict in ("FAIL", "WRONG-SILENT"):
            shape = case.make_inputs.shape
            if case.expected in (forward, gradients):  # others make shapes of their own
                shape, result = shrink(kernel, case, seed, device, result)
            result = result._replace(reproducer=reproducer(kernel, case, shape, seed, device))
    return result._replace(seconds=time.perf_counter() - began)


def _verdict(kernel: Kernel, case: Case, seed: int, device: str) -> Result:
    claims, shape = kernel.claims, case.make_inputs.shape
    claimed = claims.cover(case.requires, shape)

    def result(verdict: Verdict, detail: str = "", ratio: float | None = None) -> Result:
        return Result(case.id, verdict, detail, ratio, cites=case.cites, requires=sorted(case.requires))

    try:
        findings = case.expected(kernel, case.make_inputs, seed, device)
    except NotApplicable as reason:
        return result("REFUSED", str(reason))
    except KernelRaised as error:
        if "CUDA error" in str(error):  # the device is lost to this process
            return result("CRASH", str(error))
        return result("FAIL" if claims.declared and claimed else "REFUSED", str(error))
    except Exception as error:  # what came back was nothing that can be judged
        return result("FAIL", f"cannot be judged: {type(error).__name__}: {str(error)[:300]}")
    ratio = max((f.score for f in findings if math.isfinite(f.score)), default=None)
    bad = [f for f in findings if f.fault]
    if not bad:
        return result("PASS", ratio=ratio)
    detail = "; ".join(f"{f.tensor}: {f.fault}" for f in bad)
    if claimed:
        return result("FAIL", detail, ratio)
    if not any(f.silent for f in bad):
        return result("REFUSED", f"not claimed, and not silent: {detail}", ratio)
    return result("WRONG-SILENT", f"not claimed, yet: {detail}", ratio)


def shrink(kernel: Kernel, case: Case, seed: int, device: str, result: Result) -> tuple[Shape, Result]:
    """The smallest shape that still gives the verdict, by halves and single steps, within 10 seconds."""
    shape, deadline = case.make_inputs.shape, time.perf_counter() + SHRINKING_SECONDS
    found = True
    while found:
        found = False
        for smaller in _smaller(shape):
            if time.perf_counter() > deadline:
                return shape, result
            attempt = replace(case, make_inputs=case.make_inputs.at(smaller))
            other = _verdict(kernel, attempt, seed, device)
            if "cannot be judged" in other.detail:  # the case cannot be made so small
                continue
            if other.verdict == result.verdict and (other.error_ratio is None) == (result.error_ratio is None):
                shape, result, found = smaller, other, True
                break
    return shape, result


def _smaller(shape: Shape) -> list[Shape]:
    """Shapes a step below, the boldest first; l and s together where they are equal, then apart."""
    found = []

    def add(**sizes: int) -> None:
        smaller = shape._replace(**sizes)
        if smaller != shape and min(smaller) >= min(1, *shape):
            found.append(smaller)

    add(b=1)
    add(h=max(1, shape.h // max(1, shape.hk)), hk=1)
    for step in (lambda n: 1, lambda n: n // 2, lambda n: n - 1):
        if shape.l == shape.s:
            add(l=max(1, step(shape.l)), s=max(1, step(shape.s)))
        add(l=max(1, step(shape.l)))
        add(s=max(1, step(shape.s)))
        if shape.d == shape.dv:
            add(d=max(1, step(shape.d)), dv=max(1, step(shape.d)))
        else:
            add(d=max(1, step(shape.d)))
            add(dv=max(1, step(shape.dv)))
    return found


def reproducer(kernel: Kernel, case: Case, shape: Shape, seed: int, device: str) -> str:
    options = "" if device == "cpu" else f", device={device!r}"
    if kernel.layout != "BHLD":
        options += f", layout={kernel.layout!r}"
    if kernel.claims.declared and kernel.name not in KERNELS and not hasattr(kernel.call, "attention_claims"):
        options += f", features={sorted(kernel.claims.features)!r}"  # they came from the command line
    return (
        "from selfsup.conformance.run import reproduce\n"
        f"shape = {tuple(shape)}  # b, h, hk, l, s, d, dv\n"
        f"print(reproduce({kernel.name!r}, {case.id!r}, shape, seed={seed}{options}))"
    )


def reproduce(
    target: str,
    case_id: str,
    shape: tuple[int, ...],
    seed: int = 0,
    device: str = "cpu",
    layout: Any = None,
    features: list[str] | None = None,
) -> Result:
    """One case at one shape, as a failure's reproducer calls it. Raises ValueError for an unknown case."""
    kernel, base = prepare(Target(target, layout, None if features is None else tuple(features)), device)
    for case in select(kernel, "full", base, interpret=False)[0]:
        if case.id == case_id:
            torch.manual_seed(seed)
            return _verdict(kernel, replace(case, make_inputs=case.make_inputs.at(Shape(*shape))), seed, device)
    raise ValueError(f"case: expected one of the suite's, got {case_id!r}")
