"""Does the suite see bugs? Each mutant is a kernel with one line changed; every one must fail a case meant for it.

A table of mutants is a Python file with KERNEL (the function), SOURCES (files that it is made of, the function's
first) and MUTANTS. `tiled_mutants.py` is ours; `selfsup attention mutants FILE` runs another.
"""

import fnmatch
import itertools
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from selfsup.conformance.cases import Case
from selfsup.conformance.claims import OURS, Kernel, Target, load_file
from selfsup.conformance.run import Base, run_case, select

OWN_TABLE = Path(__file__).with_name("tiled_mutants.py")


class Mutant(NamedTuple):
    """One planted bug."""

    name: str
    old: str
    """Occurs once in the sources."""
    new: str
    meant: tuple[str, ...]
    """Patterns of the ids of the cases that are meant to catch it; empty for an equivalent one."""
    equivalent: str = ""
    """Why no case can catch it."""


class Outcome(NamedTuple):
    """How a mutant ended."""

    mutant: Mutant
    caught_by: str | None
    detail: str = ""
    as_meant: bool = True

    @property
    def good(self) -> bool:
        """Caught by a case meant for it, or equivalent and not caught."""
        return self.caught_by is None if self.mutant.equivalent else self.caught_by is not None and self.as_meant


class Sources:
    """The text of a kernel, to be planted with bugs and loaded from a folder of its own."""

    def __init__(self, table: Path):
        module = load_file(table)
        self.kernel: str = module.KERNEL
        self.mutants = [Mutant(*m) for m in module.MUTANTS]
        self.paths = [(table.parent / name).resolve() for name in module.SOURCES]
        self.texts = [path.read_text() for path in self.paths]
        self._numbers = itertools.count()

    def plant(self, folder: Path, mutant: Mutant | None) -> Kernel:
        """The kernel with the bug (None: without any). Raises ValueError where `old` does not occur once."""
        texts, number = list(self.texts), next(self._numbers)
        if mutant is not None:
            found = [i for i, text in enumerate(texts) for _ in range(text.count(mutant.old))]
            if len(found) != 1:
                raise ValueError(f"mutant {mutant.name}: `old` occurs {len(found)} times in the sources, expected once")
            texts[found[0]] = texts[found[0]].replace(mutant.old, mutant.new)
        for path in self.paths:  # the copies import each other, and register operators under names of their own
            texts = [t.replace(f"selfsup.attention.{path.stem} ", f"{path.stem}_{number} ") for t in texts]
        texts = [t.replace('"selfsup::', f'"selfsup_mutant_{number}::') for t in texts]
        for path, text in zip(self.paths, texts):
            (folder / f"{path.stem}_{number}.py").write_text(text)
        name = f"{folder / self.paths[0].stem}_{number}.py:{self.kernel}"
        kernel = Target(name).load()
        return kernel if kernel.claims is not None else replace(kernel, claims=OURS["tiled"])


