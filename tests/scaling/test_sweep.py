"""`selfsup scaling run`: cells to a table, through failures, divergence and kills."""

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from running import final_state, make_shards
from scaling_sweeps import Here
from scaling_tables import ROOT
from selfsup.checkpoint import load_objective
from selfsup.config import validate
from selfsup.data.images import EvalImages
from selfsup.data.index import open_shards
from selfsup.data.pack import pack_arrays
from selfsup.recipe import Recipe
from selfsup.scaling.cell import LOCK, folder_of, held_by, run_cell, spent
from selfsup.scaling.held_out import held_out_batches, mean_loss, measure_of
from selfsup.scaling.plan import Plan, make_plan, write_plan
from selfsup.scaling.sweep import fit_command, make_executor, open_sweep, run_sweep
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
        assert (row["steps_done"], row["skipped"]) == (row["steps"], "0")
        assert float(row["flops_done"]) == pytest.approx(float(row["flops"]), rel=0.01)
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


def test_flops_done_are_those_of_torchs_counter(tmp_path, data):
    """All that a cell computes, less its two evaluations; and a plan that counted otherwise is found out."""
    plan, out = planned(tmp_path, data, grid={"name": "product", "samples": [1200]}), tmp_path / "out"
    cell, other = plan.as_cells()
    other.counts["flops_counted"] *= 1.02
    executor = Here([other.id])
    with FlopCounterMode(display=False) as everything:
        run_sweep(plan, out, executor, 1, 0, pause=0.0)
    recipe = Recipe.model_validate({**cell.recipe, "run": {**cell.recipe["run"], "dir": "x"}})
    measure = measure_of(recipe, HeldOut(**plan.config["held_out"]))
    with FlopCounterMode(display=False) as twice:
        measure(recipe.objective.build(recipe.encoder))
        measure(recipe.objective.build(recipe.encoder))
    row = rows(out)[0]
    assert float(row["flops_done"]) == pytest.approx(everything.get_total_flops() - twice.get_total_flops(), rel=0.01)
    states = run_sweep(plan, out, Here(), 1, 0, pause=0.0, again=True)
    assert states[other.id]["state"] == "failed" and "-2.0% off the" in states[other.id]["reason"]


def test_the_fit_that_is_printed_judges_the_first_loss(tmp_path, data):
    """By ln V, for clm and mlm; the objectives without a vocabulary have no such loss."""
    for objective in ("clm", "mlm"):
        plan = planned(tmp_path, data, objective=objective)
        assert f"--initial-loss initial_loss --vocab {tokenizer().vocab_size} " in fit_command(plan, tmp_path)
    assert "--vocab" not in fit_command(replace(plan, vocab=None), tmp_path)


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
    states = json.loads((out / "state.json").read_text())  # killed before the end of an earlier plan's cell was noted
    left = next(name for name in states if name not in {cell.id for cell in wider.as_cells()})
    states[left].update(state="running", result={})
    (out / "state.json").write_text(json.dumps(states))
    executor = Here()
    run_sweep(wider, out, executor, 1, 0, pause=0.0)
    assert len(executor.ran) == 2
    table = rows(out)
    assert len(table) == 6 and sum(row["fit"] == "1" for row in table) == 4  # those left are there, and not fitted
    assert all(row["state"] == "done" and row["loss"] for row in table)


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


def images_recipe(name, shards, **changes):
    """A small ViT on grey images, two views of each."""
    kinds = [{"count": 2, "hue": 0.0, "saturation": 0.0, "grey": 0.0}]
    objective = {"name": name, "hidden_dim": 8, "out_dim": 4, **changes.pop("objective", {})}
    return validate(Recipe, {
        "objective": objective,
        "encoder": {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 1},
        "data": {"shards": str(shards), "views": kinds, "mean": [0.4], "std": [0.3]}, "run": {"dir": "x"}, **changes,
    })  # fmt: skip


