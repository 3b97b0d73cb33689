"""`selfsup scaling plan`: the file, the refusals, and the recentring after a pilot."""

import json
import sys

import numpy as np
import pytest

from scaling_sweeps import BASE, SWEEP, written
from selfsup import cli
from selfsup.scaling import law
from selfsup.scaling.analyse import analyse
from selfsup.scaling.plan import make_plan, read_plan
from selfsup.scaling.result import write_result
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


@pytest.mark.parametrize("name", ["mlm", "mae", "simclr"])
def test_every_objective_can_be_timed(name):
    from selfsup.config import validate
    from selfsup.recipe import Recipe

    text = name == "mlm"
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    content = {
        "objective": {"name": name, **(decoder if name == "mae" else {})},
        "encoder": {**BASE["encoder"], "causal": False} if text else {"img_size": 16, "patch_size": 4, "embed_dim": 16,
                                                                       "depth": 1, "num_heads": 2},
        "data": {"shards": "x", **({"views": "simclr-32"} if name == "simclr" else {})},
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
    byol = {"objective": {"name": "byol"}, "encoder": {}, "data": {"shards": "x", "views": "byol"}}
    with pytest.raises(ValueError, match="byol's own loss says nothing"):
        make_plan(written(tmp_path, base=byol), None, 1e9)