def run_mutants(sources: Sources, seeds: int, interpret: bool, console: Console) -> tuple[list[str], list[Outcome]]:
    """Faults of the unmutated kernel over all seeds, and what became of each mutant (first seed)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sound = sources.plant(folder, None)
        cases, _ = select(sound, "full", Base("fp32", 16), interpret)
        meant = [c for c in cases if any(fnmatch.fnmatch(c.id, p) for m in sources.mutants for p in m.meant)]
        faults = []
        for seed in range(seeds):
            for case in meant:
                result = run_case(sound, case, seed, "cpu", shrinking=False)
                if result.verdict not in ("PASS", "REFUSED"):
                    faults.append(f"seed {seed}: {case.id}: {result.detail}")
        console.print(f"the kernel as it is: {len(meant)} cases x {seeds} seeds, {len(faults)} faults", highlight=False)
        outcomes = []
        for mutant in sources.mutants:
            outcomes.append(_outcome(sources.plant(folder, mutant), mutant, cases))
            last = outcomes[-1]
            state = "caught by" if last.caught_by else "equivalent" if mutant.equivalent else "SURVIVED"
            how = f"{last.caught_by} ({last.detail[:90]})" if last.caught_by else ""
            console.print(f"  {mutant.name}: {state} {how}", highlight=False, markup=False)
    return faults, outcomes


def _outcome(kernel: Kernel, mutant: Mutant, cases: list[Case]) -> Outcome:
    """The first case that fails: those meant for it first, then all others up to the level train."""
    meant = [c for c in cases if any(fnmatch.fnmatch(c.id, p) for p in mutant.meant)]
    if not meant and not mutant.equivalent:
        raise ValueError(f"mutant {mutant.name}: no case matches {', '.join(mutant.meant)}")
    others = [c for c in cases if c not in meant and c.level != "full"]
    for case in [*meant, *others]:
        result = run_case(kernel, case, 0, "cpu", shrinking=False)
        if result.verdict not in ("PASS", "REFUSED"):
            return Outcome(mutant, case.id, result.detail, case in meant)
    return Outcome(mutant, None)


def main_mutants(
    table: Annotated[Path, tyro.conf.Positional] = OWN_TABLE, /, seeds: int = 1, interpret: bool = False
) -> int:
    """Plants bugs in a kernel and says which case catches each. Exit code 1 where one survives.

    Args:
        table: a Python file with KERNEL, SOURCES and MUTANTS; ours over the tiled kernel unless said.
        seeds: the kernel without bugs must pass the same cases on so many seeds.
        interpret: run Triton kernels under its interpreter.
    """
    if not table.is_file():
        raise ValueError(f"{table}: no such file; expected a table of mutants")
    if interpret and os.environ.get("TRITON_INTERPRET") != "1":  # it is read when triton is loaded
        command = [sys.executable, "-m", "selfsup.cli", "attention", "mutants", str(table)]
        command += ["--seeds", str(seeds), "--interpret"]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    if interpret:
        from selfsup.conformance import interpreter

        interpreter.install()
    console = Console(soft_wrap=True)
    faults, outcomes = run_mutants(Sources(table), seeds, interpret, console)
    return report(faults, outcomes, console)


def report(faults: list[str], outcomes: list[Outcome], console: Console) -> int:
    """The totals, and everything that is not as it should be. Returns the exit code."""
    by_case: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.caught_by:
            name = outcome.caught_by.split("/")[0]
            by_case[name] = by_case.get(name, 0) + 1
    summary = Table(title="caught by")
    summary.add_column("cases")
    summary.add_column("mutants", justify="right")
    for name, count in sorted(by_case.items(), key=lambda item: -item[1]):
        summary.add_row(name, str(count))
    console.print(summary)
    wrong: list[Any] = [o for o in outcomes if not o.good]
    for fault in faults[:10]:
        console.print(f"without a bug: {fault}", markup=False, highlight=False)
    for outcome in wrong:
        how = f"caught only by {outcome.caught_by}, not meant for it" if outcome.caught_by else "survived"
        if outcome.mutant.equivalent:
            how = f"said to be equivalent, yet caught by {outcome.caught_by}: {outcome.detail}"
        console.print(f"{outcome.mutant.name}: {how}", markup=False, highlight=False)
    equivalent = [o.mutant for o in outcomes if o.mutant.equivalent]
    for mutant in equivalent:
        console.print(f"equivalent: {mutant.name}: {mutant.equivalent}", markup=False, highlight=False)
    caught = sum(o.caught_by is not None for o in outcomes if not o.mutant.equivalent)
    console.print(
        f"{caught} of {len(outcomes) - len(equivalent)} mutants caught, {len(equivalent)} equivalent, "
        f"{len(wrong)} not as meant, {len(faults)} faults without a bug",
        highlight=False,
    )
    return 1 if wrong or faults else 0