def test_held_out_loss_of_simclr_is_a_slow_loop_at_a_fixed_batch_and_temperature(tmp_path):
    """InfoNCE by hand; the same views and the same number for cells that train with another seed, batch, temperature."""
    shards = make_shards(tmp_path / "test", samples=24)
    held = HeldOut(shards=str(shards), samples=24, batch=8, temperature=0.25)
    one = images_recipe("simclr", "unused")
    other = images_recipe("simclr", "other", objective={"temperature": 0.7}, seed=3,
                          optim={"batch_size": 6})  # fmt: skip
    torch.manual_seed(0)
    model = one.objective.build(one.encoder)
    found = measure_of(one, held)(model)
    torch.manual_seed(0)
    warm = other.objective.build(other.encoder)
    assert measure_of(other, held)(warm) == found
    total = 0.0
    first, second = held_out_batches(one, held), held_out_batches(other, held)
    assert len(first) == 3
    for batch, again in zip(first, second):
        assert all(torch.equal(a, b) for a, b in zip(batch.views, again.views))
        with torch.no_grad():
            views = [model.eval().projector(model.encoder(view)).double() for view in batch.views]
        z = [[row / row.norm() for row in view] for view in views]
        for a in range(2):
            for i in range(8):
                scores = {(b, j): float(z[a][i] @ z[b][j]) / 0.25 for b in range(2) for j in range(8)}
                del scores[a, i]
                total += float(np.log(sum(np.exp(s) for s in scores.values()))) - scores[1 - a, i]
    assert found == pytest.approx(total / 48, rel=1e-5)
    assert measure_of(one, held.model_copy(update={"temperature": 0.1}))(model) != pytest.approx(found, rel=1e-3)


def labelled_noise(folder, count, seed, labels=None):
    """Noise, brighter by a little from class to class."""
    labels = np.arange(count) % 3 if labels is None else labels
    noise = np.random.default_rng(seed).integers(0, 200, (count, 16, 16))
    pack_arrays((noise + 20 * labels.clip(0)[:, None, None]).astype(np.uint8), labels, ["a", "b", "c"], folder, 30)
    return folder


def test_byol_is_judged_by_its_nearest_neighbours(tmp_path):
    """The error of a slow vote by labelled images, the same ones whatever a cell trains on."""
    train, test = labelled_noise(tmp_path / "train", 60, 0), labelled_noise(tmp_path / "test", 83, 1)
    held = HeldOut(shards=str(test), samples=40, batch=16, neighbours=str(train), neighbour_samples=50)
    recipe = images_recipe("byol", "unused")
    torch.manual_seed(0)
    model = recipe.objective.build(recipe.encoder)
    found = measure_of(recipe, held)(model)

    def features(shards, count):
        index = open_shards(str(shards))
        images, labels, _ = EvalImages(index, 16, 1).__getitems__(np.arange(count))
        with torch.no_grad():
            return model.eval().encoder((images.float() / 255 - 0.4) / 0.3).double(), labels

    (known, names), (asked, truth) = features(train, 50), features(test, 40)
    wrong = 0
    for feature, label in zip(asked, truth.tolist()):
        near = [float(feature @ row / feature.norm() / row.norm()) for row in known]
        votes = dict.fromkeys(range(3), 0.0)
        for i in sorted(range(50), key=lambda i: -near[i])[:20]:
            votes[int(names[i])] += np.exp(near[i] / 0.07)
        wrong += max(votes, key=votes.get) != label
    assert found == pytest.approx(wrong / 40) and 0 < found < 1
    other = images_recipe("byol", "elsewhere", seed=4)
    assert measure_of(other, held)(model) == found
    with pytest.raises(ValueError, match="held_out.samples: expected at most the 83 images"):
        measure_of(recipe, held.model_copy(update={"samples": 84}))
    with pytest.raises(ValueError, match="first 2 images of .* are of 2 of its 3 classes"):
        measure_of(recipe, held.model_copy(update={"samples": 2}))
    bare = tmp_path / "bare"
    labelled_noise(bare, 30, 2, labels=np.full(30, -1))
    with pytest.raises(ValueError, match="held_out.shards .*: 30 of 30 samples have no label.*nearest-neighbour probe"):
        measure_of(recipe, held.model_copy(update={"shards": str(bare)}))


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_cells_of_two_views_end_with_their_measure(tmp_path, name):
    """From the plan to the row: what stands there is what the cell's last checkpoint has."""
    train, test = labelled_noise(tmp_path / "train", 60, 0), labelled_noise(tmp_path / "test", 40, 1)
    base = images_recipe(name, train).model_dump(mode="json")
    base["run"] = {"dir": "base", "device": "cpu"}
    only = {"neighbour_samples": 50} if name == "byol" else {"temperature": 0.2}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({
        "recipe": "base.yaml", "held_out": {"shards": str(test), "samples": 40, "batch": 20, **only},
        "ladder": {"widths": [8], "depths": [1], "head_dim": 8}, "grid": {"name": "product", "samples": [300]},
        "rule": {"name": "fixed", "lr": 3e-3, "batch": 20}, "floors": {"steps": 1}, "flops": "parameters",
    }))  # fmt: skip
    plan, out = make_plan(tmp_path / "sweep.yaml", None, 1e9), tmp_path / "out"
    assert plan.vocab is None and plan.objective == name
    run_sweep(plan, out, Here(), 1, 0, pause=0.0)
    row, folder = rows(out)[0], folder_of(out, plan.as_cells()[0].id)
    objective, recipe, *_ = load_objective(folder)
    y = measure_of(recipe, HeldOut(**plan.config["held_out"]))(objective)
    if row["state"] == "done":
        assert float(row["loss"]) == y < float(row["initial_loss"])
    else:  # on noise nothing may be learned
        assert y >= float(row["initial_loss"]) and "not below the untrained" in row["reason"]
    assert float(row["flops_done"]) == pytest.approx(float(row["flops"]))


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


