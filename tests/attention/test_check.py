"""The suite as a command: verdicts, exit codes, reports; on right, wrong, refusing, dying and hanging kernels."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from running import ROOT
from selfsup.cli import main
from selfsup.conformance import check as check_module
from selfsup.conformance.cases import ALL
from selfsup.conformance.check import check
from selfsup.conformance.claims import FEATURES, Target
from selfsup.conformance.run import prepare, reproduce, run_case, select

FILE = Path(__file__).with_name("kernels_to_check.py")


def target(name, **options) -> Target:
    return Target(f"{FILE}:{name}", **options)


def verdicts(name, level="train", only=(), **options) -> dict[str, str]:
    """The verdicts of one kernel, in this process."""
    kernel, base = prepare(target(name, **options), "cpu")
    chosen, _ = select(kernel, level, base, interpret=False)
    chosen = [c for c in chosen if not only or c.id.split("/")[0] in only]
    return {c.id: run_case(kernel, c, 0, "cpu", shrinking=False).verdict for c in chosen}


def command(*arguments: str, monkeypatch) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["selfsup", "attention", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main()
    return code, out.getvalue(), err.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "tiled", "torch", "flex", "auto"])
def test_our_kernels_keep_their_claims(name):
    """The whole suite, each group in a process of its own, and nothing but what is said to be refused."""
    level = {"flex": "core", "torch": "train", "auto": "train"}.get(name, "full")  # all at full: by hand
    report = check(Target(name), level, jobs=2)
    assert report.verdict == "pass", [r for r in report.results if r.verdict not in ("PASS", "REFUSED")]
    refused = {r.id.split("/")[0] for r in report.results if r.verdict == "REFUSED"}
    allowed = {"reference": set(), "tiled": {"dropout"}, "auto": set(),
               "torch": {"softcap", "lse", "alibi", "tiles", "empty", "pairs"}}
    if name in allowed:
        assert refused <= allowed[name] | {"calls"}, refused


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "tiled", "torch"])
def test_our_kernels_on_twenty_seeds(name):
    """A quarter of the cases on each, another quarter on the next."""
    kernel, base = prepare(Target(name), "cpu")
    chosen = [c for c in select(kernel, "train", base, False)[0] if c.cost < 5_000 or c.id.startswith("tiles/c")]
    for seed in range(1, 21):
        for case in chosen[seed % 4 :: 4]:
            result = run_case(kernel, case, seed, "cpu", shrinking=False)
            assert result.verdict in ("PASS", "REFUSED"), (seed, result)


def test_an_undeclared_kernel_claims_what_it_accepts():
    found = verdicts("plain", "core")
    assert set(found.values()) == {"PASS", "REFUSED"}
    refused = {i.split("/")[0] for i, v in found.items() if v == "REFUSED"}
    assert {"window", "softcap", "alibi", "documents", "lse"} <= refused and "gqa" not in refused
    assert found["causal/33x97-top_left-fp32"] == "PASS" and found["causal/33x97-bottom_right-fp32"] == "REFUSED"


def test_a_narrow_kernel_is_refusing_not_failing():
    found = verdicts("only_square")
    assert set(found.values()) == {"PASS", "REFUSED"} and found["tail/33-fp32"] == "REFUSED"
    assert found["tail/64-fp32-grad"] == "PASS"


def test_the_cases_move_to_a_dtype_that_the_kernel_takes():
    found = verdicts("half_only", "core")
    assert found["tail/97-fp16"] == "PASS" and "FAIL" not in found.values() and not any(i.endswith("fp32") for i in found)
    assert "FAIL" not in found.values()


@pytest.mark.parametrize("name", ["of_width_64", "of_width_64_declared"])
def test_the_cases_move_to_a_width_that_the_kernel_takes(name):
    """A kernel for one width is not waved through because it refuses the suite's."""
    found = verdicts(name)
    assert found["tail/33-fp32"] == found["causal/65-fp32-grad"] == "PASS" and found["width/40-fp32"] == "REFUSED"
    assert found["tail/33-fp32-grad"] == "FAIL"


def test_alignment_by_nature_is_found():
    kernel, _ = prepare(target("bottom_right"), "cpu")
    assert kernel.causal_align == "bottom_right"
    found = verdicts("bottom_right", "core", ("causal",))
    assert found["causal/33x97-bottom_right-fp32"] == "PASS" and found["causal/33x97-top_left-fp32"] == "REFUSED"
    assert prepare(target("plain"), "cpu")[0].causal_align == "top_left"


def test_numbers_for_what_is_not_claimed_are_the_worst():
    found = verdicts("ignores_what_it_does_not_know", "core")
    assert found["causal/17-fp32"] == "WRONG-SILENT" and found["softcap/5-fp32"] == "WRONG-SILENT"
    assert found["tail/33x97-fp32"] == "PASS" and "FAIL" not in found.values()
    assert verdicts("plain", "core", ("causal",), features=("fp32", "cross"))["causal/17-fp32"] == "PASS"


