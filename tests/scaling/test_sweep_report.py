"""The report of a sweep: expected beside found, held-out runs beside predictions, no cell unnamed. Losses are a law's."""

import json
import shlex
import sys
from dataclasses import replace
from html import escape
from types import SimpleNamespace

import numpy as np
import pytest

from scaling_sweeps import written
from selfsup import cli
from selfsup.durable import write_atomically
from selfsup.scaling import law
from selfsup.scaling.plan import make_plan
from selfsup.scaling.result import read_result
from selfsup.scaling.sweep import fit_command, open_sweep, table
from selfsup.scaling.sweep_report import lines, sections, summarise, unidentified

TRUTH = {"E": 1.0, "A": 60.0, "B": 300.0, "alpha": 0.4, "beta": 0.4}


@pytest.fixture
def sweep(tmp_path):
    """A sweep whose cells have the losses of a law, one diverged, one failed, one held-out run 3% off."""
    plan = replace(make_plan(written(tmp_path), None, 1e9), command="selfsup scaling plan 'my sweep.yaml'")
    folder = tmp_path / "my sweep"
    lock, states = open_sweep(plan, folder)
    lock.close()
    draw = np.random.default_rng(2)
    held = []
    for state in states.values():
        cell = SimpleNamespace(**state["cell"])
        loss = float(law.chinchilla(**TRUTH, params=cell.params, samples=cell.samples))
        loss *= float(np.exp(0.002 * draw.standard_normal()))
        state["result"] = {
            "state": "done", "loss": loss, "initial_loss": float(np.log(128)), "unique": 10**12, "seconds": 1.0,
        }  # fmt: skip
        state["state"] = "done"
        if cell.role == "hold-out":
            held.append(state)
    held[0]["result"]["loss"] *= 1.03
    names = list(states)
    states[names[0]].update(state="diverged", reason="held-out loss <nan>", result={"loss": None})
    states[names[1]].update(state="failed", reason="its process ended without a word", result={})
    write_atomically(folder / "state.json", json.dumps(states).encode())
    write_atomically(folder / "results.csv", table(states).encode())
    return plan, folder, [names[0], names[1]]


def fit(plan, folder, monkeypatch):
    words = shlex.split(fit_command(plan, folder))
    monkeypatch.setattr(sys, "argv", [*words, "--resamples", "200"])
    cli.main()
    return read_result(folder / "fit.json")


def test_the_page_says_it_all(sweep, tmp_path, monkeypatch, capsys):
    plan, folder, lost = sweep
    result = fit(plan, folder, monkeypatch)
    assert result.about["rows_used"] == 10
    summary = summarise(result, folder)
    assert summary.states == "1 diverged, 1 failed, 12 done"
    assert [row[0] for row in summary.without_loss[1:]] == lost
    assert len(summary.held_out) == 3
    errors = [float(row[-1].rstrip("%")) for row in summary.held_out[1:]]
    assert -4 < errors[0] < -2 and abs(errors[1]) < 1  # 3% above the law: predicted 3% too low
    words = ["report", "--fit", folder / "fit.json", "--out", tmp_path / "page", "--sweep", folder]
    monkeypatch.setattr(sys, "argv", ["selfsup", "scaling", *map(str, words)])
    assert cli.main() == 0
    said = capsys.readouterr().out
    page = (tmp_path / "page" / "report.html").read_text()
    low, high = plan.expected["a_interval"]
    for text in (f"{low:.3f} to {high:.3f}", *lost, "It foretold 2 held-out runs"):
        assert text in page and text in said
    assert "&lt;nan&gt;" in page and "<nan>" not in page
    # Every cell without a loss with its state and its reason; the design's interval beside the one that was found.
    for name, state, reason in zip(lost, ("diverged", "failed"), ("held-out loss &lt;nan&gt;", "its process ended")):
        row = next(row for row in page.split("<tr>") if f"<td>{name}</td>" in row)
        assert f"<td>{state}</td>" in row and reason in row
    found = result.intervals["a"]
    assert f"<td>{low:.3f} to {high:.3f}</td><td>{found[0]:.3f} to {found[1]:.3f}</td>" in page
    # The commands: of the plan, of the fit, of the page itself.
    assert plan.command and escape(plan.command) in page and escape(result.about["command"]) in page
    assert escape(f"selfsup scaling report --fit '{folder / 'fit.json'}'") in page
    assert "\n".join(lines(summary)) in said


