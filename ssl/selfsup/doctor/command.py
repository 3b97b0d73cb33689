"""`selfsup doctor`: what of this machine, its libraries, a run folder and shards would hurt a run.

The files here import only the standard library at their top: a broken installation is what they
have to report. A check yields findings; whatever it raises becomes a finding too.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from selfsup.doctor.finding import Finding, one_line
from selfsup.doctor.libraries import check_imports, check_simplejpeg, check_versions
from selfsup.doctor.machine import (
    check_devices,
    check_environment,
    check_memory,
    check_precision,
    check_threads,
)
from selfsup.doctor.storage import check_run_folder, check_shards_folder


def main_doctor(run_dir: Path = Path("runs"), shards: str | None = None, json: bool = False) -> int:
    """Checks libraries, devices, folders and shards, and says what to do about what is wrong.

    The exit code is 2 where there is a problem; warnings do not count.

    Args:
        run_dir: where runs are to be written.
        shards: also check this folder of shards against its index.
        json: print JSON.
    """
    findings = diagnose(run_dir, shards)
    problems = sum(finding.state == "problem" for finding in findings)
    if json:
        print(to_json(findings))
    else:
        show(findings)
    return 2 if problems else 0


def to_json(findings: list[Finding]) -> str:
    """`ok`, true where there is no problem, and the findings."""
    ok = all(finding.state != "problem" for finding in findings)
    return json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=1)


def show(findings: list[Finding]) -> None:
    """The findings for people, what to do on a line below; in colour where rich can be imported."""
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    counts = ", ".join(f"{sum(f.state == state for f in findings)} {state}" for state in styles)
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:  # its absence is among the findings
        for finding in findings:
            print(f"{finding.state:8} {_rest(finding)}")
        print(counts)
        return
    console = Console(soft_wrap=True)
    for finding in findings:
        console.print(Text.assemble((f"{finding.state:8} ", styles[finding.state]), _rest(finding)))
    console.print(Text(counts))


def _rest(finding: Finding) -> str:
    fix = f"\n{'':9}-> {finding.fix}" if finding.fix else ""
    return f"{finding.check}: {finding.text}{fix}"


def diagnose(run_dir: Path, shards: str | None) -> list[Finding]:
    """Every finding, in the order of the checks. A check that raises is a finding, and the rest go on."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": check_versions,
        "imports": check_imports,
        "simplejpeg": check_simplejpeg,
        "devices": check_devices,
        "precision": check_precision,
        "threads": check_threads,
        "memory": check_memory,
        "environment": check_environment,
        "run folder": lambda: check_run_folder(run_dir),
    }
    if shards is not None:
        checks["shards"] = lambda: check_shards_folder(shards)
    findings = []
    for name, check in checks.items():
        try:
            findings += check()
        except Exception as error:  # a broken library can raise anything on import
            text = f"the check could not be made: {one_line(error)}"
            findings.append(
                Finding(name, "problem", text, "mend what it names, then run selfsup doctor again")
            )
    return findings
