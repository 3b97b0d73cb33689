"""`selfsup runs`: every state by its own signs, damage named, old and read-only folders read, nothing written."""

import hashlib
import json
import multiprocessing
import os
import re
import time
from pathlib import Path

import pytest
import torch

from running import save_untrained
from selfsup import cli, run_folder, runs
from selfsup.config import validate
from selfsup.cost import CostMeter
from selfsup.probe.report import ProbeResult, Score, save_result
from selfsup.recipe import Recipe
from selfsup.runs import find_runs, held


def make_run(folder, steps=100, logged=(10, 20, 30), checkpoints=(20,), outcome=None, objective="mae"):
    """A run folder as training leaves it, without the weights."""
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / "config.yaml").write_text(f"objective:\n  name: {objective}\noptim:\n  steps: {steps}\n")
    (folder / "environment.json").write_text("{}")
    lines = (
        {"step": step, "loss": 1 / step, **({"knn": step / 100} if step == 20 else {})} for step in logged
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in checkpoints:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step:08d}" / "config.yaml").write_text(
            "a checkpoint's own, no run's"
        )
    if outcome is not None:
        (folder / "outcome.json").write_text(
            json.dumps({"state": outcome, "step": steps, "collapsed_at": None})
        )
    return folder


def in_another_process(action):
    """Starts `action(connection)` in a fork, which may hold locks that this process does not."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=action, args=(theirs,), daemon=True)
    process.start()
    return process, mine


def hold(folder):
    """A process that has claimed the folder, as training does."""

    def claim(connection):
        lock = run_folder.claim(folder, resume=True)
        connection.send("claimed")
        connection.recv()
        lock.close()

    process, connection = in_another_process(claim)
    assert connection.recv() == "claimed"
    return process


def one(folder):
    (found,), closed = find_runs(folder)
    assert closed == []
    return found


@pytest.mark.parametrize("state", ["finished", "interrupted", "stalled", "failed"])
def test_states_of_an_outcome(tmp_path, state):
    make_run(tmp_path / "a" / "run", outcome=state)
    found = one(tmp_path)
    assert (found.name, found.state, found.objective) == ("a/run", state, "mae")
    assert (found.step, found.steps, found.loss, found.knn, found.problems) == (100, 100, 1 / 30, 0.2, [])


def test_running_and_killed(tmp_path):
    folder = make_run(tmp_path / "run")
    assert one(tmp_path).state == "died"
    process = hold(folder)
    try:
        assert held(folder / ".lock") and one(tmp_path).state == "running"
        (folder / "outcome.json").write_text(
            '{"state": "interrupted", "step": 20}'
        )  # resumed: the lock tells
        assert one(tmp_path).state == "running"
        (folder / "outcome.json").unlink()
    finally:
        process.kill()
        process.join()
    found = one(tmp_path)
    assert (found.state, found.step) == ("died", 30)


def test_looking_takes_no_lock(tmp_path):
    """Claims while another process looks without a pause: none is refused."""
    folder = make_run(tmp_path / "run")

    def look(connection):
        connection.send("looking")
        while not connection.poll():
            held(folder / ".lock")

    process, connection = in_another_process(look)
    assert connection.recv() == "looking"
    for _ in range(300):
        run_folder.claim(folder, resume=True).close()
    assert process.is_alive()  # it looked till the end
    connection.send("enough")
    process.join()


def test_steps_are_the_later_of_log_and_checkpoint(tmp_path):
    make_run(tmp_path / "run", logged=(10,), checkpoints=(10, 45))
    assert one(tmp_path).step == 45


def test_a_torn_last_line_is_no_damage(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "loss": 0.0')
    found = one(tmp_path)
    assert (found.step, found.loss, found.problems) == (30, 1 / 30, [])


def test_before_the_first_line(tmp_path):
    make_run(tmp_path / "run", logged=(), checkpoints=())
    found = one(tmp_path)
    assert (found.step, found.loss, found.knn, found.cost, found.problems) == (0, None, None, None, [])


def result(**scores):
    data = {
        part: {"fingerprint": "f", "shards": "s", "samples": 3, "classes": 2} for part in ("train", "test")
    }
    pretrained = {name: Score((value,)) for name, value in scores.items()}
    every = {"pixels": {"logreg": Score((0.99,))}, "pretrained": pretrained}
    return ProbeResult("frozen", "fast", every, "runs", {}, ({"name": "x"},), {}, data, {}, 1.0)


def test_the_best_probe_of_pretrained_features(tmp_path):
    folder = make_run(tmp_path / "run")
    save_result(result(logreg=0.5, knn=0.6), folder / "probe" / "frozen-a.json")
    save_result(result(linear=0.7), folder / "probe" / "linear-b.json")
    (folder / "probe" / "representation-c.json").write_text('{"rankme": 3}')
    (folder / "probe" / "perplexity-d.json").write_text('{"measure": "perplexity", "perplexity": 9.5}')
    assert one(tmp_path).probe == ("linear", 0.7) and one(tmp_path).problems == []
    for path in folder.glob("probe/*-[ab].json"):
        path.unlink()
    (folder / "probe" / "perplexity-e.json").write_text('{"measure": "perplexity", "perplexity": null}')
    assert one(tmp_path).probe == ("perplexity", 9.5)


def test_cost_of_two_parts(tmp_path):
    folder = make_run(tmp_path / "run")
    for _ in range(2):
        meter = CostMeter(folder, 1, torch.device("cpu"), 7.0, powercap=tmp_path / "none")
        meter.record(0, 0)
        meter.record(1, 10)
    found = one(tmp_path)
    assert found.cost == meter.summary() and found.cost["flops"] == 140 and found.cost["parts"] == 2


DAMAGE = {
    "config.yaml": ("{", "not valid YAML"),
    "metrics.jsonl": ('{"step": 3\n', "metrics.jsonl: damaged: expected one JSON object a line"),
    "outcome.json": ("half", "outcome.json: damaged: expected one JSON object"),
    "cost.json": ('{"parts": [{}]}', "cost.json: damaged: expected the parts of a run"),
    "probe/a.json": ('{"scores": {}}', "a.json: damaged, not a probe's result"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_rest_read(tmp_path, name):
    folder = make_run(tmp_path / "run", outcome="finished")
    (folder / "probe").mkdir()
    content, words = DAMAGE[name]
    (folder / name).write_text(content)
    found = one(tmp_path)
    assert len(found.problems) == 1 and words in found.problems[0] and str(folder) in found.problems[0]
    assert found.state == ("unknown" if name == "outcome.json" else "finished")
    assert found.objective == (None if name == "config.yaml" else "mae")
    assert found.loss == (None if name == "metrics.jsonl" else 1 / 30)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_what_is_missing(tmp_path, name):
    (make_run(tmp_path / "run") / name).unlink()
    found = one(tmp_path)
    assert [name in problem for problem in found.problems] == ([True] if name == "config.yaml" else [])


def test_keys_of_another_kind_are_damage_too(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text("optim: 3\n")
    (folder / "outcome.json").write_text('{"step": 3}')
    found = one(tmp_path)
    assert [p.split(":")[1].strip() for p in found.problems] == ["in config", "in outcome"]
    assert found.state == "unknown"


def test_sorted_by_the_last_write(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        folder = make_run(tmp_path / name, outcome="finished")
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (time.time() - 1000 * age,) * 2)
    assert [run.name for run in find_runs(tmp_path)[0]] == ["old", "middle", "new"]
    os.utime(tmp_path / "old" / "metrics.jsonl")
    assert [run.name for run in find_runs(tmp_path)[0]] == ["middle", "new", "old"]


def digest(folder):
    return {str(p): (p.stat().st_mtime_ns, p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest())
            for p in sorted(folder.rglob("*"))}  # fmt: skip


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["selfsup", "runs", *map(str, arguments)])
    return cli.main()


def test_the_command(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "runs" / "mine", outcome="finished")
    make_run(tmp_path / "runs" / "deep" / "er" / "text", objective="clm")
    (tmp_path / "runs" / "deep" / "er" / "text" / "outcome.json").write_text("}")
    (tmp_path / "runs" / "notes").mkdir()
    before = digest(tmp_path)
    assert call(monkeypatch, tmp_path / "runs") == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "mine" in line)
    assert [cell.strip() for cell in re.split("[│┃]", row)[1:-2]] == [
        "mine", "mae", "finished", "100/100", "0.03333", "20.0% online knn", *["unknown"] * 4,
    ]  # fmt: skip
    assert "deep/er/text" in out and "notes" not in out and out.count("damaged    ") == 1
    assert digest(tmp_path) == before
    assert call(monkeypatch, tmp_path / "runs", "--json", "-") == 0
    content = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in content["runs"]] == [run.name for run in find_runs(tmp_path / "runs")[0]]
    assert call(monkeypatch, tmp_path / "runs", "--json", tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text()) == content
    assert call(monkeypatch, tmp_path / "runs" / "notes") == 0 and "no runs in it" in capsys.readouterr().out
    assert call(monkeypatch, tmp_path / "absent") == 2
    assert "absent: expected a folder with runs" in capsys.readouterr().err
    assert call(monkeypatch, tmp_path / "runs", "--json", tmp_path / "no" / "out.json") == 2


def test_a_read_only_folder(tmp_path):
    """To root nothing is read-only, so the source is asked too: it opens files to read alone."""
    make_run(tmp_path / "run", outcome="finished")
    for path in [*tmp_path.rglob("*"), tmp_path]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert one(tmp_path).state == "finished"
    finally:
        for path in [tmp_path, *tmp_path.rglob("*")]:
            path.chmod(0o755)
    source = Path(runs.__file__).read_text()
    assert re.findall(r"\.open\((.*?)\)", source) == ['"rb"']


def test_a_run_of_the_loop_itself(tmp_path):
    """What save_checkpoint and describe write is what is read here."""
    recipe = {
        "encoder": {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1},
        "objective": {"name": "mae", "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1},
        "data": {"shards": "x"},
        "optim": {"steps": 9},
        "run": {"dir": str(tmp_path / "run")},
    }
    folder = save_untrained(tmp_path / "run", recipe, 0.0, {"index_fingerprint": "f"}, 7)
    run_folder.describe(folder, validate(Recipe, recipe), 1, torch.device("cpu"))
    run_folder.write_outcome(folder, "interrupted", 7, 5)
    found = one(tmp_path)
    assert (found.state, found.step, found.steps, found.objective) == ("interrupted", 7, 9, "mae")
    assert found.collapsed_at == 5 and found.problems == []
