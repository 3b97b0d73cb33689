"""tools/sweep.py: the commands it types, in their order; what stops it and what does not. Cells are not trained here."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scaling_sweeps import written
from selfsup.scaling.plan import make_plan, write_plan

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import sweep as tool


def typed(tmp_path, monkeypatch, codes):
    """The commands that are typed where each gives one of `codes` in turn, and the files it makes (code 2: none)."""
    plan = make_plan(written(tmp_path), None, 1e9)
    found = []

    def run(command, check):
        words, code = command[3:], codes[len(found)] if len(found) < len(codes) else 0
        found.append(words)
        if words[1] in ("plan", "fit") and code < 2:
            out = Path(words[words.index("--json") + 1])
            assert not out.exists()  # what an earlier start left is not taken for an answer
            out.parent.mkdir(exist_ok=True)
            write_plan(plan, out)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(tool.subprocess, "run", run)
    try:
        tool.main(tmp_path / "pilot.yaml", tmp_path / "sweep.yaml", tmp_path / "my runs")
    except SystemExit as end:
        return found, str(end)
    return found, None


def test_the_commands_in_their_order(tmp_path, monkeypatch):
    """A refused pilot, its failed cell, and refused fits are gone on from. Again: the same, with new plans and fits."""
    for codes in ([1, 1, 1, 0, 1, 1, 0], []):
        found, end = typed(tmp_path, monkeypatch, codes)
        assert end is None
        assert [words[1] for words in found] == ["plan", "run", "fit", "plan", "run", "fit", "report"]
    folder = str(tmp_path / "my runs")
    assert found[1] == ["scaling", "run", folder + "-pilot.json", "--out", folder, "--again", "--anyway"]
    assert found[2][2] == folder + "/results.csv" and found[2][-2:] == ["--json", folder + "/pilot.json"]
    assert found[3][2:] == [
        str(tmp_path / "sweep.yaml"), "--pilot", folder + "/pilot.json", "--json", folder + "-sweep.json"
    ]  # fmt: skip
    assert found[4] == ["scaling", "run", folder + "-sweep.json", "--out", folder, "--again"]
    assert found[6] == shlex.split(f"scaling report --fit '{folder}/fit.json' --sweep '{folder}' --out '{folder}/report'")


@pytest.mark.parametrize("codes,last", [([2], "plan"), ([0, 130], "run"), ([0, 0, 2], "fit"), ([0, 0, 0, 1], "plan")])
def test_what_stops_it(tmp_path, monkeypatch, codes, last):
    """A fault that leaves no file, an interrupt, a refused sweep."""
    found, end = typed(tmp_path, monkeypatch, codes)
    assert len(found) == len(codes) and found[-1][1] == last
    assert end == f"stopped: selfsup {shlex.join(found[-1])} gave exit code {codes[-1]}"
