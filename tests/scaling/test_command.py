"""`selfsup scaling` as it is typed: files, exit codes, one line a fault."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from scaling_tables import ROOT, TRUTH, checkpoint_design, isoflop_design, simulated
from selfsup import cli
from selfsup.scaling import law, report
from selfsup.scaling.assemble import largest_run, make_result
from selfsup.scaling.result import read_result
from selfsup.scaling.rules import steplaw
from selfsup.scaling.speed import measured_flop_per_second

FIT = ["--params", "N", "--samples", "D", "--loss", "loss", "--resamples", "200"]


def run(monkeypatch, capsys, *words):
    """Exit code, output, errors."""
    monkeypatch.setattr(sys, "argv", ["selfsup", "scaling", *map(str, words)])
    try:
        code = cli.main()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def write(path, params, samples, loss, **more):
    names = ["N", "D", "loss", *more]
    rows = zip(params, samples, loss, *more.values())
    path.write_text("\n".join([",".join(names), *(",".join(str(v) for v in row) for row in rows)]) + "\n")
    return path


@pytest.fixture
def table(tmp_path):
    params, samples = isoflop_design(budgets=6, sizes=7, reach=5)
    runs = simulated(params, samples, 0.001)
    flops = np.repeat(np.geomspace(1e18, 1e20, 6), 7)
    return write(tmp_path / "runs.csv", params, samples, runs.loss, budget=flops, unique=samples / 3)


@pytest.fixture
def fitted(table, tmp_path, monkeypatch, capsys):
    out = tmp_path / "fit.json"
    assert run(monkeypatch, capsys, "fit", table, *FIT, "--json", out)[0] == 0
    return out


def test_the_file_holds_what_was_promised(fitted):
    content = json.loads(fitted.read_text())
    assert content["form"] == "chinchilla" and set(content["coefficients"]) == set(TRUTH)
    assert set(content["exponents"]) == {"a", "b"} and content["refused"] == []
    assert content["exponents"]["a"] == pytest.approx(0.514, abs=0.03)
    for name in (*TRUTH, "a", "b"):
        low, high, level = content["intervals"][name]
        assert low < high and level == 0.95
    assert content["objective"] > 0 and isinstance(content["warnings"], list)
    held = content["extrapolation"]
    assert held["held_out"] == 7 and held["mean_error"] < held["baseline_mean_error"]
    at = content["anchor"]
    again = law.chinchilla(**content["coefficients"], params=at["params"], samples=at["samples"])
    assert again == pytest.approx(at["loss"], rel=1e-12)


@pytest.mark.parametrize("form", ["tied", "kaplan", "isoflop"])
def test_other_forms(form, table, tmp_path, monkeypatch, capsys):
    out = tmp_path / "fit.json"
    code, said, _ = run(
        monkeypatch, capsys, "fit", table, *FIT, "--budget", "budget", "--form", form, "--json", out
    )
    assert code == 0 and f"{form}:" in said
    code, said, _ = run(monkeypatch, capsys, "predict", "--fit", out, "--flops", "1e21")
    assert code == 0 and "parameters N" in said and "samples D" in said
    assert run(monkeypatch, capsys, "report", "--fit", out, "--out", tmp_path / "report")[0] == 0


def test_repeats(table, tmp_path, monkeypatch, capsys):
    params, samples = isoflop_design(budgets=5, sizes=6)
    unique = samples / np.tile([1.0, 3.0, 10.0], 10)
    loss = law.repeats(TRUTH, 15.0, 5.0, params, samples, unique)
    path = write(tmp_path / "repeats.csv", params, samples, loss, U=unique)
    base, out = tmp_path / "base.json", tmp_path / "fit.json"
    assert run(monkeypatch, capsys, "fit", table, *FIT, "--json", base)[0] == 0
    words = [*FIT, "--unique", "U", "--form", "repeats", "--json", out]
    code, said, _ = run(monkeypatch, capsys, "fit", path, *words)
    assert code == 0 and "R_D" in said
    result = read_result(out)
    assert result.coefficients["R_D"] == pytest.approx(15, rel=0.01)
    low, high, _ = result.intervals["E"]
    assert low <= result.coefficients["E"] <= high
    assert run(monkeypatch, capsys, "fit", path, *words, "--base", out)[0] == 2  # no base law of its own
    assert run(monkeypatch, capsys, "fit", path, *words, "--base", base)[0] == 0
    assert np.ptp(read_result(out).draws["E"]) > 0
    code, said, _ = run(
        monkeypatch, capsys, "predict", "--fit", out, "--flops", "1e21", "--unique-samples", "1e9"
    )
    assert code == 0 and "epochs" in said
    assert run(monkeypatch, capsys, "report", "--fit", out, "--out", tmp_path / "report")[0] == 0
    content = json.loads(base.read_text())
    content["refused"] = [{"check": "loose exponent", "value": 0.5, "limit": 0.4, "text": "a is loose"}]
    base.write_text(json.dumps(content))
    code, said, _ = run(monkeypatch, capsys, "fit", path, *words, "--base", base)
    assert code == 1 and "base law: loose exponent: of the base law: a is loose" in said


def test_bnsl(tmp_path, monkeypatch, capsys):
    x = np.geomspace(1e6, 1e12, 30)
    loss = law.broken(1.5, 40.0, 0.1, 0.25, 1e9, 0.4, x) * np.exp(
        1e-3 * np.random.default_rng(0).standard_normal(30)
    )
    path, out = write(tmp_path / "b.csv", x, x, loss), tmp_path / "fit.json"
    words = [
        "fit",
        path,
        "--samples",
        "D",
        "--loss",
        "loss",
        "--form",
        "bnsl",
        "--resamples",
        "100",
        "--json",
        out,
    ]
    by_size = [word if word != "--samples" else "--params" for word in words]
    assert run(monkeypatch, capsys, *by_size)[0] == 0 and read_result(out).about["axis"] == "D"
    assert run(monkeypatch, capsys, *words)[0] == 0
    code, said, _ = run(monkeypatch, capsys, "predict", "--fit", out, "--at", "1e13")
    assert code == 0 and "10 times beyond" in said
    assert run(monkeypatch, capsys, "report", "--fit", out, "--out", tmp_path / "report")[0] == 0
    code, _, error = run(monkeypatch, capsys, "predict", "--fit", out, "--flops", "1e13")
    assert code == 2 and "give --at" in error


def test_a_plan(fitted, tmp_path, monkeypatch, capsys):
    out = tmp_path / "plan.json"
    code, said, _ = run(monkeypatch, capsys, "predict", "--fit", fitted, "--flops", "1e21", "--json", out)
    assert code == 0 and "10 times the compute" in said and "wasted" in said and "learning rate" not in said
    found = json.loads(out.read_text())
    n, low, high = found["values"]["params"]
    d = found["values"]["samples"][0]
    assert low < n < high and 6 * n * d == pytest.approx(1e21)
    assert found["price"]["2"][0] > 0 and 0 < found["price"]["2"][1] < 1
    assert found["rules"] == {}
    words = ["predict", "--fit", fitted, "--flops", "1e21", "--rule", "porian", "steplaw", "--level", "0.975"]
    code, said, _ = run(monkeypatch, capsys, *words, "--json", out)
    assert code == 0 and "(97.5%)" in said and "porian" in said and "olmo" not in said
    assert json.loads(out.read_text())["rules"]["steplaw"] == pytest.approx(steplaw(n, d))
    hours = ["predict", "--fit", fitted, "--hours", "2", "--flop-per-second", "1e17", "--json", out]
    assert run(monkeypatch, capsys, *hours)[0] == 0
    assert json.loads(out.read_text())["flops"] == pytest.approx(7.2e20)
    code, said, _ = run(monkeypatch, capsys, "predict", "--fit", fitted, "--hours", "1e6")
    assert code == 0 and "measured now" in said


def test_scarce_data(fitted, monkeypatch, capsys):
    code, said, _ = run(
        monkeypatch, capsys, "predict", "--fit", fitted, "--flops", "1e21", "--unique-samples", "1e9"
    )
    assert code == 0 and "epochs" in said and "R_D = 15.4" in said
    code, said, _ = run(
        monkeypatch, capsys, "predict", "--fit", fitted, "--flops", "1e21", "--unique-samples", "1e13"
    )
    assert code == 0 and "R_D" not in said


def test_a_refused_fit_plans_nothing(tmp_path, monkeypatch, capsys):
    params = np.geomspace(1e8, 1e10, 20)
    runs = simulated(params, 20 * params, 0.002)
    path, out = write(tmp_path / "one.csv", params, 20 * params, runs.loss), tmp_path / "fit.json"
    code, said, _ = run(monkeypatch, capsys, "fit", path, *FIT, "--json", out)
    assert code == 1 and "REFUSED" in said and "one D/N" in said
    assert {"one ratio"} <= {found["check"] for found in json.loads(out.read_text())["refused"]}
    assert run(monkeypatch, capsys, "report", "--fit", out, "--out", tmp_path / "report")[0] == 0
    code, _, error = run(monkeypatch, capsys, "predict", "--fit", out, "--flops", "1e22")
    assert code == 2 and "refused as a ground for plans" in error and "one ratio" in error
    code, said, _ = run(monkeypatch, capsys, "predict", "--fit", out, "--params", "2e10", "--samples", "4e11")
    assert code == 0 and "loss" in said and "was refused for plans" in said


def test_the_report_stands_alone(fitted, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "report"
    code, said, _ = run(monkeypatch, capsys, "report", "--fit", fitted, "--out", folder)
    assert code == 0
    names = {"isoflop", "approaches", "residuals", "prediction", "identified", "profiles"}
    assert (
        {path.stem for path in folder.glob("*.svg")} == names == {path.stem for path in folder.glob("*.png")}
    )
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    page = (folder / "report.html").read_text()
    seen = []

    class Look(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append(tag)
            for key, value in attrs:
                assert key not in ("href", "onload"), tag
                assert key != "src" or value.startswith("data:image/"), value

    Look().feed(page)
    assert seen.count("img") == len(names) and "script" not in seen and "link" not in seen
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(monkeypatch, capsys, "report", "--fit", fitted, "--out", folder)[0] == 0
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}  # the same bytes again
    (folder / "report.html").write_text("mine")
    code, _, error = run(monkeypatch, capsys, "report", "--fit", fitted, "--out", folder)
    assert code == 2 and "not an earlier report" in error and (folder / "report.html").read_text() == "mine"


def test_a_strangers_names_are_escaped(tmp_path, monkeypatch, capsys):
    params, samples = isoflop_design(budgets=6, sizes=7, reach=5)
    path = write(tmp_path / "<b>.csv", params, samples, simulated(params, samples, 0.001).loss)
    out = tmp_path / "fit.json"
    assert run(monkeypatch, capsys, "fit", path, *FIT, "--json", out)[0] == 0
    assert run(monkeypatch, capsys, "report", "--fit", out, "--out", tmp_path / "r")[0] == 0
    page = (tmp_path / "r" / "report.html").read_text()
    assert "<b>.csv" not in page and "&lt;b&gt;.csv" in page


def test_a_torn_fit_is_one_line(fitted, monkeypatch, capsys):
    content = json.loads(fitted.read_text())
    for key, value in (
        ("coefficients", {"E": 1.0}),
        ("anchor", {}),
        ("exponents", {}),
    ):
        fitted.write_text(json.dumps({**content, key: value}))
        code, _, error = run(monkeypatch, capsys, "predict", "--fit", fitted, "--flops", "1e21")
        assert code == 2 and "a part is missing" in error and error.count("\n") == 1


@pytest.mark.parametrize("edit", ["rounded", "exponent"])
def test_an_edited_fit_is_noticed(fitted, edit, monkeypatch, capsys):
    """Rounded coefficients predict other losses."""
    content = json.loads(fitted.read_text())
    if edit == "rounded":
        content["coefficients"] = {
            name: float(f"{value:.3g}") for name, value in content["coefficients"].items()
        }
    else:
        content["exponents"]["a"] = 0.5
    fitted.write_text(json.dumps(content))
    code, _, error = run(monkeypatch, capsys, "predict", "--fit", fitted, "--flops", "1e21")
    assert code == 2 and ("edited or rounded" in error if edit == "rounded" else "exponents.a" in error)


FAULTS = [
    (["fit", "TABLE", "--samples", "D", "--loss", "loss"], "expected --params COL"),
    (
        ["fit", "TABLE", "--params", "N", "--loss", "loss"],
        "expected --samples COL (tokens or images) or --flops COL",
    ),
    (["fit", "TABLE", "--params", "N", "--samples", "D", "--loss", "los"], "no column 'los'. Perhaps 'loss'"),
    (["fit", "NONE", *FIT], "cannot read the table"),
    (["fit", "TABLE", *FIT, "--form", "bnsl"], "has one axis: expected one of --params, --samples, --flops"),
    (["fit", "TABLE", *FIT, "--form", "repeats"], "expected --unique COL"),
    (["fit", "TABLE", *FIT, "--where", "budget=7"], "no row has it"),
    (["fit", "TABLE", *FIT, "--drop-highest", "99"], "expected fewer than the 42 usable rows, got 99"),
    (["fit", "TABLE", *FIT[:-2], "--resamples", "10"], "expected 0 or at least 100"),
    (["fit", "TABLE", *FIT, "--flops-per", "-6"], "--flops-per: expected a positive number"),
    (["fit", "TABLE", *FIT, "--vocab", "1"], "--vocab: expected at least 2"),
    (["fit", "TABLE", *FIT, "--delta", "0"], "--delta: expected a positive number"),
    (["fit", "TABLE", *FIT, "--drop-highest", "38"], "expected at least 5 rows, got 4"),
    (["fit", "TABLE", *FIT, "--base", "OUT"], "--base: is for --form repeats, got chinchilla"),
    (
        ["fit", "TABLE", *FIT, "--form", "isoflop", "--also-params", "N"],
        "--also-params: is for --form chinchilla",
    ),
    (["fit", "TABLE", *FIT, "--form", "isoflop", "--delta", "0.01"], "--delta: is for --form chinchilla"),
    (["fit", "TABLE", *FIT, "--warmup", "D"], "--warmup: expected --steps too"),
    (["predict", "--fit", "NONE", "--flops", "1"], "cannot read the fit: No such file"),
    (["predict", "--fit", "TABLE", "--flops", "1"], "cannot read the fit: it is not JSON"),
    (["predict", "--fit", "OUT"], "expected one of --flops C, --hours T"),
    (["predict", "--fit", "OUT", "--flops", "1e20", "--hours", "3"], "got 2"),
    (["predict", "--fit", "OUT", "--flops", "-1"], "expected a positive number"),
    (["predict", "--fit", "OUT", "--params", "1e9"], "expected both"),
    (["predict", "--fit", "OUT", "--at", "1e9"], "is for a fit of form bnsl"),
    (["predict", "--fit", "OUT", "--hours", "1", "--flop-per-second", "0"], "expected a positive number"),
    (["predict", "--fit", "OUT", "--flops", "1e20", "--level", "95"], "expected 0 < x < 1"),
    (
        ["predict", "--fit", "OUT", "--flops", "1e20", "--level", "0.9999"],
        "--level 0.9999: expected a fit of at least 40000 resamples (4 / (1 - level)), it has 200; fit again with "
        "--resamples 40000, or take a level of 0.98 or less",
    ),
    (["predict", "--fit", "OUT", "--params", "1e9", "--samples", "1e10", "--level", "0.99"], "at least 400 resamples"),
    (["predict", "--fit", "OUT", "--params", "1e9", "--samples", "1e10", "--rule", "olmo"], "--rule: is for a plan"),
    (["report", "--fit", "OUT", "--out", "TABLE"], "cannot write it"),
]


@pytest.mark.parametrize(("words", "said"), FAULTS, ids=[str(k) for k in range(len(FAULTS))])
def test_one_line_a_fault(words, said, fitted, table, tmp_path, monkeypatch, capsys):
    names = {"TABLE": table, "OUT": fitted, "NONE": tmp_path / "none"}
    before = sorted(tmp_path.iterdir())
    code, _, error = run(monkeypatch, capsys, *(names.get(word, word) for word in words))
    assert code == 2 and said in error and error.count("\n") == 1 and error.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


def test_sweeps_and_vocabularies_are_judged_for_every_form(table, tmp_path, monkeypatch, capsys):
    rows = table.read_text().splitlines()
    table.write_text("\n".join([rows[0] + ",lr", *(row + ",0.01" for row in rows[1:])]) + "\n")
    for form in ("chinchilla", "isoflop"):
        words = ["fit", table, *FIT, "--lr", "lr", "--vocab", "10", "--form", form]
        said = run(monkeypatch, capsys, *words)[1]
        assert "one learning rate (0.01) for all sizes" in said and "not below ln 10" in said


def test_a_law_without_one_of_its_terms_is_drawn(tmp_path, monkeypatch, capsys):
    """A = 0: no optimum is finite; the refusal still has its report."""
    path, out = tmp_path / "one.csv", tmp_path / "fit.json"
    path.write_text(
        "N,D,loss\n1e8,2e9,3.1\n2e8,4e9,2.9\n4e8,8e9,2.7\n8e8,1.6e10,2.55\n1.6e9,3.2e10,2.4\n3.2e9,6.4e10,2.3\n"
    )
    assert run(monkeypatch, capsys, "fit", path, *FIT, "--json", out)[0] == 1
    assert json.loads(out.read_text())["coefficients"]["A"] == 0
    assert run(monkeypatch, capsys, "report", "--fit", out, "--out", tmp_path / "report")[0] == 0


def test_constant_losses(tmp_path, monkeypatch, capsys):
    """No curve has a minimum; the laws are refused, and their files are read and drawn, what is not finite included."""
    out, folder = tmp_path / "fit.json", tmp_path / "report"
    words = [*FIT[:-1], "100", "--json", out]
    params, samples = isoflop_design(budgets=6, sizes=7, reach=5)
    path = write(tmp_path / "flat.csv", params, samples, [3.0] * 42)
    code, _, error = run(monkeypatch, capsys, "fit", path, *words, "--form", "isoflop")
    assert code == 2 and "two with a minimum" in error and error.count("\n") == 1 and not out.exists()
    for form in ("chinchilla", "kaplan"):
        assert run(monkeypatch, capsys, "fit", path, *words, "--form", form)[0] == 1
        assert run(monkeypatch, capsys, "report", "--fit", out, "--out", folder)[0] == 0
    assert json.loads(out.read_text())["extrapolation"]["mean_error"] is None


def test_coefficients_that_are_not_finite_are_one_line():
    runs = simulated(*isoflop_design(), 0.001)
    values = {"Nc": np.inf, "Dc": 1e10, "alpha_N": 0.1, "alpha_D": 0.1}
    with pytest.raises(ValueError, match="the fit has no finite Nc"):
        make_result("kaplan", runs, values, {}, 0.0, [], {}, None, largest_run(runs), {})


@pytest.mark.parametrize("form", ["chinchilla", "kaplan", "isoflop", "bnsl"])
def test_impossible_sizes_are_one_line(form, tmp_path, monkeypatch, capsys):
    """Their powers overflow. 1e400 is no number to a computer: that row is left out and counted."""
    params, samples = isoflop_design(budgets=4, sizes=5)
    loss = simulated(params, samples, 0.001).loss
    path, out = write(tmp_path / "t.csv", [1e-300, *params[1:]], samples, loss), tmp_path / "fit.json"
    words = FIT if form != "bnsl" else ["--params", "N", "--loss", "loss"]
    code, _, error = run(monkeypatch, capsys, "fit", path, *words, "--form", form, "--json", out)
    assert code == 2 and error.startswith("error: line 2: ") and "1e-300: expected 1e-30 to" in error
    assert error.count("\n") == 1 and not out.exists()
    if form == "isoflop":
        write(path, ["1e400", *params[1:]], samples, loss)
        said = run(monkeypatch, capsys, "fit", path, *FIT[:-1], "0", "--form", form)[1]
        assert "left out: 1 N missing or no number" in said


def test_a_report_that_fails_leaves_nothing(fitted, tmp_path, monkeypatch):
    """The third picture fails: none is there. Before, those already drawn were."""
    done = []

    def failing(figure, kind):
        done.append(kind)
        if len(done) > 3:
            raise ZeroDivisionError
        return b"a picture"

    monkeypatch.setattr(report, "render", failing)
    with pytest.raises(ZeroDivisionError):
        report.write_report(read_result(fitted), tmp_path / "report")
    assert len(done) == 4 and not (tmp_path / "report").exists()


def test_what_is_left_out_is_said(table, monkeypatch, capsys):
    with table.open("a") as file:
        file.write("1e9,2e10,nan,1e20,1\n1e9,,3.0,1e20,1\n")
    code, said, _ = run(monkeypatch, capsys, "fit", table, *FIT)
    assert code == 0 and "44 rows, 42 used" in said
    assert "left out: 1 loss missing or NaN" in said and "left out: 1 D missing" in said


def test_measured_noise(tmp_path, monkeypatch, capsys):
    params, samples = isoflop_design(budgets=6, sizes=7, reach=5)
    loss = simulated(params, samples, 0.001).loss
    sigma = [*map(str, np.where(np.arange(40) % 2, 0.03, 0.002)), "", "0"]
    path, out = write(tmp_path / "runs.csv", params, samples, loss, sd=sigma), tmp_path / "fit.json"
    code, said, _ = run(monkeypatch, capsys, "fit", path, *FIT, "--sigma", "sd", "--json", out)
    assert code == 0 and "rows weigh 1 / sigma over its median (--sigma): 0.533 to 8" in said
    assert "left out: 1 sd missing or no number" in said and "left out: 1 sd zero or negative" in said
    assert json.loads(out.read_text())["about"]["weights"] == pytest.approx([8 / 15, 8])
    code, _, error = run(monkeypatch, capsys, "fit", path, *FIT, "--sigma", "sd", "--form", "isoflop")
    assert code == 2 and "--sigma: is for --form chinchilla, tied, kaplan, got isoflop" in error


def test_rows_are_no_runs(tmp_path, monkeypatch, capsys):
    """With --cluster the text counts rows as rows: 128 checkpoints of 32 runs."""
    params, samples, cluster = checkpoint_design()
    loss = simulated(params, samples, 0.002, cluster=cluster).loss
    path = write(tmp_path / "runs.csv", params, samples, loss, run=cluster)
    code, said, _ = run(monkeypatch, capsys, "fit", path, *FIT, "--cluster", "run")
    assert code == 0 and "128 rows, 128 used, 32 runs" in said and "resamples of 32 runs" in said
    assert "largest runs held out (28 of 128 rows, up" in said


def test_nothing_imports_torch():
    """The command starts fast."""
    script = (
        "import sys, selfsup.scaling.command, selfsup.scaling.report, selfsup.scaling.sweep_report; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=dict(os.environ))


def test_a_machine_is_measured():
    assert measured_flop_per_second(128, 0.05) > 1e8


def test_every_check_is_documented():
    folder = ROOT / "ssl" / "selfsup" / "scaling"
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    names = set(re.findall(r'Finding\(\s*"([^"]+)"', source)) - {"few "}
    assert len(names) > 30
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert not [name for name in names if name not in text]
