"""The commands end to end: files, JSON, HParams, one table for one mode, few-shot draws."""

import dataclasses
import json
import statistics
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from selfsup import cli
from selfsup.data.index import open_shards
from selfsup.export.load import load_frozen
from selfsup.export.timm import export_timm
from selfsup.probe import fewshot
from selfsup.probe.features import encoder_features
from selfsup.probe.fewshot import FewshotRecipe, draw, probe_fewshot
from selfsup.probe.hparams import flatten, write_hparams
from selfsup.probe.knn import knn_accuracy
from selfsup.probe.report import load_result, metrics, print_results
from selfsup.probe.sources import Setup, open_labelled

CPU = torch.device("cpu")
COMMANDS = {
    "linear": "linear {} --epochs 1 --batch-size 100",
    "attentive": "attentive {} --epochs 1 --batch-size 100",
    "finetune": "finetune {} --epochs 0.5 --batch-size 50",
    "fewshot": "fewshot {} --per-class 1 3",
}


def selfsup(monkeypatch, line: str) -> int:
    monkeypatch.setattr("sys.argv", ["selfsup", "probe", *line.split(), *"--device cpu --threads 1".split()])
    return cli.main()


def results(run: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((run / "probe").iterdir())]


def hparams(folder: Path) -> tuple[dict, dict]:
    """Hyperparameters and metrics as TensorBoard reads them."""
    events = EventAccumulator(str(folder)).Reload()
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    started = HParamsPluginData.FromString(plugin.content).session_start_info.hparams
    values = {
        key: getattr(value, value.WhichOneof("kind")) for key, value in started.items()
    }  # numbers are doubles there
    return values, {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_writes_its_result_and_its_hparams_line(name, make_run, monkeypatch, capsys):
    run = make_run({"seed": 3})
    assert selfsup(monkeypatch, f"{COMMANDS[name].format(run)} --seeds 4 5") == 0
    (path,) = (run / "probe").iterdir()
    result = json.loads(path.read_text())
    mode = "paper" if name == "finetune" else "fast"
    assert path.name.startswith(f"{name}-{mode}-step-00000007-") and (result["probe"], result["mode"]) == (
        name,
        mode,
    )
    score = result["scores"]["pretrained"]["knn-3" if name == "fewshot" else name]
    assert score["mean"] == statistics.fmean(score["values"])
    assert score["std"] == statistics.stdev(score["values"]) and len(score["values"]) == 2
    assert [details["seed"] for details in score["details"]] == result["recipe"]["seeds"] == [4, 5]
    for part in ("train", "test"):
        index = open_shards(result["data"][part]["shards"])
        assert result["data"][part]["fingerprint"] == index.fingerprint and Path(index.folder).name == part
    assert result["sources"][0]["seed"] == 3 and result["sources"][0]["recipe"]["encoder"]["embed_dim"] == 24
    assert result["versions"]["torch"] == version("torch") and result["seconds"] > 0
    assert str(path) in capsys.readouterr().out
    values, measured = hparams(run / "tensorboard" / f"probe-{path.stem}")
    assert values["probe"] == name and values["mode"] == mode and values["seeds"] == "4 5"
    assert values["pretraining.encoder.depth"] == 2 and values["pretraining.seed"] == 3
    assert values.get("epochs", 1) == result["recipe"].get("epochs", 1)
    tag = "probe/knn-3-fast" if name == "fewshot" else f"probe/{name}-{mode}"
    assert measured[tag] == pytest.approx(score["mean"])
    # Again: the same file and line, the same numbers.
    assert selfsup(monkeypatch, f"{COMMANDS[name].format(run)} --seeds 4 5") == 0
    (again,) = results(run)
    assert again["scores"] == result["scores"] and again["recipe"] == result["recipe"]
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_finetune_from_scratch_has_a_file_and_a_recipe_of_its_own(make_run, monkeypatch, capsys):
    run = make_run()
    for option in ("", "--scratch", "--layer-decay 0.8"):
        assert selfsup(monkeypatch, f"{COMMANDS['finetune'].format(run)} {option}") == 0
    found = {
        (kind, result["recipe"]["scratch"], result["recipe"]["layer_decay"])
        for result in results(run)
        for kind in result["scores"]
    }
    assert found == {("pretrained", False, 0.65), ("scratch", True, 1.0), ("pretrained", False, 0.8)}
    assert "trained from scratch" in capsys.readouterr().out
    tags = {tag for folder in (run / "tensorboard").iterdir() for tag in hparams(folder)[1]}
    assert tags == {"probe/finetune-paper", "probe/finetune-paper/scratch"}
    two = f"{run} {make_run({'seed': 9}, 'other')}"
    assert selfsup(monkeypatch, f"{COMMANDS['finetune'].format(two)} --scratch") == 2
    assert "--scratch: nothing of a run enters but its architecture" in capsys.readouterr().err


def test_several_runs_give_one_value_each_and_baselines_are_theirs(make_run, monkeypatch):
    runs = [make_run({"seed": seed}, f"run{seed}") for seed in (1, 2)]
    line = f"{COMMANDS['linear'].format(f'{runs[0]} {runs[1]}')} --seeds 0 1 --baselines pixels random"
    assert selfsup(monkeypatch, line) == 0
    (result,) = results(runs[0])
    assert not (runs[1] / "probe").exists() and set(result["scores"]) == {"pretrained", "random", "pixels"}
    score = result["scores"]["pretrained"]["linear"]
    for value, details in zip(score["values"], score["details"], strict=True):
        assert value == statistics.fmean(each["accuracy"] for each in details["seeds"])
    assert len(result["scores"]["random"]["linear"]["values"]) == 2
    assert result["scores"]["pixels"]["linear"]["std"] is None  # they belong to no run
    assert result["spread"].startswith("runs")


def test_frozen_probe_has_its_hparams_line(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr(
        "sys.argv", ["selfsup", "probe", str(run), "--baselines", "random", "--device", "cpu"]
    )
    assert cli.main() == 0
    (result,) = results(run)
    assert (
        set(result["scores"]) == {"random", "pretrained"} and "not asked for" in result["left_out"]["pixels"]
    )
    (folder,) = (run / "tensorboard").iterdir()
    values, measured = hparams(folder)
    assert values["probe"] == "frozen" and values["knn.k"] == 20
    assert measured["probe/logreg-fast"] == pytest.approx(result["scores"]["pretrained"]["logreg"]["mean"])
    assert set(measured) == {f"probe/{p}-fast{k}" for p in ("logreg", "knn") for k in ("", "/random")}


def test_modes_and_data_are_never_mixed(make_run, monkeypatch, capsys, digits):
    run = make_run()
    assert selfsup(monkeypatch, COMMANDS["linear"].format(run)) == 0
    assert selfsup(monkeypatch, f"{COMMANDS['linear'].format(run)} --mode paper") == 0
    assert selfsup(monkeypatch, COMMANDS["attentive"].format(run)) == 0
    names = sorted((run / "probe").iterdir())
    attentive, fast, paper = map(load_result, names)
    assert (fast.mode, paper.mode) == ("fast", "paper") and len(names) == 3
    assert not set(metrics(fast)) & set(metrics(paper))  # no column of TensorBoard holds both
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["selfsup", "probe", "show", str(names[1]), str(names[2])])
    assert cli.main() == 2 and "mode: linear is paper, linear is fast" in capsys.readouterr().err
    console = Console(record=True, width=120)
    print_results([fast, attentive], console)
    assert "linear probe" in console.export_text() and fast.to_json() == names[1].read_text()
    other = dataclasses.replace(
        attentive, data={**attentive.data, "test": {**attentive.data["test"], "fingerprint": "x"}}
    )
    with pytest.raises(ValueError, match="test: .* are different data"):
        print_results([fast, other], console)
    (run / "probe" / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="x.json: not a probe's result"):
        load_result(run / "probe" / "x.json")


def test_an_export_is_probed_with_data_given(make_run, digits, tmp_path, monkeypatch, capsys):
    folder = export_timm(make_run()).folder
    shards = f"--train {digits / 'train'} --test {digits / 'test'}"
    for name, line in COMMANDS.items():
        assert selfsup(monkeypatch, f"{line.format(folder)} {shards} --out {tmp_path / name}.json") == 0
        assert json.loads((tmp_path / f"{name}.json").read_text())["sources"][0]["recipe"] is None
    assert selfsup(monkeypatch, f"{COMMANDS['linear'].format(folder)} {shards} --baselines random") == 2
    assert "has no recipe of ours" in capsys.readouterr().err
    assert selfsup(monkeypatch, f"{COMMANDS['finetune'].format(folder)} {shards} --scratch") == 2
    assert selfsup(monkeypatch, COMMANDS["linear"].format(folder)) == 2
    assert selfsup(monkeypatch, f"linear {folder} {shards} --epochs -1") == 2
    errors = capsys.readouterr().err.splitlines()
    assert (
        all(line.startswith("error: ") for line in errors)
        and errors[-1] == "error: --epochs: expected > 0, got -1.0"
    )


# Few-shot


def test_draws_are_balanced_nested_and_keyed(digits):
    labels = open_shards(str(digits / "train")).label
    five, ten = draw(labels, 5, 3), draw(labels, 10, 3)
    assert np.bincount(labels[five]).tolist() == [5] * 10 and len(set(ten.tolist())) == 100
    assert set(five) < set(ten)
    assert np.array_equal(five, draw(labels, 5, 3)) and not np.array_equal(five, draw(labels, 5, 4))
    fewest = int(np.bincount(labels).min())
    with pytest.raises(
        ValueError, match=f"--per-class: expected at most the {fewest} training images of class"
    ):
        draw(labels, fewest + 1, 0)


def test_fewshot_is_scikit_learn_on_the_rows_drawn(make_run, digits):
    encoder = load_frozen(str(make_run()))
    data = open_labelled(str(digits / "train"), str(digits / "test"))
    train, test = encoder_features(encoder, data.train), encoder_features(encoder, data.test)
    trials = probe_fewshot(encoder, data, CPU, Setup(seeds=(2, 5)), FewshotRecipe(per_class=(1, 6)))
    for seed, trial in zip((2, 5), trials, strict=True):
        for shots in (1, 6):
            rows = draw(train.labels, shots, seed)
            few = train.values[rows].astype(np.float64)
            mean, std = few.mean(axis=0), few.std(axis=0)
            model = LogisticRegression(max_iter=1000).fit((few - mean) / std, train.labels[rows])
            expected = model.score((test.values - mean) / std, test.labels)
            assert abs(trial.accuracies[f"logreg-{shots}"] - expected) <= 0.011
            part = type(train)(train.values[rows], train.labels[rows])
            assert trial.accuracies[f"knn-{shots}"] == knn_accuracy(part, test, shots, 0.07)
    assert trials[0] != trials[1] and trials[0].details["converged"]


def test_fewshot_of_meaningless_labels_is_chance_and_features_are_computed_once(
    make_run, digits, monkeypatch
):
    calls = []
    monkeypatch.setattr(fewshot, "encoder_features", lambda *a: calls.append(a) or encoder_features(*a))
    encoder = load_frozen(str(make_run()))
    data = open_labelled(str(digits / "train"), str(digits / "test"))
    shuffled = np.random.default_rng(0).permutation(data.train.label)
    data = data._replace(train=dataclasses.replace(data.train, label=shuffled))
    trials = probe_fewshot(encoder, data, CPU, Setup(seeds=(0, 1, 2)), FewshotRecipe(per_class=(10,)))
    assert len(calls) == 2
    for name in ("logreg-10", "knn-10"):
        assert statistics.fmean(trial.accuracies[name] for trial in trials) < 0.2


# HParams


def test_hyperparameters_are_flattened_to_what_tensorboard_takes():
    nested = {"a": {"b": 1, "c": {"d": None, "e": True}}, "f": [1, 2.5], "g": "x", "h": ()}
    assert flatten(nested) == {"a.b": 1, "a.c.d": "none", "a.c.e": True, "f": "1 2.5", "g": "x", "h": ""}


def test_hparams_that_cannot_be_written_leave_the_old_ones(tmp_path, monkeypatch):
    write_hparams({"a": 1}, {"m": 0.5}, tmp_path / "probe-x")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selfsup.probe.hparams.SummaryWriter", full)
    with pytest.raises(ValueError, match="No space left on device"):
        write_hparams({"a": 2}, {"m": 0.7}, tmp_path / "probe-x")
    assert hparams(tmp_path / "probe-x") == ({"a": 1}, {"m": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["probe-x"]
