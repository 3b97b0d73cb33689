"""`selfsup scaling plan`: the file, the refusals, and the recentring after a pilot."""

import json
import sys

import numpy as np
import pytest

from scaling_sweeps import BASE, SWEEP, written
from selfsup import cli
from selfsup.scaling import law
from selfsup.scaling.analyse import analyse
from selfsup.scaling.plan import design_of, fitted, make_plan, read_plan
from selfsup.scaling.result import write_result
from selfsup.scaling.simulate import linear_sd
from selfsup.scaling.table import runs_of
from selfsup.scaling.timing import STEPS, timed


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["selfsup", "scaling", *map(str, words)])
    code = cli.main()
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_plan_is_printed_and_written(tmp_path, monkeypatch, capsys):
    out = tmp_path / "plan.json"
    code, said, _ = run(monkeypatch, capsys, "plan", written(tmp_path), "--json", out, "--flop-per-second", "1e9")
    plan = read_plan(out)
    assert code == 0 and plan.refused == [] and "expected of a law fitted to them (200 simulations" in said
    assert len(plan.cells) == 14 and sum(cell["role"] == "hold-out" for cell in plan.cells) == 2
    total = sum(cell["counts"]["flops_counted"] for cell in plan.cells)
    assert sum(plan.hours.values()) == pytest.approx(total / 1e9 / 3600)
    low, high = plan.expected["a_interval"]
    assert low < 0.5 < high and plan.expected["target"] == 6e12 and plan.expected["a"] == 0.5
    assert plan.vocab == 128 and plan.command.startswith("selfsup scaling plan ")
    have = {(cell["size"], round(np.log(cell["flops"]), 1)) for cell in plan.cells if cell["role"] == "grid"}
    assert len(plan.proposals) == 3
    assert not have & {(p["size"], round(np.log(p["flops"]), 1)) for p in plan.proposals}
    shown_and_worth_it(plan, said)


def shown_and_worth_it(plan, said):
    """Each proposal is printed, costs its FLOPs at the speed that was given, and lowers what the one before left."""
    lines = [line for line in said.splitlines() if line.startswith("  next best: ")]
    assert len(lines) == len(plan.proposals) == 3
    for line, p in zip(lines, plan.proposals):
        assert p["size"] in line and f"{p['flops']:.3g} FLOPs" in line and f"becomes {p['sd']:.2%}" in line
        assert p["hours"] == pytest.approx(p["flops"] / 1e9 / 3600)
    values = {name: plan.prior[name] for name in ("E", "A", "B", "alpha", "beta")}
    design = design_of([cell for cell in plan.as_cells() if fitted(cell)])
    before = linear_sd(design, values, plan.expected["noise"], plan.expected["target"])
    assert before > plan.proposals[0]["sd"] > plan.proposals[1]["sd"] > plan.proposals[2]["sd"] > 0


def test_the_best_next_cells_are_proposed_after_a_pilot(tmp_path, monkeypatch, capsys):
    """By the law that the pilot found: printed, and in the file."""
    truth = {**SWEEP["prior"], "A": 200.0}
    path, out, fit = written(tmp_path), tmp_path / "plan.json", tmp_path / "fit.json"
    words = ["plan", path, "--json", out, "--flop-per-second", "1e9"]
    assert run(monkeypatch, capsys, *words)[0] == 0
    first = read_plan(out)
    cells = [cell for cell in first.as_cells() if fitted(cell)]
    params, samples = (np.array([getattr(cell, key) for cell in cells]) for key in ("params", "samples"))
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(len(cells)))
    loss = law.chinchilla(**truth, params=params, samples=samples) * noise
    write_result(analyse(runs_of(params, samples, loss), "chinchilla", resamples=100), fit)
    code, said, _ = run(monkeypatch, capsys, *words, "--pilot", fit)
    assert code == 0
    second = read_plan(out)
    assert second.prior_from.startswith("fit.json") and second.prior["A"] != first.prior["A"]
    shown_and_worth_it(second, said)
    assert second.proposals != first.proposals


def test_a_design_that_identifies_nothing_is_refused(tmp_path, monkeypatch, capsys):
    """Two budgets, near one another, of three sizes each."""
    grid = {"name": "isoflop", "budgets": [1e11, 1.5e11], "per_budget": 3}
    out = tmp_path / "plan.json"
    words = ["plan", written(tmp_path, grid=grid, noise=0.03), "--flop-per-second", "1e9", "--json", out]
    code, said, _ = run(monkeypatch, capsys, *words)
    assert code == 1 and "REFUSED, it cannot identify the law" in said
    assert {found["check"] for found in read_plan(out).refused} >= {"compute span", "loose exponent"}