def test_what_is_not_identified_stands_in_the_page(sweep, tmp_path, monkeypatch):
    plan, folder, _ = sweep
    result = fit(plan, folder, monkeypatch)
    assert any(text.startswith("few runs: 10 runs") for text in unidentified(result))
    bare = replace(result, warnings=[], refused=[])
    assert unidentified(bare) == []
    free = replace(bare, intervals={**bare.intervals, "E": [0.1, None, 0.95]})
    assert unidentified(free) == ["E: its interval has no upper end"]
    finding = {"check": "one ratio", "value": 1.5, "limit": 2, "text": "D/N <lies> within 1.5"}
    page = "".join(sections(summarise(replace(bare, refused=[finding]), folder)))
    assert "<h3>Not identified</h3><ul><li>one ratio: D/N &lt;lies&gt; within 1.5</li></ul>" in page
    assert "nothing that is checked" in "".join(sections(summarise(bare, folder)))


def test_expected_and_found_are_of_one_size(sweep, monkeypatch):
    """The law's runs have the noise that the plan was told: the bootstrap's interval is of the size expected, wider as two
    cells of twelve are lost."""
    plan, folder, _ = sweep
    summary = summarise(fit(plan, folder, monkeypatch), folder)
    assert 0.3 < float(summary.expected[1][3]) < 8


def test_other_learning_rates_and_seeds(tmp_path, monkeypatch):
    """Probes are not fitted; which rate was best is said. The noise is that of the seeds' log losses, by hand."""
    plan = make_plan(written(tmp_path, probe_lr=[0.5, 2.0], repeat_seeds=[1, 2]), None, 1e9)
    folder = tmp_path / "sweep"
    lock, states = open_sweep(plan, folder)
    lock.close()
    logs: dict[tuple, list[float]] = {}
    for i, state in enumerate(states.values()):
        cell = SimpleNamespace(**state["cell"])
        loss = float(law.chinchilla(**TRUTH, params=cell.params, samples=cell.samples)) * (1 + 0.001 * (i % 3))
        if cell.role == "probe":  # at the smallest size both are worse, at the other half the rate is better
            smallest = cell.params == min(other["cell"]["params"] for other in states.values())
            loss *= 1.1 if smallest or cell.lr > 1e-3 else 0.9
        if cell.role == "repeat":
            logs.setdefault((cell.size, cell.steps), []).append(np.log(loss))
        state.update(state="done", result={"state": "done", "loss": loss, "initial_loss": 4.85, "unique": 10**12, "seconds": 1.0})
    for state in states.values():
        cell = state["cell"]
        if cell["role"] == "grid" and (cell["size"], cell["steps"]) in logs:
            logs[cell["size"], cell["steps"]].append(np.log(state["result"]["loss"]))
    write_atomically(folder / "state.json", json.dumps(states).encode())
    write_atomically(folder / "results.csv", table(states).encode())
    assert " --lr " not in fit_command(plan, folder)
    result = fit(plan, folder, monkeypatch)
    assert result.about["rows_used"] == 14  # 12 of the grid, 2 seeds
    summary = summarise(result, folder)
    assert [row[3] for row in summary.rates[1:]] == ["0.5", "1", "2"] * 2
    assert "best of those tried at 1 of 2 sizes: the law is of that rule." in summary.verdict
    (three,) = logs.values()
    assert len(three) == 3 and summary.expected[-1][2] == f"{np.std(three, ddof=1):.2g}"
    for state in states.values():  # an earlier plan's cells, of one more row of evaluation and another loss
        if state["cell"]["role"] == "grid":
            cell = dict(state["cell"], id=state["cell"]["id"] + "-old")
            states = {**states, cell["id"]: {**state, "cell": cell, "planned": False, "result": {"loss": 9.0}}}
    write_atomically(folder / "state.json", json.dumps(states).encode())
    assert summarise(result, folder).expected == summary.expected
    assert "Other learning rates" in "".join(sections(summary)) and "of the rule's" in "\n".join(lines(summary))


def test_faults(sweep, tmp_path, monkeypatch):
    plan, folder, _ = sweep
    result = fit(plan, folder, monkeypatch)
    with pytest.raises(ValueError, match="has no readable plan.json"):
        summarise(result, tmp_path)
    other = dict(result.rows, params=[2 * value for value in result.rows["params"]])
    with pytest.raises(ValueError, match="the fit has runs that are not of this sweep"):
        summarise(type(result)(**{**vars(result), "rows": other}), folder)
