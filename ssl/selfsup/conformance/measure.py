"""The benchmark's instruments: the work that a call has to do, a clock, checks that the timed call is right,
peak and free memory. FLOPs are those of the allowed pairs only.
"""

import ctypes
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfsup.conformance.claims import Kernel, KernelRaised, Target
from selfsup.conformance.expectations import peak_memory
from selfsup.conformance.inputs import DTYPES, InputRecipe, Inputs, Shape
from selfsup.conformance.judge import Finding, judge
from selfsup.conformance.oracle import Answer

ORACLE_SECONDS = 1.0
"""What the float64 loop may take for the dense check; twice that on a busy machine."""
ROWS_CHECKED = 8
SCORES_KEPT = 6
"""fp32 matrices of (l, s) that plain attention may hold at its peak: scores, weights, gradients, copies."""
PEAK_SECONDS = 1800
ROUND_SECONDS = 0.02
"""A short call is repeated within a round for about so long; the round counts with its median."""
FLUSH_BYTES = 256 << 20
BACKWARD = 2.5
"""FLOPs of the backward pass over those of the forward pass: five products for two."""


class Work(NamedTuple):
    """The least that one pass has to do."""

    flops: float
    bytes: float
    exps: float

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flops / self.bytes


def allowed_pairs(length: int, keys: int, causal: bool) -> int:
    """Pairs of a query and a key it may see; causal as in torch, aligned at the top left."""
    if not causal:
        return length * keys
    short = min(length, keys)
    return short * (short + 1) // 2 + max(0, length - keys) * keys


def work(shape: Shape, dtype: str, causal: bool) -> dict[str, Work]:
    """FLOPs, bytes and exponentials of both passes.

    Forward reads q, k, v and writes the output and the log-sum-exp (fp32; fp64 for fp64); backward reads
    these five and the output's gradient, and writes dq, dk, dv.
    """
    b, h, hk, length, keys, d, dv = shape
    wide = torch.promote_types(DTYPES[dtype], torch.float32)
    size, lse = DTYPES[dtype].itemsize, wide.itemsize * b * h * length
    q, k, v, out = b * h * length * d, b * hk * keys * d, b * hk * keys * dv, b * h * length * dv
    pairs = b * h * allowed_pairs(length, keys, causal)
    flops = 2.0 * pairs * (d + dv)
    return {
        "forward": Work(flops, size * (q + k + v + out) + lse, pairs),
        "backward": Work(BACKWARD * flops, size * (2 * (q + k + v) + 2 * out) + lse, pairs),
    }


class Setting(NamedTuple):
    """One shape in one dtype, on which all kernels meet."""

    shape: Shape
    dtype: str
    causal: bool = False
    device: str = "cpu"
    seed: int = 0

    def recipe(self, kernel: Kernel) -> InputRecipe:
        """Normal numbers, lying in memory as the kernel likes them."""
        options = {"is_causal": True} if self.causal else {}
        layouts = ("contiguous", "contiguous") if kernel.layout == "BHLD" else ("blhd", "transposed")
        return InputRecipe(self.shape, self.dtype, options=options, layout=layouts[0], grad_layout=layouts[1])

    def inputs(self, kernel: Kernel, more: int = 0) -> Inputs:
        """Drawn from the seed plus `more`."""
        return self.recipe(kernel)(self.seed + more, self.device)


class Clock:
    """Seconds that a call takes on a device."""

    def __init__(self, device: str, flush: bool = False) -> None:
        """flush: on CUDA, overwrite the L2 cache before each call."""
        self.cuda, self.buffer = device == "cuda", None
        if self.cuda:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if flush:
                cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
                self.buffer = torch.empty(max(FLUSH_BYTES, 2 * cache), dtype=torch.int8, device="cuda")

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """The call's result and its seconds."""
        if not self.cuda:
            start = time.perf_counter()
            result = call()
            return result, time.perf_counter() - start
        if self.buffer is not None:
            self.buffer.zero_()  # the device is busy meanwhile, so that what the host does is not timed
        self.start.record()
        result = call()
        self.end.record()
        self.end.synchronize()
        start = time.perf_counter()
        torch.cuda.synchronize()
        stray = time.perf_counter() - start  # work on streams that the events do not see
        return result, self.start.elapsed_time(self.end) / 1e3 + (stray if stray > 1e-4 else 0.0)


