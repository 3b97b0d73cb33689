"""`selfsup attention bench`: how fast a kernel is, after it was seen to be right.

Each kernel is checked in the run itself: densely on a shape that the float64 loop can afford, and by a few
rows on the timed shape, before the rounds, within one of them and after them. A wrong one gets no speed, and
as every timed call has fresh numbers, one that remembers gets its own. Kernels take turns within a round, so
that what disturbs the machine hits all. One that may crash belongs under `check` first: it has processes.
"""

import json
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from selfsup.conformance import measure, roofline
from selfsup.conformance.claims import Kernel, KernelRaised, Layout, Target, read_features
from selfsup.conformance.inputs import DTYPES, Inputs, Shape
from selfsup.conformance.judge import Finding, judge_call
from selfsup.conformance.measure import Setting
from selfsup.conformance.roofline import Ceilings, Pass, Row
from selfsup.durable import write_atomically
from selfsup.run_folder import environment

GRIDS = {
    "vit": [Shape(8, 6, 6, n, n, 64, 64) for n in (64, 197, 257, 785)],
    "long": [Shape(1, 8, 8, n, n, 64, 64) for n in (1024, 4096, 16384)],
    "lengths": [Shape(max(1, 4096 // n), 4, 4, n, n, 64, 64) for n in (64, 256, 1024, 4096, 16384)],
}
ORACLE_SECONDS = 1.0
"""What the float64 loop may take for the dense check; twice that on a busy machine."""


def main_bench(
    targets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TARGET [TARGET ...]")],
    /,
    against: tuple[str, ...] = ("torch", "reference"),
    grid: tuple[str, ...] = ("vit",),
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    features: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 7,
    out: Path | None = None,
    causal: bool = False,
    layout: Layout | None = None,
) -> int:
    """Times attention kernels against others, after checking them. Exit code 1 where a target was wrong.

    Args:
        targets: reference, tiled, torch, flex, auto; module:function; or file.py:function.
        against: kernels to compare with; ratios are to the first.
        grid: vit, long, lengths (tokens constant), or shapes BxHxL or BxHxLxD; several with commas or spaces.
        dtypes: of fp64, fp32, fp16, bf16.
        features: what the targets claim, with commas; matters for linear_memory only.
        device: cpu or cuda. Threads are as torch is set: OMP_NUM_THREADS.
        rounds: at least 5; each times every kernel once, or short ones several times.
        out: write bench.json, bench.md and roofline.png into this folder.
        causal: causal attention; only allowed pairs count as work.
        layout: how the targets take q, k, v: BHLD, BLHD, or THD.
    """
    targets, against, grid, dtypes = (_split(names) for names in (targets, against, grid, dtypes))
    if not targets:
        raise ValueError("TARGET: expected at least one kernel, got none")
    shapes = read_grid(grid)
    _check_options(dtypes, rounds, device)
    claimed = None if features is None else tuple(sorted(read_features(_split((features,)))))
    contestants = {name: Target(name, layout, claimed) for name in targets}
    contestants |= {name: Target(name) for name in against if name not in contestants}
    kernels = {name: target.load() for name, target in contestants.items()}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # before the work, not after it

    facts, seed, base = environment(1, torch.device(device)), secrets.randbelow(2**31), (*against, None)[0]
    ceilings = roofline.measure_ceilings(dtypes, device)
    rows: list[Row] = []
    for dtype in dtypes:
        for shape in shapes:
            setting = Setting(shape, dtype, causal, device, seed + 10 * len(rows))
            rows += compare(setting, contestants, kernels, rounds)
    set_ratios(rows, base)
    title = (
        f"attention{', causal' if causal else ''}: {facts['device']}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s), {rounds} rounds"
    )
    text = roofline.to_markdown(rows, ceilings, title, base, device)
    print(text)
    if out is not None:
        settings = {"causal": causal, "rounds": rounds, "seed": seed, "against": against, "grid": grid}
        write(out, {"title": title, "settings": settings, "environment": facts}, text, rows, ceilings)
    mine = [one for row in rows if row.kernel in targets for one in row.passes.values()]
    return int(any((one.fault or "").startswith("wrong") for one in mine))


def _check_options(dtypes: tuple[str, ...], rounds: int, device: str) -> None:
    """Raises ValueError for the first that cannot be."""
    if not dtypes or set(dtypes) - set(DTYPES):
        raise ValueError(f"dtypes: expected some of {', '.join(DTYPES)}, got {' '.join(dtypes) or 'none'}")
    if rounds < 5:
        raise ValueError(f"rounds: expected at least 5, for quantiles, got {rounds}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees none; see selfsup doctor")


def _split(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names given with spaces, commas, or both."""
    return tuple(dict.fromkeys(part.strip() for name in names for part in name.split(",") if part.strip()))


def read_grid(names: tuple[str, ...]) -> list[Shape]:
    """The shapes of grids and of single shapes, each once. Raises ValueError for another name."""
    shapes: list[Shape] = []
    for name in names:
        if name in GRIDS:
            shapes += GRIDS[name]
        elif match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", name):
            b, h, n, d = (int(group or 64) for group in match.groups())
            shapes.append(Shape(b, h, h, n, n, d, d))
        else:
            raise ValueError(f"grid: expected {', '.join(GRIDS)}, BxHxL or BxHxLxD, got {name!r}")
    if not shapes:
        raise ValueError("grid: expected at least one shape, got none")
    return list(dict.fromkeys(shapes))


def compare(
    setting: Setting, targets: Mapping[str, Target], kernels: Mapping[str, Kernel], rounds: int
) -> list[Row]:
    """A row for each kernel: checked, measured, timed in turns, checked again."""
    rows, live = [], []
    for name, kernel in kernels.items():
        _say(f"{setting.dtype} {roofline.label(setting.shape)} {roofline.short(name)}: checking")
        tasks = measure.work(setting.shape, setting.dtype, setting.causal)
        row = Row(name, setting.dtype, setting.shape, {n: Pass(task) for n, task in tasks.items()})
        rows.append(row)
        if too_large := measure.memory_refusal(setting, kernel, targets[name]):
            row.fail(too_large)
            continue
        inputs = setting.inputs(kernel)
        check(row, setting, kernel, inputs)
        if row.runs:
            row.peak_bytes = measure.peak_bytes(setting, kernel, targets[name])
            live.append((row, kernel, inputs))
    names = ", ".join(roofline.short(row.kernel) for row, *_ in live)
    _say(f"{setting.dtype} {roofline.label(setting.shape)}: timing {names}")
    time_in_turns(setting, live, rounds)
    for row, kernel, inputs in live:
        if row.runs:
            check_again(row, setting, kernel, inputs, rounds + 1)
    return rows


def check(row: Row, setting: Setting, kernel: Kernel, inputs: Inputs) -> None:
    """A few rows of the timed shape, which is the first call; then every number of a dense check."""
    gradients = True
    try:
        try:
            row.first_call, findings = measure.check_rows(setting, kernel, inputs, gradients)
        except KernelRaised as error:
            row.fail(f"refused: {error}", "backward")
            gradients = False
            row.first_call, findings = measure.check_rows(setting, kernel, inputs, gradients)
        row.dense_shape = affordable(setting.shape)
        findings += check_dense(setting, kernel, gradients)
    except KernelRaised as error:
        row.fail(f"refused: {error}")
        return
    condemn(row, findings)


def affordable(shape: Shape) -> Shape:
    """The shape, or a smaller one of its kind: fewer entries and heads, then a length less by whole 128s."""

    def seconds(s: Shape) -> float:  # measured: a query costs 0.1 ms, and 7 ns for each number of k
        return s.b * s.h * s.l * (1e-4 + s.s * s.d * 7e-9)

    for b, h in ((shape.b, shape.h), (2, 2), (1, 2), (1, 1)):
        smaller = shape._replace(b=min(b, shape.b), h=min(h, shape.h), hk=min(h, shape.hk))
        if seconds(smaller) <= ORACLE_SECONDS:
            return smaller
    while seconds(smaller) > ORACLE_SECONDS and smaller.l > 128:
        smaller = smaller._replace(l=smaller.l - 128, s=smaller.s - 128)
    return smaller


def check_dense(setting: Setting, kernel: Kernel, gradients: bool) -> list[Finding]:
    """Every number, on fresh inputs of the largest shape that is affordable. Raises KernelRaised."""
    small = setting._replace(shape=affordable(setting.shape)).inputs(kernel, more=1)
    return judge_call(small, lambda: kernel.answer(small, gradients), gradients)


def check_again(row: Row, setting: Setting, kernel: Kernel, inputs: Inputs, turn: int) -> None:
    """Fresh numbers in the very tensors that were timed: who kept a result from before is found out."""
    measure.redraw(inputs, setting.generator(turn))
    try:
        _, findings = measure.check_rows(setting, kernel, inputs, row.passes["backward"].fault is None)
    except KernelRaised as error:
        row.fail(f"refused: after the rounds: {error}")
        return
    condemn(row, findings, "after the rounds: ")


def condemn(row: Row, findings: list[Finding], when: str = "") -> None:
    """One wrong tensor takes the speed of both passes."""
    wrong = next((finding for finding in findings if finding.fault is not None), None)
    if wrong is not None:
        row.fail(f"wrong: {when}{wrong.tensor}: {wrong.fault}")


def time_in_turns(setting: Setting, live: list[tuple[Row, Kernel, Inputs]], rounds: int) -> None:
    """Every kernel once a round, A B C A B C, all on the numbers of the round. One that raises is out, with
    what it said; so is one whose last answer in a round, which nobody can foretell, is wrong."""
    clock, calls, judged = measure.Clock(setting.device, flush=True), {}, setting.seed % rounds
    for turn in range(-1, rounds):
        for row, kernel, inputs in live:
            backward = row.passes["backward"].fault is None
            if not row.runs:
                continue
            draws = setting.generator(turn + 1)
            try:
                if turn < 0:
                    calls[row.kernel] = measure.calls_a_round(kernel, inputs, clock, backward, draws)
                    continue
                many = calls[row.kernel]
                seconds, answer = measure.time_round(kernel, inputs, clock, backward, many, draws)
            except (Exception, SystemExit) as error:
                row.fail(f"refused: {type(error).__name__}: {str(error).strip()[:300]}")
                continue
            for one, value in zip(row.passes.values(), seconds):
                if one.fault is None:
                    one.seconds.append(value)
            if turn == judged:
                findings = measure.judge_rows(setting, inputs, answer, ("dq",) if backward else ())
                condemn(row, findings, "in the rounds: ")
            del answer  # the next kernel has the memory to itself


def set_ratios(rows: list[Row], base: str | None) -> None:
    """Round by round: the seconds of `base` on the same shape over those of the kernel."""
    bases = {(row.dtype, row.shape): row for row in rows if row.kernel == base}
    for row in rows:
        if (other := bases.get((row.dtype, row.shape))) is not None:
            for name, one in row.passes.items():
                one.ratios = [b / own for b, own in zip(other.passes[name].seconds, one.seconds)]


def write(
    out: Path, about: dict[str, Any], text: str, rows: list[Row], ceilings: Mapping[str, Ceilings]
) -> None:
    """bench.json, bench.md and roofline.png."""
    report = about | to_json(rows, ceilings)
    write_atomically(out / "bench.json", json.dumps(report, indent=1).encode())
    write_atomically(out / "bench.md", text.encode())
    roofline.draw(rows, ceilings, about["title"], out / "roofline.png")
    print(f"written: {', '.join(str(out / n) for n in ('bench.json', 'bench.md', 'roofline.png'))}")


def to_json(rows: list[Row], ceilings: Mapping[str, Ceilings]) -> dict[str, Any]:
    """`ceilings` by dtype and `rows`; times in seconds, with every round, and quantiles 10%, 50%, 90%."""
    listed = []
    for row in rows:
        entry: dict[str, Any] = {
            "kernel": row.kernel,
            "dtype": row.dtype,
            "shape": row.shape._asdict(),
            "dense_check": None if row.dense_shape is None else row.dense_shape._asdict(),
            "first_call_seconds": row.first_call,
            "peak_bytes": row.peak_bytes,
        }
        for name, one in row.passes.items():
            middle = roofline.spread(one.seconds)
            entry[name] = {
                "fault": one.fault,
                "flops": one.work.flops,
                "least_bytes": one.work.bytes,
                "intensity": one.work.intensity,
                "seconds": one.seconds,
                "seconds_quantiles": middle,
                "flops_per_second": middle and one.speed,
                "note": ceilings[row.dtype].excess(one),
                "share_of_ceiling": middle and ceilings[row.dtype].seconds(one.work) / middle[1],
                "ratios": one.ratios,
                "ratio_quantiles": roofline.spread(one.ratios),
            }
        listed.append(entry)
    return {"ceilings": {name: c._asdict() for name, c in ceilings.items()}, "rows": listed}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
