"""docs/attention.md does what it says: its files are written, its commands run, its exit codes compared."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from running import ROOT

PAGE = (ROOT / "docs" / "attention.md").read_text()
BLOCKS = re.findall(r"^```(\w+) ?([^\n]*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
WRONG = "total = total + weights.sum(-1, keepdim=True)"
RIGHT = "total = total * rescale + weights.sum(-1, keepdim=True)"


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}
    outputs = []
    for language, facts, text in BLOCKS:
        options = dict(word.split("=") for word in facts.split())
        if language == "python":
            with (tmp_path / options["file"]).open("a" if options.get("mode") == "append" else "w") as file:
                file.write(text)
        elif language == "sh":
            if "fix" in options:
                file = tmp_path / options["fix"]
                assert file.read_text().count(WRONG) == 1
                file.write_text(file.read_text().replace(WRONG, RIGHT))
            done = subprocess.run(text.split("#")[0], shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done.returncode == int(options["exit"]), text + done.stdout + done.stderr
            outputs.append(done.stdout)
        else:
            shown = text
    first, fixed, whole, tests, declared, llama = outputs
    for line in shown.splitlines():  # what the page shows of the first failure
        assert line.split(", limit")[0].strip() in first, line
    assert RIGHT in PAGE and "4 wrong" in fixed
    for case in ("absolute/accumulator-fp16", "absolute/accumulator-bf16", "logits/overflowing-fp16", "empty/keys-fp32"):
        assert f"FAIL {case}" in fixed
    assert "0 wrong" in whole and "passed" in tests and "WRONG-SILENT" in declared
    assert "0 wrong" in llama and (tmp_path / "llama.json").exists()


def test_the_counts_on_the_page():
    from selfsup.conformance.cases import ALL
    from selfsup.conformance.mutants import OWN_TABLE, Sources

    assert f"plants {len(Sources(OWN_TABLE).mutants)} one-line bugs" in PAGE
    triton = Sources(Path(__file__).with_name("triton_mutants.py")).mutants
    assert f"{sum(not m.equivalent for m in triton)} in a Triton kernel" in PAGE
    assert "about 580 cases" in PAGE and 570 <= len(ALL) <= 595