def time_pass(kernel: Kernel, inputs: Inputs, clock: Clock, backward: bool) -> tuple[float, float]:
    """Seconds of a forward pass and of the backward pass of its graph: NaN where that is not wanted.

    Each graph is walked once: nothing is retained, and no gradient is added to an old one.
    """
    leaves = [x.detach().requires_grad_(backward) for x in inputs[:3]]
    with torch.set_grad_enabled(backward):
        out, forward = clock.time(lambda: kernel.raw(*leaves, inputs.options))
    if not backward:
        return forward, float("nan")
    return forward, clock.time(lambda: torch.autograd.grad(out, leaves, inputs.grad_out))[1]


def time_round(kernel: Kernel, inputs: Inputs, clock: Clock, backward: bool, calls: int) -> list[float]:
    """The medians of several calls, forward and backward."""
    return np.median([time_pass(kernel, inputs, clock, backward) for _ in range(calls)], axis=0).tolist()


def calls_a_round(kernel: Kernel, inputs: Inputs, clock: Clock, backward: bool) -> int:
    """How many calls fill ROUND_SECONDS; from a second call, as the first warms up."""
    time_pass(kernel, inputs, clock, backward)
    once = np.nansum(time_pass(kernel, inputs, clock, backward))
    return int(np.clip(ROUND_SECONDS / max(once, 1e-9), 1, 100))


def affordable(shape: Shape) -> Shape:
    """The shape, or a smaller one of its kind: fewer entries and heads, then a length less by whole 64s."""

    def seconds(s: Shape) -> float:  # measured: a query costs 0.1 ms, and 7 ns for each number of k
        return s.b * s.h * s.l * (1e-4 + s.s * s.d * 7e-9)

    for b, h in ((shape.b, shape.h), (2, 2), (1, 2), (1, 1)):
        smaller = shape._replace(b=min(b, shape.b), h=min(h, shape.h), hk=min(h, shape.hk))
        if seconds(smaller) <= ORACLE_SECONDS:
            return smaller
    while seconds(smaller) > ORACLE_SECONDS and smaller.l > 64:
        smaller = smaller._replace(l=smaller.l - 64, s=smaller.s - 64)
    return smaller


def check_dense(setting: Setting, kernel: Kernel, gradients: bool) -> list[Finding]:
    """Every number, on fresh inputs of the largest shape that is affordable. Raises KernelRaised."""
    small = setting._replace(shape=affordable(setting.shape)).inputs(kernel, more=1)
    return judge(small, kernel.answer(small, gradients))


def check_rows(
    setting: Setting, kernel: Kernel, inputs: Inputs, gradients: bool
) -> tuple[float, list[Finding]]:
    """One call on the timed shape: its seconds, and findings on a few rows that the float64 loop can afford.

    Only these rows get a gradient back, so that they alone make up dk and dv, and all else has to be zero.
    Raises KernelRaised.
    """
    b, h, _, length, keys, *_ = setting.shape
    some = np.random.default_rng(setting.seed).choice(length, min(length, ROWS_CHECKED - 2), replace=False)
    indices = np.unique([0, b - 1]), np.unique([0, h - 1]), np.union1d(some, [0, length - 1])
    batch, heads, rows = (torch.from_numpy(x).to(setting.device) for x in indices)
    at = batch[:, None, None], heads[:, None], rows
    chosen = torch.zeros(b, h, length, 1, dtype=torch.bool, device=setting.device)
    chosen[at] = True
    sparse = inputs._replace(grad_out=inputs.grad_out * chosen)
    answer, seconds = Clock(setting.device).time(lambda: kernel.answer(sparse, gradients))
    if answer.out.shape != inputs.grad_out.shape:
        got = f"shape {tuple(answer.out.shape)}, expected {tuple(inputs.grad_out.shape)}"
        return seconds, [Finding("out", got, 0.0)]

    def whole_heads(x: Tensor) -> Tensor:
        return x.detach()[batch[:, None], heads]

    options = {"attn_mask": torch.arange(keys, device=rows.device) <= rows[:, None]} if setting.causal else {}
    q, out, grad_out = (x.detach()[at] for x in (inputs.q, answer.out, inputs.grad_out))
    cut = Inputs(q, whole_heads(inputs.k), whole_heads(inputs.v), options, grad_out, None)
    given = [None] * 3
    if gradients:
        given = [answer.dq[at], whole_heads(answer.dk), whole_heads(answer.dv)]
    where = f" (of a cut: queries {rows.tolist()}, entries {batch.tolist()}, heads {heads.tolist()})"
    findings = [f._replace(fault=f.fault and f.fault + where) for f in judge(cut, Answer(out, None, *given))]
    if not gradients:
        return seconds, findings
    used = chosen.any(2, keepdim=True)
    for name, where in (("dq", chosen), ("dk", used), ("dv", used)):
        if (getattr(answer, name).masked_fill(where, 0) != 0).any():
            findings.append(Finding(name, "not zero where no gradient came in", 0.0))
    return seconds, findings


