"""What a benchmark shows: each pass beside what the machine can do, as a table and a picture.

Three ceilings bound attention: matrix products, memory, and exponentials, one a pair. At d = 64 an H100
takes as long for the exponentials as for the products (FlashAttention-3).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfsup.conformance.inputs import DTYPES, Shape
from selfsup.conformance.measure import Clock, Work

PASSES = ("forward", "backward")
LARGE = 256 << 20
"""Bytes of a tensor that no cache holds."""
CHAIN = 64
SLACK = 1.1
"""A speed above so many times a measured ceiling is doubtful."""


@dataclass
class Pass:
    """Forward or backward of one kernel on one shape."""

    work: Work
    fault: str | None = None
    """Why there is no speed: wrong: ..., or refused: ..."""
    seconds: list[float] = field(default_factory=list)
    """One for each round."""
    ratios: list[float] = field(default_factory=list)
    """Round by round, how many times as fast as the first of --against."""

    @property
    def speed(self) -> float:
        """FLOP/s at the median."""
        return self.work.flops / spread(self.seconds)[1]


@dataclass
class Row:
    """One kernel on one shape in one dtype."""

    kernel: str
    dtype: str
    shape: Shape
    passes: dict[str, Pass]
    first_call: float | None = None
    """Seconds of the first call of this shape, both passes, with compiling and tuning."""
    peak_bytes: int | None = None
    """Of both passes, beyond the inputs; None: unknown."""
    dense_shape: Shape | None = None
    """Where every number was checked; on the timed shape it was a few rows."""

    def fail(self, fault: str, *passes: str) -> None:
        """No speed, and why; for both passes unless some are named. The first reason stays."""
        for name in passes or PASSES:
            self.passes[name].fault = self.passes[name].fault or fault
            self.passes[name].seconds.clear()

    @property
    def runs(self) -> bool:
        return self.passes["forward"].fault is None


class Ceilings(NamedTuple):
    """What the machine was seen to do in this run, the best of several tries."""

    matmul: float
    """FLOP/s of a square matrix product."""
    matmul_size: int
    bandwidth: float
    """Bytes/s of a copy of a large tensor, read and written."""
    exps: float
    """torch.exp in fp32, numbers a second."""
    exps_how: str
    matmul_note: str = ""

    def seconds(self, task: Work) -> float:
        """The least time by the nearest ceiling."""
        return self._nearest(task)[0]

    def excess(self, one: Pass) -> str | None:
        """What is doubtful about a median far above the nearest ceiling; None where it is not."""
        least, name = self._nearest(one.work)
        share = least / spread(one.seconds)[1] if one.seconds else 0.0
        return f"over the ceiling: {share:.3g} times the measured rate of {name}" if share > SLACK else None

    def _nearest(self, task: Work) -> tuple[float, str]:
        bounds = (task.flops / self.matmul, "products"), (task.bytes / self.bandwidth, "a large copy")
        return max(*bounds, (task.exps / self.exps, "exponentials"))


def measure_ceilings(dtypes: Iterable[str], device: str) -> dict[str, Ceilings]:
    """For each dtype, on the threads that torch is set to. Takes a few seconds."""
    clock = Clock(device)
    big = torch.ones(LARGE // 4, device=device)
    other = torch.empty_like(big)
    bandwidth = 2 * big.nbytes / _best(clock, lambda: other.copy_(big))
    exps, how = _exp_rate(clock, device, big, other)
    del big, other
    rates = {name: _matmul_rate(clock, name, device) for name in {*dtypes, "fp32"}}
    found = {}
    for name in dtypes:
        best, note = rates[name], ""
        if DTYPES[name].itemsize < 4 and best < rates["fp32"]:
            # A kernel may convert, as torch's own does on a CPU, and is then as fast as fp32.
            best, note = rates["fp32"], f"in fp32: {name} has {best[0] / 1e9:.3g} GFLOP/s only"
        found[name] = Ceilings(*best, bandwidth, exps, how, note)
    return found


def _best(clock: Clock, call: Callable[[], Any], tries: int = 6) -> float:
    """The least seconds; the first try warms up and does not count."""
    call()
    return min(clock.time(call)[1] for _ in range(tries))


def _matmul_rate(clock: Clock, dtype: str, device: str) -> tuple[float, int]:
    """The best FLOP/s of a square product, and its side."""
    best = (0.0, 0)
    for n in (512, 1024, 2048) if device == "cpu" else (2048, 4096, 8192):
        x, y = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
        seconds = _best(clock, lambda x=x, y=y: x @ y)
        best = max(best, (2.0 * n**3 / seconds, n))
        if seconds > 0.5:  # a dtype without fast products: a larger one will not be faster
            break
    return best


def _exp_rate(clock: Clock, device: str, big: Tensor, out: Tensor) -> tuple[float, str]:
    """Exponentials a second, and how it was measured.

    On CUDA torch.exp of a large tensor measures the memory: a chain of them in one kernel does not.
    """
    if device == "cuda":
        x = big[: 1 << 22]
        try:
            chain = torch.compile(_exp_chain)
            return CHAIN * x.numel() / _best(clock, lambda: chain(x)), f"{CHAIN} in a row, compiled"
        except Exception as error:
            how = f"torch.exp, bound by memory: no compiler ({type(error).__name__})"
            return big.numel() / _best(clock, lambda: torch.exp(big, out=out)), how
    rates = []
    for x, y in ((big[: 1 << 16], out[: 1 << 16]), (big, out)):  # in the cache, and not
        rates.append(x.numel() / _best(clock, lambda x=x, y=y: torch.exp(x, out=y)))
    return max(rates), "torch.exp"


def _exp_chain(x: Tensor) -> Tensor:
    for _ in range(CHAIN):
        x = torch.exp(-x)
    return x


def spread(values: list[float]) -> tuple[float, float, float] | None:
    """The 10% quantile, median and 90% quantile; None without values."""
    return tuple(float(x) for x in np.quantile(values, (0.1, 0.5, 0.9))) if values else None


def label(shape: Shape) -> str:
    """BxHxLxD."""
    return f"{shape.b}x{shape.h}x{shape.l}x{shape.d}"


def short(target: str) -> str:
    """A target without its folder."""
    return target.rsplit("/", 1)[-1]


def to_markdown(
    rows: list[Row], ceilings: Mapping[str, Ceilings], title: str, base: str | None, device: str
) -> str:
    """Title, ceilings and table."""
    unit, scale = ("TFLOP/s", 1e12) if device == "cuda" else ("GFLOP/s", 1e9)
    lines = [f"## {title}", ""]
    for dtype, c in ceilings.items():
        products = ", ".join(filter(None, (f"side {c.matmul_size}", c.matmul_note)))
        lines.append(
            f"- ceilings, {dtype}: products {c.matmul / scale:.4g} {unit} ({products}), copy "
            f"{c.bandwidth / 1e9:.3g} GB/s, exp {c.exps / 1e9:.3g} G/s ({c.exps_how})"
        )
    lines += [
        "- median (10% to 90%) over the rounds; roof: the least time by these ceilings over the time taken",
        "- over the ceiling: by over a tenth; a cache, a faster exp than torch's, or work that was skipped",
        "- first: seconds of the first call; peak: MiB of both passes beyond the inputs",
        "",
    ]
    ratio = f"times {base}" if base else "ratio"
    head = ["dtype", "BxHxLxD", "kernel"]
    for name in PASSES:
        head += [f"{name} ms", unit, "roof", ratio]
    table = [[*head, "first", "peak", "notes"]]
    for row in rows:
        cells = [row.dtype, label(row.shape), short(row.kernel)]
        for one in row.passes.values():
            cells += _cells(one, ceilings[row.dtype], scale)
        first = "" if row.first_call is None else f"{row.first_call:.3g}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
        faults = {one.fault: name for name, one in reversed(row.passes.items()) if one.fault}
        whole = len(faults) == 1 and not row.runs
        notes = [text if whole else f"{name} {text}" for text, name in faults.items()]
        excess = {name: ceilings[row.dtype].excess(one) for name, one in row.passes.items()}
        notes = "; ".join([*notes, *(f"{name} {text}" for name, text in excess.items() if text)])
        table.append([*cells, first, peak, " ".join(notes.split()).replace("|", "/")[:200]])
    widths = [max(len(cells[i]) for cells in table) for i in range(len(head) + 2)] + [7]
    table.insert(1, ["-" * width for width in widths])
    for cells in table:
        lines.append(f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths))} |")
    return "\n".join([*lines, ""])


def _cells(one: Pass, ceilings: Ceilings, scale: float) -> list[str]:
    """Milliseconds, speed, share of the roof, ratio."""
    if one.fault is not None:
        return [one.fault.split(":")[0], "", "", ""]
    low, middle, high = (1e3 * x for x in spread(one.seconds))
    times = f"{middle:.4g} ({low:.4g} to {high:.4g})"
    share = "over" if ceilings.excess(one) else f"{ceilings.seconds(one.work) * 1e3 / middle:.0%}"
    text = "{1:.2f} ({0:.2f} to {2:.2f})".format(*ratio) if (ratio := spread(one.ratios)) else ""
    return [times, f"{one.speed / scale:.4g}", share, text]


def draw(rows: list[Row], ceilings: Mapping[str, Ceilings], title: str, path: Path) -> None:
    """Writes the roofline as a PNG: a column for each dtype, forward above, backward below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, kernels = list(ceilings), list(dict.fromkeys(row.kernel for row in rows))
    figure = Figure(figsize=(7.5 * len(columns), 10), layout="constrained")
    FigureCanvasAgg(figure)  # and no pyplot: nothing global changes
    axes = figure.subplots(2, len(columns), squeeze=False)
    for i, name in enumerate(PASSES):
        for axis, dtype in zip(axes[i], columns):
            timed = [row for row in rows if row.dtype == dtype and row.passes[name].seconds]
            points = [(row.kernel, label(row.shape), row.passes[name]) for row in timed]
            axis.set(xscale="log", yscale="log", title=f"{name}, {dtype}", xlabel="intensity, FLOP/byte")
            _draw_points(axis, points, kernels)
            _draw_ceilings(axis, [one for *_, one in points], ceilings[dtype])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(kernels)), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _draw_points(axis: Any, points: list[tuple[str, str, Pass]], kernels: list[str]) -> None:
    """A point for each kernel and shape. Kernels on one shape share its intensity; its name is below them."""
    for i, kernel in enumerate(kernels):
        own = [one for name, _, one in points if name == kernel]
        xs, ys = [one.work.intensity for one in own], [one.speed for one in own]
        style = {"marker": "osD^vP*X"[i % 8], "color": f"C{i % 10}", "linestyle": ""}
        axis.plot(xs, ys, **style, markersize=7, alpha=0.85, label=short(kernel), zorder=3)
    columns: dict[float, list[tuple[str, Pass]]] = {}
    for _, shape, one in points:
        columns.setdefault(round(math.log10(one.work.intensity), 1), []).append((shape, one))
    for column in columns.values():
        lowest = min((one for _, one in column), key=lambda one: one.speed)
        names = "\n".join(dict.fromkeys(shape for shape, _ in column))
        at, text = (lowest.work.intensity, lowest.speed), {"textcoords": "offset points", "fontsize": 8}
        axis.annotate(names, at, (0, -9), ha="center", va="top", **text)