def at_work(out, name, process):
    """The process that has a cell in hand."""
    deadline = time.monotonic() + 300
    while held_by(folder_of(out, name)) is None:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return int(held_by(folder_of(out, name)).split()[1])


def read_until(process, text):
    """Reads what a process says up to a text; a process that never says it is killed, and the test fails."""
    patience = threading.Timer(300, process.kill)
    patience.start()
    found = any(text in line.decode() for line in process.stdout)
    patience.cancel()
    assert found, f"{text!r} was not said"


@pytest.mark.slow
def test_cells_left_by_a_killed_command_are_neither_run_twice_nor_lost(tmp_path, data):
    """kill -9 of the command alone. Its cell goes on; the next start waits for it; where the cell is killed as well while
    it is waited for, it is run anew. The cells are held by SIGSTOP, so that nothing hangs on a race."""
    ladder, grid = {"widths": [8], "depths": [1], "head_dim": 8}, {"name": "product", "samples": [6000, 9000]}
    plan, path, out = planned(tmp_path, data, ladder=ladder, grid=grid), tmp_path / "plan.json", tmp_path / "out"
    one, two = (cell.id for cell in plan.as_cells())
    write_plan(plan, path)
    run_sweep(plan, tmp_path / "whole", Here(), 1, 0, pause=0.0)
    command, left = start(path, out), []
    try:
        for name in (one, two):
            left.append(psutil.Process(at_work(out, name, command)))
            left[-1].suspend()
            command.kill()
            command.wait()
            assert left[-1].status() == psutil.STATUS_STOPPED  # it outlives the command
            command = start(path, out)
            read_until(command, f"{name}: still at work since an earlier start (process {left[-1].pid} on ")
            (left[-1].resume if name == one else left[-1].kill)()
        said = command.communicate(timeout=300)[0].decode()
    finally:
        for process in (command, *(process for process in left if process.is_running())):
            process.kill()
    assert command.returncode == 0, said
    table = compared(out)
    assert [row["state"] for row in table] == ["done", "done"] and table == compared(tmp_path / "whole")
    states = json.loads((out / "state.json").read_text())
    assert (states[one]["failures"], states[two]["failures"]) == (0, 1)
    # The first was started once, the second once more: by no start while another process had it.
    assert len(list((out / "jobs").glob("*_submitted.pkl"))) == 3


def test_a_cell_waits_for_whoever_has_it(tmp_path, data):
    """Two starts of one cell at once: the later one does nothing until the earlier is over, and then takes its result."""
    plan, out = planned(tmp_path, data), tmp_path / "out"
    open_sweep(plan, out)[0].close()
    name = plan.as_cells()[0].id
    folder = folder_of(out, name)
    folder.mkdir(parents=True)
    holds = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
        "print('held', file=f, flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", holds, str(folder / LOCK)], stdin=subprocess.PIPE)
    while held_by(folder) != "held":
        assert holder.poll() is None
        time.sleep(0.02)
    waiting = threading.Thread(target=run_cell, args=(str(out), name))
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive() and held_by(folder) == "held" and [p.name for p in folder.iterdir()] == [LOCK]
    (folder / "result.json").write_text(json.dumps({"state": "done", "loss": 1.0}))
    holder.communicate(b"\n")
    waiting.join(60)
    assert not waiting.is_alive() and not (folder / "config.yaml").exists() and held_by(folder) is None


def test_a_folder_of_something_else_is_refused(tmp_path, data):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is there and is no sweep"):
        open_sweep(planned(tmp_path, data), tmp_path / "other")