@pytest.mark.parametrize("factor", [40.0, 1 / 40])
def test_the_pilot_recentres_the_grid(tmp_path, factor):
    """A prior whose optimum is far too large or too small; the runs follow another law. Two rounds find it."""
    truth = SWEEP["prior"]
    wrong = {**truth, "A": truth["A"] * factor}
    path, pilot = written(tmp_path, prior=wrong), None
    draw = np.random.default_rng(3)
    first = None
    for _ in range(3):
        plan = make_plan(path, pilot, 1e9)
        cells = [cell for cell in plan.as_cells() if cell.role == "grid"]
        first = first or cells
        params, samples = (np.array([getattr(cell, key) for cell in cells]) for key in ("params", "samples"))
        clean = law.chinchilla(**truth, params=params, samples=samples)
        loss = clean * np.exp(0.002 * draw.standard_normal(len(cells)))
        result = analyse(runs_of(params, samples, loss), "chinchilla", resamples=100)
        pilot = tmp_path / "fit.json"
        write_result(result, pilot)
    assert edges(first, truth) > 0 and edges(cells, truth) == 0
    assert plan.prior_from.startswith("fit.json")


def edges(cells, truth):
    """Budgets whose best size, by the true law, is the first or the last of those that were taken, and of the ladder's
    own range has neighbours beyond."""
    count = 0
    for budget in {cell.budget for cell in cells}:
        row = sorted((cell for cell in cells if cell.budget == budget), key=lambda cell: cell.params)
        loss = [float(law.chinchilla(**truth, params=cell.params, samples=cell.samples)) for cell in row]
        count += int(np.argmin(loss)) in (0, len(row) - 1)
    return count


def test_steps_are_timed_and_torch_is_as_it_was(tmp_path):
    import torch

    plan = make_plan(written(tmp_path, grid={"name": "product", "samples": [1e5, 1e6, 4e6]}), None, 1e9)
    cell = plan.as_cells()[0]
    from selfsup.scaling.timing import cell_recipe, hours_of

    state, threads = torch.get_rng_state(), torch.get_num_threads()
    speed = timed(cell_recipe(cell, "unused"))
    assert speed.seconds > 0 and STEPS == 3
    assert speed.flop_per_second * speed.seconds == pytest.approx(cell.counts["flops_counted"] / cell.steps)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    hours, speeds = hours_of([cell, cell._replace(id="branch", branch_step=cell.steps // 2)])
    assert len(speeds) == 1 and hours["branch"] == pytest.approx(hours[cell.id] / 2, rel=0.01)


@pytest.mark.parametrize("name", ["mlm", "mae", "simclr", "byol"])
def test_every_objective_can_be_timed(name):
    from selfsup.config import validate
    from selfsup.recipe import Recipe

    text = name == "mlm"
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    content = {
        "objective": {"name": name, **(decoder if name == "mae" else {})},
        "encoder": {**BASE["encoder"], "causal": False} if text else {"img_size": 16, "patch_size": 4, "embed_dim": 16,
                                                                       "depth": 1, "num_heads": 2},
        "data": {"shards": "x", **({} if name in ("mlm", "mae") else {"views": "simclr-32"})},
        "optim": {"batch_size": 4}, "run": {"dir": "x"},
    }  # fmt: skip
    assert timed(validate(Recipe, content), steps=1).seconds > 0


def test_faults_are_one_line(tmp_path, monkeypatch, capsys):
    path = written(tmp_path, params="matrixes")
    code, _, errors = run(monkeypatch, capsys, "plan", path)
    assert code == 2 and errors.startswith("error: params: expected") and errors.count("\n") == 1
    (tmp_path / "other.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(ValueError, match="not a plan; expected what selfsup scaling plan"):
        read_plan(tmp_path / "other.json")
    ignored = written(tmp_path, held_out={"shards": "test", "temperature": 0.5})
    with pytest.raises(ValueError, match="held_out.temperature: is not used by clm"):
        make_plan(ignored, None, 1e9)
    simclr = {"objective": {"name": "simclr"}, "encoder": {}, "data": {"shards": "x", "views": "simclr"}}
    for content, text in (({"batch": 100}, "expected a divisor of held_out.samples 512, got 100"),
                          ({"neighbours": "x"}, "held_out.neighbours: is not used by simclr")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            make_plan(written(tmp_path, base=simclr, held_out={"shards": "test", **content}), None, 1e9)
