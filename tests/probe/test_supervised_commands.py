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
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from selfsup import cli
from selfsup.checkpoint import load_encoder
from selfsup.data.index import open_shards
from selfsup.data.pack import pack_arrays
from selfsup.export.load import load_frozen
from selfsup.export.timm import export_timm
from selfsup.probe import fewshot
from selfsup.probe.describe import main_representation
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
    out = capsys.readouterr().out
    assert str(path) in out
    progress = [line for line in out.splitlines() if ": step " in line]
    assert name == "fewshot" or (
        progress and len(progress) % 2 == 0
    )  # two seeds, the same number of lines each
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


@pytest.mark.parametrize("name", ["frozen", *COMMANDS])
def test_averaged_weights_have_a_file_and_a_line_of_their_own(name, make_run, monkeypatch, capsys):
    run = make_run({"optim": {"ema": 0.9}})
    line = COMMANDS.get(name, "{} --baselines").format(run)
    options = "" if name in COMMANDS else "--device cpu"
    for weights in ("", "--weights ema"):
        monkeypatch.setattr("sys.argv", ["selfsup", "probe", *f"{line} {weights} {options}".split()])
        assert cli.main() == 0
    trained, averaged = sorted((run / "probe").iterdir(), key=lambda path: len(path.name))
    assert averaged.name == f"{trained.stem}-ema.json"
    results = [load_result(path) for path in (trained, averaged)]
    assert [result.sources[0]["weights"] for result in results] == ["trained", "ema"]
    assert results[0].scores != results[1].scores and results[0].recipe == results[1].recipe
    lines = [hparams(run / "tensorboard" / f"probe-{path.stem}")[0] for path in (trained, averaged)]
    assert [values["weights"] for values in lines] == ["trained", "ema"]
    capsys.readouterr()
    console = Console(record=True, width=200)
    print_results(results, console)
    rows = [row for row in console.export_text().splitlines() if "pretrained" in row]
    assert [("averaged weights" in row) for row in rows] == [False] * (len(rows) // 2) + [True] * (
        len(rows) // 2
    )


def test_averaged_weights_are_those_of_the_checkpoint_and_only_of_one_that_keeps_them(make_run, digits):
    run = make_run({"optim": {"ema": 0.9}})
    expected = load_encoder(run, "ema")[0].state_dict()
    found = load_frozen(str(run), "ema").module.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["norm.weight"], load_frozen(str(run)).module.state_dict()["norm.weight"])
    without = make_run({}, "without")
    with pytest.raises(ValueError, match="keeps no averaged weights"):
        load_frozen(str(without), "ema")
    for source in (str(export_timm(without).folder), "timm:resnet18", "nowhere"):
        with pytest.raises(ValueError, match="--weights ema: .* is no run of selfsup"):
            load_frozen(source, "ema")


def test_results_on_other_training_data_never_share_a_file(make_run, digits, tmp_path, monkeypatch):
    run, index = make_run(), open_shards(str(digits / "train"))
    fewer = np.zeros((120, 8, 8), dtype=np.uint8)
    pack_arrays(fewer, np.arange(120) % 10, list(index.classes), tmp_path / "fewer", 150)
    for line in COMMANDS["linear"], "{} --baselines", "{} --baselines --bf16":
        for train in (digits / "train", tmp_path / "fewer"):
            arguments = f"{line.format(run)} --train {train} --test {digits / 'test'} --device cpu"
            monkeypatch.setattr("sys.argv", ["selfsup", "probe", *arguments.split()])
            assert cli.main() == 0
    assert len(results(run)) == 6 == len(list((run / "tensorboard").iterdir()))


def test_a_file_named_for_the_result_is_not_overwritten(make_run, tmp_path, monkeypatch, capsys):
    run, out = make_run(), tmp_path / "mine.json"
    out.write_text("mine")
    for command in ("", "linear ", "attentive ", "finetune ", "fewshot ", "representation "):
        monkeypatch.setattr("sys.argv", ["selfsup", "probe", *f"{command}{run} --out {out}".split()])
        assert cli.main() == 2 and f"--out {out}: already exists" in capsys.readouterr().err
    assert out.read_text() == "mine"
    monkeypatch.setattr("sys.argv", ["selfsup", "probe", "linear", str(run), "--out", f"{out}/x/y.json"])
    assert cli.main() == 2 and f"{out} is a file; give another name" in capsys.readouterr().err