def test_claims_of_widths():
    found = verdicts("declared", "train", ("width", "tail", "causal"))
    assert found["width/40-fp32-grad"] == "PASS" and found["width/59-fp32"] == "REFUSED"
    assert "FAIL" not in found.values()


def test_a_claim_that_is_refused_is_a_failure():
    found = verdicts("claims_too_much", "core", ("tail",))
    assert found["tail/33x97-fp32"] == "FAIL" and found["tail/33-fp32"] == "PASS"


@pytest.mark.parametrize("name", ["mean_of_v", "zero_dq", "negated_dq", "doubled_dq"])
def test_known_cheats_fail_in_every_dtype(name):
    """mean(v), and a dq of zero, negated, doubled: known rules let these pass."""
    found = verdicts(name, "train", ("tail",))
    ending = "" if name == "mean_of_v" else "-grad"
    for dtype in ("fp32", "bf16", "fp16"):
        assert found[f"tail/65-{dtype}{ending}"] == "FAIL"
    if name != "mean_of_v":
        assert all(v == "PASS" for i, v in found.items() if not i.endswith("-grad"))


def test_packed_tokens_through_the_whole_suite():
    """A right kernel for (tokens, heads, width) with cumulative lengths, an empty segment among them."""
    found = verdicts("packed", "train", ("tail", "documents", "causal", "gqa", "lse"), layout="THD")
    assert set(found.values()) == {"PASS", "REFUSED"}
    assert found["documents/three-fp32-grad"] == found["tail/33x97-fp32-grad"] == found["lse/plain-fp32"] == "PASS"


def test_a_kernel_that_writes_to_its_inputs():
    assert verdicts("writes_to_q", "core", ("tail",))["tail/65-fp32"] == "FAIL"
    assert verdicts("writes_to_the_mask", "core", ("masked",))["masked/rows-float-fp32"] == "FAIL"


def test_a_gradient_that_does_not_come_back_is_a_failure():
    found = verdicts("no_dk", "train", ("tail",))
    assert found["tail/65-fp32"] == "PASS" and found["tail/65-fp32-grad"] == "FAIL"


def test_the_cases_move_to_lengths_that_the_kernel_takes():
    """A kernel for multiples of 64 is not waved through because it refuses most lengths."""
    found = verdicts("multiples_of_64", "train", ("tail", "scale", "logits"))
    assert found["tail/64-fp32-grad"] == found["scale/0.37-fp32"] == found["logits/rising-fp32"] == "PASS"
    assert found["scale/0.37-fp32-grad"] == "FAIL" and found["tail/33-fp32"] == "REFUSED"


def test_what_comes_back_may_be_a_tuple():
    found = verdicts("returns_more", "train", ("tail", "lse"))
    assert found["tail/65-fp32-grad"] == found["lse/plain-fp32"] == "PASS"
    assert found["lse/plain-fp32-grad"] == "REFUSED"  # a log-sum-exp without a gradient is no lie
    with pytest.raises(ValueError, match="str came back"):
        verdicts("returns_a_string", "core")


def test_the_reproducer_is_small_and_reproduces():
    kernel, base = prepare(target("wrong_tail"), "cpu")
    case = next(c for c in select(kernel, "core", base, False)[0] if c.id == "tail/batches-fp32")
    result = run_case(kernel, case, 0, "cpu")
    lines = result.reproducer.splitlines()
    assert result.verdict == "FAIL" and len(lines) == 3
    scope: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec("\n".join(lines), scope)
    assert "FAIL" in printed.getvalue() and "expected" in printed.getvalue()
    b, h, hk, rows, keys, d, dv = scope["shape"]
    assert keys == 33 and (b, h, hk, rows, d, dv) == (1, 1, 1, 1, 1, 1)
    smaller = reproduce(f"{FILE}:wrong_tail", "tail/batches-fp32", (1, 1, 1, 1, 32, 1, 1))
    assert smaller.verdict == "PASS"
    with pytest.raises(ValueError, match="case: expected one of"):
        reproduce("reference", "tail/none", (1, 1, 1, 1, 32, 1, 1))


def test_a_crash_costs_one_case(monkeypatch):
    monkeypatch.setattr(check_module, "GROUPS", (("tail",),))
    report = check(target("aborts"), "core")
    found = {r.id: r for r in report.results}
    assert report.exit_code == 1 and found["tail/1x197-fp32"].verdict == "CRASH"
    assert "SIGABRT" in found["tail/1x197-fp32"].detail
    assert found["tail/63-fp32"].verdict == found["tail/197x1-fp32"].verdict == "PASS"


@pytest.mark.parametrize(("name", "verdict"), [("exits", "CRASH"), ("calls_sys_exit", "REFUSED")])
def test_leaving_with_exit_code_0_is_no_pass(name, verdict, monkeypatch):
    monkeypatch.setattr(check_module, "GROUPS", (("tail",),))
    report = check(target(name), "core")
    found = {r.id: r.verdict for r in report.results}
    assert found["tail/1x197-fp32"] == verdict and found["tail/197x1-fp32"] == "PASS"
    assert report.exit_code == (1 if verdict == "CRASH" else 0)


