"""`selfsup scaling run`: cells to a table, through failures, divergence and kills."""

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml

from running import final_state, make_shards
from scaling_sweeps import Here
from scaling_tables import ROOT
from selfsup.config import validate
from selfsup.recipe import Recipe
from selfsup.scaling.cell import folder_of, run_cell, spent
from selfsup.scaling.held_out import held_out_batches, mean_loss
from selfsup.scaling.plan import Plan, make_plan, write_plan
from selfsup.scaling.sweep import make_executor, open_sweep, run_sweep
from selfsup.scaling.sweep_config import HeldOut
from text_runs import make_token_shards, tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_token_shards(folder / "train"), make_token_shards(folder / "test", seed=1)


def written(folder, data, objective="clm", grid=None, optim=None, **changes):
    base = {
        "objective": {"name": objective},
        "encoder": {"vocab_size": tokenizer().vocab_size, "max_length": 12, "embed_dim": 8, "depth": 1, "num_heads": 1,
                    "causal": objective == "clm"},
        "data": {"shards": str(data[0])},
        "optim": {"schedule": "linear", "base_lr": 1e-2, **(optim or {})}, "run": {"dir": "base", "device": "cpu"},
    }  # fmt: skip
    sweep = {
        "recipe": "base.yaml", "held_out": {"shards": str(data[1]), "samples": 20, "batch": 7},
        "ladder": {"widths": [8, 16], "depths": [1, 1], "head_dim": 8},
        "grid": grid or {"name": "product", "samples": [600, 1200]},
        "rule": {"name": "fixed", "lr": 1e-2, "batch": 60}, "floors": {"steps": 1}, **changes,
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def planned(folder, data, **options) -> Plan:
    return make_plan(written(folder, data, **options), None, 1e9)


def rows(folder):
    return list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))


def compared(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)]


def test_every_cell_becomes_a_row(tmp_path, data):
    plan, out, executor = planned(tmp_path, data), tmp_path / "out", Here()
    states = run_sweep(plan, out, executor, 1, 0, pause=0.0)
    assert [state["state"] for state in states.values()] == ["done"] * 4
    table = rows(out)
    assert [row["cell"] for row in table] == [cell.id for cell in plan.as_cells()] == executor.ran
    for row in table:
        assert 0 < float(row["loss"]) < float(row["initial_loss"]) and row["fit"] == "1" and row["reason"] == ""
        assert int(row["unique"]) % 12 == 0 and 0 < int(row["unique"]) < 1500  # 60 documents of 2 to 40 letters
        assert float(row["initial_loss"]) == pytest.approx(np.log(tokenizer().vocab_size), rel=0.01)
    before = (out / "results.csv").read_bytes()
    again = Here()
    run_sweep(plan, out, again, 1, 0, pause=0.0)
    assert again.ran == [] and (out / "results.csv").read_bytes() == before


def test_a_failing_and_a_diverging_cell_stop_no_other(tmp_path, data):
    plan, out = planned(tmp_path, data), tmp_path / "out"
    first, second, third, fourth = plan.as_cells()
    third.recipe["optim"]["base_lr"] = 1e12
    executor = Here([second.id])
    states = run_sweep(plan, out, executor, 1, 2, pause=0.0)
    assert [states[c.id]["state"] for c in (first, second, third, fourth)] == ["done", "failed", "diverged", "done"]
    assert executor.breaks[second.id] == 3 and executor.ran.count(third.id) == 1
    table = {row["cell"]: row for row in rows(out)}
    assert table[second.id]["loss"] == table[third.id]["loss"] == ""
    assert "ended without a word" in table[second.id]["reason"] and "attempt 3" in table[second.id]["reason"]
    assert table[third.id]["reason"]
    run_sweep(plan, out, mended := Here(), 1, 2, pause=0.0)
    assert mended.ran == []  # a failed cell stays so until it is asked for
    states = run_sweep(plan, out, mended, 1, 2, pause=0.0, again=True)
    assert mended.ran == [second.id] and states[second.id]["state"] == "done"


