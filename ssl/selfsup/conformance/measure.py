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
from torch import Generator, Tensor

from selfsup.conformance.claims import Kernel, KernelRaised, Target, read
from selfsup.conformance.expectations import peak_memory
from selfsup.conformance.inputs import DTYPES, InputRecipe, Inputs, Shape
from selfsup.conformance.judge import Finding, expectation, judged
from selfsup.conformance.oracle import Answer

ROWS_CHECKED = 8
SCORES_KEPT = 6
"""fp32 matrices of (l, s) that plain attention may hold at its peak: scores, weights, gradients, copies."""
PEAK_SECONDS, EXIT_SECONDS = 1800, 10
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

    def generator(self, turn: int) -> Generator:
        """Of the numbers of one round, the same for all kernels."""
        seed = np.random.SeedSequence((self.seed, turn)).generate_state(1)[0]
        return Generator(self.device).manual_seed(int(seed))


def redraw(inputs: Inputs, generator: Generator) -> None:
    """Fresh normal numbers in the very tensors of a call; by their places, not by how they lie in memory."""
    for old in (*inputs[:3], inputs.grad_out):
        wide = torch.promote_types(old.dtype, torch.float32)
        old.detach().copy_(torch.randn(old.shape, generator=generator, dtype=wide, device=old.device))


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


def time_round(
    kernel: Kernel, inputs: Inputs, clock: Clock, backward: bool, calls: int, draws: Generator
) -> tuple[list[float], Answer]:
    """Median seconds of several forward and backward passes, NaN where not wanted, and the last answer.

    Each call has numbers of its own, drawn beforehand: who remembers results by their inputs gains nothing.
    Each graph is walked once: nothing is retained, and no gradient is added to an old one.
    """
    seconds = []
    for _ in range(calls):
        out = answer = grads = None  # the memory is free for the next call
        redraw(inputs, draws)
        leaves = [x.detach().requires_grad_(backward) for x in inputs[:3]]
        with torch.set_grad_enabled(backward):
            result, forward = clock.time(lambda x=leaves: kernel.raw(*x, inputs.options))
        out, after, grads = read(result, False)[0], float("nan"), ()
        if backward:
            grads, after = clock.time(lambda o=out, x=leaves: torch.autograd.grad(o, x, inputs.grad_out))
        answer, result = Answer(out.detach(), None, *grads), None
        seconds.append((forward, after))
    return np.median(seconds, axis=0).tolist(), answer


def calls_a_round(kernel: Kernel, inputs: Inputs, clock: Clock, backward: bool, draws: Generator) -> int:
    """How many calls fill ROUND_SECONDS; from a second call, as the first warms up."""
    times = [time_round(kernel, inputs, clock, backward, 1, draws)[0] for _ in range(2)]
    return int(np.clip(ROUND_SECONDS / max(np.nansum(times[1]), 1e-9), 1, 100))


def check_rows(
    setting: Setting, kernel: Kernel, inputs: Inputs, gradients: bool
) -> tuple[float, list[Finding]]:
    """One call on the timed shape: its seconds, and findings on a few rows.

    Only these rows get a gradient back, so that they alone make up dk and dv, and all else has to be zero.
    Raises KernelRaised.
    """
    chosen = torch.zeros(*inputs.grad_out.shape[:3], 1, dtype=torch.bool, device=setting.device)
    chosen[_some_rows(setting)] = True
    sparse = inputs._replace(grad_out=inputs.grad_out * chosen)
    answer, seconds = Clock(setting.device).time(lambda: kernel.answer(sparse, gradients))
    findings = judge_rows(setting, inputs, answer, ("dq", "dk", "dv") if gradients else ())
    used = chosen.any(2, keepdim=True)
    for name, where in (("dq", chosen), ("dk", used), ("dv", used)):
        x = getattr(answer, name)
        if x is not None and (x.masked_fill(where, 0) != 0).any():
            findings.append(Finding(name, "not zero where no gradient came in", 0.0))
    return seconds, findings


def judge_rows(setting: Setting, inputs: Inputs, answer: Answer, grads: tuple[str, ...]) -> list[Finding]:
    """The output and some gradients on a few rows that the float64 loop can afford.

    A row of dq needs no other row's gradient; dk and dv do, and are judged as if no other row had one.
    """
    if answer.out.shape != inputs.grad_out.shape:
        got = f"shape {tuple(answer.out.shape)}, expected {tuple(inputs.grad_out.shape)}"
        return [Finding("out", got, 0.0)]
    batch, heads, rows = at = _some_rows(setting)
    whole = batch[:, :, 0], heads[:, 0]
    kept = zip((*inputs[:3], inputs.grad_out), (at, whole, whole, at))
    q, k, v, grad_out = (x.detach()[i] for x, i in kept)
    causal = torch.arange(setting.shape.s, device=rows.device) <= rows[:, None]
    cut = Inputs(q, k, v, {"attn_mask": causal} if setting.causal else {}, grad_out, None)
    expected = expectation(cut, bool(grads))
    unasked = dict.fromkeys({"dq", "dk", "dv"} - set(grads))
    given = {n: x[at if n == "dq" else whole] for n in grads if (x := getattr(answer, n)) is not None}
    right = expected.right._replace(**unasked)
    findings = judged(expected._replace(right=right), Answer(answer.out.detach()[at], **given))
    places = [x.flatten().tolist() for x in (rows, batch, heads)]
    where = " (of a cut: queries {}, entries {}, heads {})".format(*places)
    return [f._replace(fault=f.fault and f.fault + where) for f in findings]


def _some_rows(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Batch entries, heads and queries, the outermost among them, as an index of (b, h, l, d)."""
    b, h, _, length, *_ = setting.shape
    some = np.random.default_rng(setting.seed).choice(length, min(length, ROWS_CHECKED - 2), replace=False)
    indices = np.unique([0, b - 1]), np.unique([0, h - 1]), np.union1d(some, [0, length - 1])
    batch, heads, rows = (torch.from_numpy(x).to(setting.device) for x in indices)
    return batch[:, None, None], heads[:, None], rows


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
        process.join(EXIT_SECONDS)  # killed at once it would leave a compiler's semaphores behind
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