def test_crash_after_crash_is_given_up_and_said(monkeypatch):
    monkeypatch.setattr(check_module, "GROUPS", (("tail",),))
    monkeypatch.setattr(check_module, "CRASHES_IN_A_ROW", 2)
    report = check(target("dies_often"), "core")
    assert report.exit_code == 1 and [r.verdict for r in report.results][-2:] == ["CRASH", "CRASH"]
    assert "given up after 2 crashes in a row" in report.errors[0] and "cases not run" in report.errors[0]
    assert "reproduce(" in report.results[-1].reproducer


def test_every_case_is_in_a_group():
    assert {c.group for c in ALL} == {name for names in check_module.GROUPS for name in names}


def test_a_hang_costs_one_case(monkeypatch):
    monkeypatch.setattr(check_module, "GROUPS", (("tail",),))
    monkeypatch.setattr(check_module, "CASE_SECONDS", 5.0)
    report = check(target("hangs"), "core")
    found = {r.id: r.verdict for r in report.results}
    assert found["tail/1x197-fp32"] == "TIMEOUT" and found["tail/197x1-fp32"] == "PASS" and report.exit_code == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: expected one of reference, tiled"),
        ("no_such_module:f", "no_such_module: cannot be imported"),
        ("missing.py:f", "missing.py: no such file"),
        (f"{FILE}:missing", "has no missing"),
        (f"{FILE}:not_a_function", "expected a function, got int"),
        (f"{FILE}:always_raises", "a plain call on cpu raises: fp32, width 16: RuntimeError: no kernel"),
    ],
)
def test_what_cannot_be_run_is_exit_code_2(name, message, monkeypatch):
    monkeypatch.setattr(check_module, "GROUPS", (("tail",),))
    code, out, err = command("check", name, monkeypatch=monkeypatch)
    assert code == 2 and message in out + err and "Traceback" not in out + err


def test_faults_of_the_command_line(monkeypatch):
    code, _, err = command("check", "reference", "--features", "causal,caussal", monkeypatch=monkeypatch)
    assert code == 2 and "caussal" in err
    if not torch.cuda.is_available():
        code, _, err = command("check", "reference", "--device", "cuda", monkeypatch=monkeypatch)
        assert code == 2 and "torch sees none" in err
    code, out, _ = command("check", "list", monkeypatch=monkeypatch)
    assert code == 0 and all(name in out for name in FEATURES)
    code, out, _ = command("explain", "197", "--dtype", "fp32", monkeypatch=monkeypatch)
    assert code == 0 and out.split(":")[0] in ("reference", "torch")


def test_the_report_as_json(tmp_path, monkeypatch):
    """verdict, claims and cases with id, verdict, error_ratio and reproducer; the same exit code."""
    monkeypatch.setattr(check_module, "GROUPS", (("tail", "gqa"),))
    file = tmp_path / "report.json"
    code, out, _ = command("check", f"{FILE}:wrong_tail", "--level", "core", "--json", str(file), monkeypatch=monkeypatch)
    report = json.loads(file.read_text())
    assert code == 1 and report["verdict"] == "fail" and not report["claims_declared"]
    assert {"fp32", "bf16", "fp16"} <= set(report["claims"]) and "softcap" not in report["claims"]
    case = next(c for c in report["cases"] if c["id"] == "tail/33-fp32")
    assert case["verdict"] == "FAIL" and case["error_ratio"] > 100
    assert "reproduce(" in case["reproducer"] and "FA#443" in case["cites"]
    assert "FAIL tail/33-fp32" in out and "resembles: FA#443" in out and "reproduce:" in out
    code, out, _ = command("check", "torch", "--level", "core", "--json", str(file), monkeypatch=monkeypatch)
    assert code == 0 and json.loads(file.read_text())["verdict"] == "pass" and out.rstrip().endswith(str(file))


def test_the_pytest_plugin(tmp_path):
    """One test a case, refused ones skipped with the reason, a failing one with its reproducer."""

    def run(*arguments):
        base = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
        return subprocess.run([*base, *arguments], cwd=tmp_path, capture_output=True, text=True)

    (tmp_path / "test_other.py").write_text("def test_not_collected():\n    raise RuntimeError\n")
    kernel = ("--attention-kernel", f"{FILE}:wrong_tail")
    done = run(*kernel, "--attention-level", "core", "-k", "tail/33-fp32 or softcap/5-")
    assert done.returncode == 1 and "1 failed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "test_attention[tail/33-fp32]" in done.stdout and "reproduce(" in done.stdout
    assert "refused: TypeError" in done.stdout and "not_collected" not in done.stdout
    done = run("--attention-kernel", "reference", "--attention-level", "core", "-k", "causal or gqa")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout
    done = run("--attention-kernel", "nowhere")
    assert done.returncode != 0 and "expected one of reference" in done.stdout + done.stderr
    assert "attention_kernel" not in run("--collect-only", str(ROOT / "tests" / "test_keyed.py")).stdout