def _draw_ceilings(axis: Any, passes: list[Pass], ceilings: Ceilings) -> None:
    """The three lines, and bounds within which the points and the ridge lie."""
    axis.grid(True, which="major", alpha=0.25)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter(lambda y, _: f"{_si(y)}FLOP/s")
    axis.xaxis.set_minor_formatter("")
    axis.yaxis.set_minor_formatter("")
    flat = [(ceilings.matmul, "-", f"matrix products {_si(ceilings.matmul)}FLOP/s")]
    if passes:
        each = passes[0].work.flops / passes[0].work.exps
        flat.append((each * ceilings.exps, "--", f"exp {_si(ceilings.exps)}/s, {each:.0f} FLOP each"))
    xs = [ceilings.matmul / ceilings.bandwidth, *(one.work.intensity for one in passes)]
    left, right = min(xs) / 3, max(xs) * 3
    bottom = min([ceilings.bandwidth * left, *(one.speed / 3 for one in passes)])
    top = 2 * max([height for height, *_ in flat] + [one.speed for one in passes])
    axis.set(xlim=(left, right), ylim=(bottom, top))
    offset = {"textcoords": "offset points", "fontsize": 8}
    for height, style, text in flat:
        axis.axhline(height, color="0.25", linestyle=style, linewidth=1.2)
        above = not height < max(flat)[0] < 1.6 * height  # where two lines are close, below the lower one
        place = ((-4, 3), "bottom") if above else ((-4, -4), "top")
        axis.annotate(text, (right, height), place[0], ha="right", va=place[1], **offset)
    axis.plot((left, right), (left * ceilings.bandwidth, right * ceilings.bandwidth), ":", color="0.25")
    at = left * 1.15, left * 1.15 * ceilings.bandwidth
    axis.annotate(f"memory {_si(ceilings.bandwidth)}B/s", at, (8, -3), va="top", **offset)


def _si(value: float) -> str:
    """1.23e9 -> '1.23 G'."""
    power = max(0, min(5, int(math.log10(max(value, 1.0)) // 3)))
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}"
