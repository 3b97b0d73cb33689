"""Planted bugs: every one is caught, by a case meant for it; and so is a survivor, where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from running import ROOT
from selfsup.conformance.mutants import OWN_TABLE, Mutant, Outcome, Sources, main_mutants, run_mutants

TRITON = Path(__file__).with_name("triton_mutants.py")
QUIET = Console(quiet=True)


@pytest.mark.slow
def test_bugs_in_the_tiled_kernel_are_caught():
    sources = Sources(OWN_TABLE)
    faults, outcomes = run_mutants(sources, 1, False, QUIET)
    assert faults == [] and len(outcomes) >= 40
    assert [o for o in outcomes if not o.good] == []


def interpreted(*arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "selfsup.cli", "attention", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_bugs_in_the_triton_kernel_are_caught():
    pytest.importorskip("triton", reason="triton is not installed")
    done = interpreted("mutants", str(TRITON), "--interpret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "63 of 63 mutants caught, 1 equivalent, 0 not as meant, 0 faults" in done.stdout, done.stdout


@pytest.mark.slow
def test_the_triton_kernel_keeps_its_claims_under_the_interpreter():
    """fp32, fp16, and bf16 by the shim."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = interpreted("check", f"{TRITON.parent}/triton_kernel.py:triton_attention", "--level", "core", "--interpret")
    assert done.returncode == 0 and "0 wrong" in done.stdout, done.stdout + done.stderr
    assert "cases left out: too large for the interpreter" in done.stdout


def table(folder: Path, *mutants: tuple) -> Path:
    """A table of its own over the tiled kernel."""
    sources = [str(path) for path in Sources(OWN_TABLE).paths]
    path = folder / "table.py"
    path.write_text(f"KERNEL = 'tiled_attention'\nSOURCES = {sources!r}\nMUTANTS = {list(mutants)!r}\n")
    return path


def test_a_survivor_and_a_false_proof_are_told(tmp_path, capsys):
    old, right = "acc = acc * rescale + ", "acc = rescale * acc + "
    wrong = "acc = acc + "
    path = table(
        tmp_path,
        ("survives", old, right, ("tail/1-fp32",)),
        ("caught by another", old, wrong, ("tail/1-fp32",)),
        ("no proof", old, wrong, (), "said to be equivalent"),
        ("equivalent", old, right, (), "multiplication commutes"),
    )
    assert main_mutants(path) == 1
    out = capsys.readouterr().out
    assert "survives: survived" in out and "caught only by t" in out
    assert "no proof: said to be equivalent, yet caught by" in out
    assert "1 of 2 mutants caught, 2 equivalent, 3 not as meant" in out


def test_faults_of_a_table(tmp_path):
    with pytest.raises(ValueError, match="`old` occurs 0 times"):
        main_mutants(table(tmp_path, ("none", "no such text", "x", ("tail/1-fp32",))))
    with pytest.raises(ValueError, match="no case matches"):
        main_mutants(table(tmp_path, ("none", "acc = acc * rescale + ", "acc = acc + ", ("tial/*",))))
    with pytest.raises(ValueError, match="no such file"):
        main_mutants(tmp_path / "missing.py")


def test_outcomes():
    bug, twin = Mutant("a", "", "", ("x",)), Mutant("b", "", "", (), "proof")
    assert Outcome(bug, "x").good and not Outcome(bug, None).good and not Outcome(bug, "y", as_meant=False).good
    assert Outcome(twin, None).good and not Outcome(twin, "x").good and not Outcome(twin, "x", as_meant=False).good