def test_show_passes_over_what_has_no_accuracies_and_says_so(make_run, digits, monkeypatch, capsys):
    run = make_run()
    assert selfsup(monkeypatch, COMMANDS["linear"].format(run)) == 0
    shards = str(digits / "test")
    main_representation(str(run), shards=shards, views=2, view_samples=20, samples=50, device="cpu")
    first, second = sorted((run / "probe").iterdir())
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["selfsup", "probe", "show", str(first), str(second)])
    assert cli.main() == 0
    printed = capsys.readouterr().out
    assert f"{second}: passed over" in printed and "linear probe" in printed
    monkeypatch.setattr("sys.argv", ["selfsup", "probe", "show", str(second)])
    assert cli.main() == 2 and "with accuracies, got none" in capsys.readouterr().err


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
    averaged = f"{make_run({'optim': {'ema': 0.9}}, 'averaged')} --weights ema --scratch"
    assert selfsup(monkeypatch, COMMANDS["finetune"].format(averaged)) == 2
    assert "--scratch: no weights of the run enter" in capsys.readouterr().err


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
    with pytest.raises(ValueError, match="mode: linear is paper, linear is fast"):
        print_results([fast, paper], Console())
    monkeypatch.setattr("sys.argv", ["selfsup", "probe", "show", *map(str, names)])
    assert cli.main() == 0
    tables = capsys.readouterr().out.split("accuracy, %, mode ")[1:]
    assert [table.split()[0] for table in tables] == ["fast", "paper"]
    assert ["attentive probe" in table for table in tables] == [True, False]
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


def hparams_columns(logdir: Path) -> tuple[set[str], set[str]]:
    """The settings and the metrics that TensorBoard's own plugin makes columns of."""
    events = EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload()
    board = Context(TBContext(data_provider=MultiplexerDataProvider(events, str(logdir))))
    request = RequestContext()
    table = board.experiment_from_metadata(request, "x", True, board.hparams_metadata(request, "x"), [])
    return {info.name for info in table.hparam_infos}, {info.name.tag for info in table.metric_infos}


def test_tensorboard_has_columns_for_every_probe_not_only_for_the_first(tmp_path):
    write_hparams({"probe": "frozen", "k": 20}, {"probe/knn-fast": 0.5}, tmp_path / "probe-a")
    write_hparams({"probe": "linear", "lr": 0.1}, {"probe/linear-fast": 0.7}, tmp_path / "probe-b")
    assert hparams_columns(tmp_path) == ({"probe", "k", "lr"}, {"probe/knn-fast", "probe/linear-fast"})


def test_that_writing_columns_with_each_probe_would_hide_those_of_others(tmp_path):
    """The bug planted: torch's add_hparams, as it comes."""
    for name, settings, metric in (("a", {"k": 20}, "knn"), ("b", {"lr": 0.1}, "linear")):
        with SummaryWriter(tmp_path / name) as writer:
            writer.add_hparams(settings, {metric: 0.5}, run_name=".")
    assert hparams_columns(tmp_path) in [({"k"}, {"knn"}), ({"lr"}, {"linear"})]  # whichever comes first


def test_hparams_that_cannot_be_written_leave_the_old_ones(tmp_path, monkeypatch):
    write_hparams({"a": 1}, {"m": 0.5}, tmp_path / "probe-x")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selfsup.probe.hparams.SummaryWriter", full)
    with pytest.raises(ValueError, match="No space left on device"):
        write_hparams({"a": 2}, {"m": 0.7}, tmp_path / "probe-x")
    assert hparams(tmp_path / "probe-x") == ({"a": 1}, {"m": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["probe-x"]
