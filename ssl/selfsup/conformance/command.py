"""`selfsup attention check | explain | mutants`; the benchmark is in bench.py."""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from selfsup.attention.dispatch import choose
from selfsup.conformance.cases import Level
from selfsup.conformance.check import Report, check
from selfsup.conformance.claims import FEATURES, NEEDS_CLAIM, Layout, Target, read_features
from selfsup.conformance.inputs import DTYPES
from selfsup.conformance.run import BAD
from selfsup.durable import write_atomically

SHOWN = 8
"""Failures printed in full; --json has all."""


def main_check(
    target: Annotated[str, tyro.conf.Positional],
    /,
    level: Level = "train",
    features: str | None = None,
    layout: Layout | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    seed: int = 0,
    interpret: bool = False,
    jobs: int | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> int:
    """Puts an attention kernel through the conformance suite.

    Exit code 0: all that it claims holds at this level; 1: not; 2: it could not be run.

    Args:
        target: reference, tiled, torch, flex, auto; module:function; or file.py:function.
        level: core: forward; train: and gradients; full: and all else.
        features: what the kernel claims, with commas (an unclaimed one must raise). Else by its
            decorator; else whatever it accepts. "list" prints them all.
        layout: how it takes q, k, v: BHLD, BLHD, or THD packed with cu_seqlens_q and cu_seqlens_k.
        device: cpu or cuda.
        seed: of the drawn inputs.
        interpret: run Triton kernels under its interpreter, on a CPU; bf16 is mended there.
        jobs: processes side by side; unless said one a core, up to four, on a CPU, and one on CUDA.
        json_file: write the report there.
    """
    console = Console()
    if features == "list" or target == "list":
        for name, text in FEATURES.items():
            console.print(f"{name:14} {text}", highlight=False)
        return 0
    claimed = None if features is None else tuple(n.strip() for n in features.split(",") if n.strip())
    read_features(claimed or ())
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees none; see selfsup doctor")
    if jobs is None:
        jobs = min(4, os.cpu_count() or 1) if device == "cpu" else 1
    report = check(Target(target, layout, claimed), level, device, seed, interpret, jobs)
    show(report, console)
    if json_file is not None:
        write_atomically(json_file, json.dumps(report.to_json(), indent=1).encode())
        console.print(f"report: {json_file}", highlight=False)
    return report.exit_code


def show(report: Report, console: Console) -> None:
    """The report as text."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for result in report.results:
        counts[result.id.split("/")[0]][result.verdict] += 1
    verdicts = ["PASS", "REFUSED", *(v for v in BAD if any(c[v] for c in counts.values()))]
    table = Table(title=f"{report.target}: level {report.level}, {report.dtype} where a case is about no dtype")
    table.add_column("cases")
    for verdict in (*verdicts, "worst error"):
        table.add_column(verdict, justify="right")
    for group, count in counts.items():
        ratios = [r.error_ratio for r in report.results if r.id.split("/")[0] == group and r.error_ratio]
        worst = f"{max(ratios):.2f}" if ratios else ""
        table.add_row(group, *(str(count[v] or "") for v in verdicts), worst)
    if report.results:
        console.print(table)
        console.print("worst error: the kernel's over that of a plain run in the same precision", highlight=False)
    if report.claims is None and report.results:
        console.print(f"nothing declared; it accepts: {', '.join(report.accepted())}", highlight=False)
    untried = [f for f in FEATURES if f in NEEDS_CLAIM and f not in (report.claims or ())]
    if untried and report.results:
        console.print(f"not tried, as nobody claims it: {', '.join(untried)}", highlight=False)
    if report.left_out:
        console.print(f"{report.left_out} cases left out: too large for the interpreter", highlight=False)
    refused = [r for r in report.results if r.verdict == "REFUSED"]
    reasons = Counter(r.detail.splitlines()[0][:110] if r.detail else "" for r in refused)
    for reason, count in reasons.most_common(5):
        console.print(f"  refused {count}: {reason}", markup=False, highlight=False)
    bad = [r for r in report.results if r.verdict in BAD]
    for result in bad[:SHOWN]:
        console.print(f"\n{result.verdict} {result.id}: {result.detail}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"  resembles: {result.cites}", markup=False, highlight=False)
        if result.reproducer:
            indented = "\n".join(f"    {line}" for line in result.reproducer.splitlines())
            console.print(f"  reproduce:\n{indented}", markup=False, highlight=False, soft_wrap=True)
    if len(bad) > SHOWN:
        rest = Counter(r.id.split("/")[0] for r in bad[SHOWN:])
        console.print(f"\n... and {len(bad) - SHOWN} more: {dict(rest)}; --json has them all", highlight=False)
    for error in report.errors:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
    if report.level != "core" and report.results and "backward" not in report.accepted():
        console.print("forward only: it gives no gradients", highlight=False)
    if len(refused) > len(report.results) / 2:
        console.print(f"most cases were refused: little is known of what {report.target} was not asked", highlight=False)
    passed = sum(r.verdict == "PASS" for r in report.results)
    console.print(
        f"\n{report.verdict}: {passed} of {len(report.results)} passed, {len(refused)} refused, {len(bad)} wrong; "
        f"{report.seconds:.0f} s",
        highlight=False,
    )


def main_explain(
    length: Annotated[int, tyro.conf.Positional] = 197,
    /,
    keys: int | None = None,
    heads: int = 48,
    device: str = "cpu",
    dtype: str = "bf16",
    softcap: bool = False,
    lse: bool = False,
    causal: bool = False,
) -> None:
    """Says which kernel `attention: auto` takes, and why.

    Args:
        length: queries.
        keys: keys; as many as queries unless said.
        heads: batch entries times heads.
        device: cpu or cuda.
        dtype: of the matrix products: bf16, fp16, fp32, fp64.
        softcap: the call has a soft cap.
        lse: the call wants the log-sum-exp.
        causal: the call is causal, and nothing else is masked.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    unknown = [name for name, given in (("softcap", softcap), ("return_lse", lse)) if given]
    print(": ".join(choose(device, DTYPES[dtype], heads, length, keys or length, unknown, causal)))
    print("scores = batch x heads x queries x keys; measured: see README.md, Attention")