def test_a_fault_of_the_users_is_in_the_table(tmp_path, data):
    plan, out = planned(tmp_path, data), tmp_path / "out"
    plan.config["held_out"]["samples"] = 10_000
    states = run_sweep(plan, out, Here(), 1, 0, pause=0.0)
    assert {state["state"] for state in states.values()} == {"failed"}
    assert all("held_out.samples: expected at most the" in row["reason"] for row in rows(out))


def test_a_later_plan_keeps_what_both_have(tmp_path, data):
    out = tmp_path / "out"
    run_sweep(planned(tmp_path, data), out, Here(), 1, 0, pause=0.0)
    wider = planned(tmp_path, data, grid={"name": "product", "samples": [1200, 2400]})
    executor = Here()
    run_sweep(wider, out, executor, 1, 0, pause=0.0)
    assert len(executor.ran) == 2
    table = rows(out)
    assert len(table) == 6 and sum(row["fit"] == "1" for row in table) == 4  # those left are there, and not fitted


def test_branches_are_runs_of_their_own_bit_for_bit(tmp_path, data):
    """A branch of the trunk ends with the weights of the same recipe trained from its first step."""
    optim = {"schedule": "wsd", "warmup_fraction": 0.1, "decay_fraction": 0.2}
    plan = planned(tmp_path, data, grid={"name": "trunk", "samples": [600, 1200, 2400]}, optim=optim,
                   ladder={"widths": [8], "depths": [1], "head_dim": 8})  # fmt: skip
    out = tmp_path / "out"
    states = run_sweep(plan, out, Here(), 1, 0, pause=0.0)
    assert [state["state"] for state in states.values()] == ["done"] * 3
    branch = plan.as_cells()[1]
    assert branch.trunk == plan.as_cells()[0].id and branch.branch_step == 8
    alone = planned(tmp_path, data, grid={"name": "trunk", "samples": [600, 1200, 2400]}, optim=optim,
                    ladder={"widths": [8], "depths": [1], "head_dim": 8})  # fmt: skip
    alone.cells[1].update(trunk=None, branch_step=None)
    lock, _ = open_sweep(alone, tmp_path / "alone")
    lock.close()
    run_cell(str(tmp_path / "alone"), branch.id)
    ours, theirs = (final_state(folder_of(folder, branch.id)) for folder in (out, tmp_path / "alone"))
    assert ours == theirs
    assert {row["cluster"] for row in rows(out)} == {branch.trunk}
    # And without its trunk it does not run from elsewhere: it fails, and says why.
    states = run_sweep(plan, tmp_path / "broken", Here([branch.trunk]), 1, 0, pause=0.0)
    assert [state["state"] for state in states.values()] == ["failed"] * 3
    assert states[branch.id]["reason"].startswith(f"its trunk {branch.trunk}")


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_held_out_loss_of_text_is_the_slow_sum(tmp_path, data, objective):
    plan = planned(tmp_path, data, objective=objective)
    cell = plan.as_cells()[0]
    recipe = Recipe.model_validate({**cell.recipe, "run": {**cell.recipe["run"], "dir": "x"}})
    held = HeldOut(shards=str(data[1]), samples=20, batch=7)
    torch.manual_seed(0)
    model = recipe.objective.build(recipe.encoder).double()
    batches = held_out_batches(recipe, held)
    assert [len(batch.tokens) for batch in batches] == [7, 7, 6]
    total = count = 0
    for batch in batches:
        states = model.encoder.encode(batch).flatten(0, 1)
        scores = model.logits(states) if objective == "clm" else model.logits(batch)
        scores = scores if batch.where is None or objective == "mlm" else scores[batch.where]
        for row, label in zip(scores, batch.labels.tolist()):
            total += (torch.logsumexp(row, 0) - row[label]).item()
            count += 1
    assert mean_loss(model, batches) == pytest.approx(total / count, rel=1e-9)
    # The same masks whatever the seed of training, and whatever batches the evaluation takes.
    other = recipe.model_copy(update={"seed": 5, "optim": recipe.optim.model_copy(update={"steps": 7})})
    for one, two in zip(batches, held_out_batches(other, held)):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels)
    tokens = torch.cat([batch.tokens for batch in batches])
    whole = held_out_batches(recipe, HeldOut(shards=str(data[1]), samples=20, batch=20))
    assert torch.equal(tokens, whole[0].tokens)