def memory_refusal(setting: Setting, kernel: Kernel, target: Target) -> str | None:
    """Why a shape would not fit, for a kernel that keeps matrices of (l, s); None where it fits."""
    if kernel.claims is not None and "linear_memory" in kernel.claims.features:
        return None
    b, h, _, length, keys, d, dv = setting.shape
    need, free = SCORES_KEPT * b * h * length * keys * 4, free_memory(setting.device)
    if need <= free:
        return None
    # Without the claim it may be linear all the same, as torch's kernels mostly are: a shorter row tells.
    side = 4096
    peak = peak_bytes(setting._replace(shape=Shape(1, 1, 1, side, side, d, dv)), kernel, target)
    if peak is not None and peak < side * side * DTYPES[setting.dtype].itemsize / 2:
        return None
    return (
        f"refused: keeps (l, s) matrices, about {need / 1e9:.2f} GB if {SCORES_KEPT} in fp32; "
        f"{free / 1e9:.2f} GB are free"
    )


def free_memory(device: str) -> int:
    """Bytes that can be had; within a container, what its limit leaves."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        free = int(re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)[1]) << 10
    except (OSError, TypeError):
        return 8 << 30  # another system: a guess
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no group, or "max"
        return free
    return min(free, limit)


def peak_bytes(setting: Setting, kernel: Kernel, target: Target) -> int | None:
    """At the peak of both passes, or of the forward if that is all, beyond the inputs; None: unknown."""
    if setting.device == "cuda":
        inputs = setting.inputs(kernel)
        return peak_memory(lambda: _answer(kernel, inputs), "cuda")
    if not sys.platform.startswith("linux"):
        return None
    # A fresh process: what this one has freed would be used again, unseen. The server imports torch once and
    # is forked before any thread runs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_peak_child, args=(theirs, setting, target), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(PEAK_SECONDS) else None
    except EOFError:  # it died
        return None
    finally:
        process.kill()
        process.join()


def _peak_child(pipe: Connection, setting: Setting, target: Target) -> None:
    """Sends the peak bytes of the second call, or None where the kernel raises."""
    if hasattr(ctypes.CDLL(None), "mallopt"):  # glibc: each block from the kernel, and back when freed
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD of <malloc.h>
    torch.set_num_threads(1)
    kernel = target.load()
    inputs = setting.inputs(kernel)
    try:
        _answer(kernel, inputs)  # compiles, and loads what is loaded once
        pipe.send(peak_memory(lambda: _answer(kernel, inputs), "cpu"))
    except (KernelRaised, OSError):
        pipe.send(None)


def _answer(kernel: Kernel, inputs: Inputs) -> Answer:
    """With gradients where the kernel has them. Raises KernelRaised."""
    try:
        return kernel.answer(inputs)
    except KernelRaised:
        return kernel.answer(inputs, gradients=False)