def test_held_out_loss_of_images(tmp_path):
    shards = make_shards(tmp_path / "test")
    content = {
        "objective": {"name": "mae", "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1},
        "encoder": {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 1},
        "data": {"shards": "unused", "mean": [0.4], "std": [0.3]}, "run": {"dir": "x"},
    }  # fmt: skip
    recipe = validate(Recipe, content)
    torch.manual_seed(0)
    model = recipe.objective.build(recipe.encoder)
    batches = held_out_batches(recipe, HeldOut(shards=str(shards), samples=50, batch=16))
    found = mean_loss(model, batches)
    total = 0.0
    for batch in batches:
        for i in range(len(batch.images)):
            pred, mask = model.eval().predict(batch.images[i : i + 1], model.noise(batch)[i : i + 1])
            patches = batch.images[i].unfold(1, 4, 4).unfold(2, 4, 4).reshape(16, 16)
            wanted = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, keepdim=True) + 1e-6).sqrt()
            errors = (pred[0] - wanted).square().mean(1)
            total += float(errors[mask[0] > 0].mean())
    assert found == pytest.approx(total / 50, rel=1e-4)
    with pytest.raises(ValueError, match="held_out.samples: expected at most the 83 images"):
        held_out_batches(recipe, HeldOut(shards=str(shards), samples=84))


def test_a_spent_budget_of_steps_is_divergence(tmp_path):
    assert not spent(tmp_path, 0)
    (tmp_path / "skipped.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in (3, 4, 4)))
    assert spent(tmp_path, 1) and not spent(tmp_path, 2)


def test_slurm_gets_the_same_cells(tmp_path, data, monkeypatch):
    """SLURM's commands stand in by scripts: the submitted script is kept, and then run as it is."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "sbatch": f'for last; do :; done; cp "$last" {tmp_path}/submitted.sh; echo "Submitted batch job 7"',
        "srun": "exit 0", "sacct": "echo 'JobID|State'; echo '7|COMPLETED'", "scancel": "exit 0",
    }  # fmt: skip
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    plan, out = planned(tmp_path, data), tmp_path / "out"
    lock, _ = open_sweep(plan, out)
    lock.close()
    executor = make_executor(out, "slurm", 90, 1, "small")
    executor.submit(run_cell, str(out), plan.as_cells()[0].id)
    script = (tmp_path / "submitted.sh").read_text()
    for line in ("--cpus-per-task=1", "--gpus-per-node=1", "--job-name=selfsup-cell", "--nodes=1",
                 "--ntasks-per-node=1", "--partition=small", "--time=90"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script, script
    command = script.rstrip().splitlines()[-1]
    assert command.startswith("srun") and "submitit.core._submit" in command and str(out / "jobs") in command


def test_no_slurm_here_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="--where slurm: .*use --where local"):
        make_executor(tmp_path, "slurm", 1, 0, None)


def start(plan, out):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "selfsup.cli", "scaling", "run", plan, "--out", out, "--workers", "1", "--anyway"]
    return subprocess.Popen(list(map(str, words)), env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_killed_at_random_and_resumed_gives_the_same_table(tmp_path, data):
    """submitit's local executor for real: the command and its cells killed, then started again."""
    plan, path = planned(tmp_path, data, ladder={"widths": [8], "depths": [1], "head_dim": 8}), tmp_path / "plan.json"
    write_plan(plan, path)
    run_sweep(plan, tmp_path / "whole", Here(), 1, 0, pause=0.0)
    out, pick = tmp_path / "out", random.Random(4)
    first = start(path, out)
    deadline = time.monotonic() + 60
    while not list(out.glob("cells/*/environment.json")):  # a cell is at work
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    time.sleep(pick.uniform(0, 0.3))
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    first.wait()
    assert json.loads((out / "state.json").read_text())
    second = start(path, out)
    said = second.communicate(timeout=120)[0].decode()
    assert second.returncode == 0, said
    assert compared(out) == compared(tmp_path / "whole")
    assert "scaling fit" in said and "2 of 2 cells over" in said


def test_a_folder_of_something_else_is_refused(tmp_path, data):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is there and is no sweep"):
        open_sweep(planned(tmp_path, data), tmp_path / "other")
