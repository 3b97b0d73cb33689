"""The whole probe and embed: what they report, write and refuse."""

import inspect
import json
import statistics

import numpy as np
import pytest
import torch
import tyro
from rich.console import Console
from safetensors import safe_open

from selfsup.data.index import open_shards
from selfsup.data.pack import pack_arrays
from selfsup.export.load import load_frozen
from selfsup.export.timm import export_timm
from selfsup.probe import sources
from selfsup.probe.compare import main_probe, probe
from selfsup.probe.embed import embed, main_embed
from selfsup.probe.features import encoder_features, pixel_features, random_encoder
from selfsup.probe.knn import knn_accuracy
from selfsup.probe.logreg import logreg
from selfsup.probe.report import print_results
from selfsup.probe.sources import default_shards, load_sources

CPU = torch.device("cpu")


def as_pair(digits, make):
    return [make(open_shards(str(digits / part))) for part in ("train", "test")]


def test_three_runs_are_averaged_beside_their_own_starts(make_run, digits, capsys):
    runs = [make_run({"seed": seed}, f"run{seed}") for seed in (3, 4, 5)]
    main_probe(tuple(map(str, runs)), device="cpu")
    (path,) = (runs[0] / "probe").iterdir()
    result = json.loads(path.read_text())
    assert path.name.startswith("frozen-fast-step-00000007-") and path.name.endswith("-3-seeds.json")
    assert [source["seed"] for source in result["sources"]] == [3, 4, 5]
    pixels = as_pair(digits, lambda index: pixel_features(index, 8, 1))
    assert result["scores"]["pixels"]["knn"]["values"] == [knn_accuracy(*pixels)]
    assert result["scores"]["pixels"]["knn"]["std"] is None
    for kind, encoders in {
        "pretrained": map(load_frozen, map(str, runs)),
        "random": (random_encoder(load_frozen(str(run)).recipe, seed) for run, seed in zip(runs, (3, 4, 5))),
    }.items():
        pairs = [as_pair(digits, lambda index: encoder_features(encoder, index)) for encoder in encoders]
        for probe_name, values in {
            "knn": [knn_accuracy(*pair) for pair in pairs],
            "logreg": [logreg(*pair).accuracy for pair in pairs],
        }.items():
            score = result["scores"][kind][probe_name]
            assert score["values"] == values
            assert score["mean"] == statistics.fmean(values) and score["std"] == statistics.stdev(values)
    assert all(details["c"] > 0 for details in result["scores"]["random"]["logreg"]["details"])
    assert result["recipe"]["knn"]["k"] == 20 and result["recipe"]["logreg"]["c_grid"][0] == 1e-4
    assert result["data"]["train"]["fingerprint"] == open_shards(str(digits / "train")).fingerprint
    assert (result["data"]["train"]["samples"], result["data"]["test"]["samples"]) == (400, 100)
    assert result["versions"]["torch"] and result["seconds"] > 0
    out = capsys.readouterr().out
    assert "raw pixels" in out and "random initialisation" in out and "(n=3)" in out and str(path) in out


def test_one_run_has_no_spread_and_is_written_again(make_run, digits):
    run = make_run()
    main_probe((str(run),), device="cpu")
    (path,) = (run / "probe").iterdir()
    first = json.loads(path.read_text())
    assert first["scores"]["random"]["logreg"]["std"] is None
    main_probe((str(run),), device="cpu", train=str(digits / "train"))
    (again,) = (run / "probe").iterdir()
    assert again == path and json.loads(again.read_text())["scores"] == first["scores"]


def test_a_model_without_a_recipe_has_no_random_baseline(make_run, digits, tmp_path, capsys):
    folder = export_timm(make_run()).folder
    out = tmp_path / "here" / "result.json"
    train, test = str(digits / "train"), str(digits / "test")
    main_probe((str(folder),), train=train, test=test, out=out, device="cpu")
    result = json.loads(out.read_text())
    assert set(result["scores"]) == {"pixels", "pretrained"} and "random" in result["left_out"]
    main_probe((str(folder),), train=train, test=test, device="cpu")
    printed = capsys.readouterr().out
    assert "random initialisation: left out" in printed and "no JSON written" in printed


def test_pixels_too_many_are_left_out_and_said_so(make_run, digits, monkeypatch):
    monkeypatch.setattr(sources, "PIXEL_LIMIT", 1000)
    result = probe(load_sources((str(make_run()),)), str(digits / "train"), str(digits / "test"), CPU)
    assert "pixels" not in result.scores and "limit" in result.left_out["pixels"]
    console = Console(record=True)
    print_results([result], console)
    assert "raw pixels: left out" in console.export_text()


def test_sources_that_make_no_mean_are_refused(make_run):
    one = str(make_run({"seed": 1}, "one"))
    for changes, step, message in (
        ({"seed": 1}, 7, "has the seed of"),
        ({"seed": 2, "encoder": {"depth": 1}}, 7, "differs from .* in encoder"),
        ({"seed": 2}, 9, "differs from .* in step"),
    ):
        other = str(make_run(changes, "other", step))
        with pytest.raises(ValueError, match=message):
            load_sources((one, other))
    with pytest.raises(ValueError, match="one at a time"):
        load_sources((one, str(export_timm(make_run()).folder)))
    with pytest.raises(ValueError, match="has the seed of"):
        load_sources((one, one))
    with pytest.raises(ValueError, match="got none"):
        load_sources(())


def test_damaged_checkpoint_is_reported(make_run, capsys):
    run = make_run(step=7)
    make_run(step=9)
    (run / "checkpoints" / "step-00000009" / "objective.safetensors").write_bytes(b"no")
    load_sources((str(run),))
    assert "passed over" in capsys.readouterr().err


def test_default_shards(make_run, digits, tmp_path):
    encoders = [load_frozen(str(make_run()))]
    assert default_shards(encoders, None, None) == (str(digits / "train"), str(digits / "test"))
    assert default_shards(encoders, "a/b", "c") == ("a/b", "c")
    with pytest.raises(ValueError, match="give --test SHARDS"):
        default_shards(encoders, str(tmp_path / "nowhere" / "train"), None)
    with pytest.raises(ValueError, match="give --train SHARDS and --test SHARDS"):
        default_shards([load_frozen(str(export_timm(make_run()).folder))], None, None)


@pytest.fixture(scope="module")
def odd_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    labels = np.arange(40) % 10
    names = [str(i) for i in range(10)]
    pack_arrays(images, np.where(labels == 3, -1, labels), names, folder / "unlabelled", 50)
    pack_arrays(images, labels, [*names[:9], "ten"], folder / "renamed", 50)
    return folder


def test_data_that_cannot_be_probed_is_refused(make_run, digits, odd_shards):
    encoders = load_sources((str(make_run()),))
    train = str(digits / "train")
    with pytest.raises(ValueError, match="--test .*unlabelled: 4 of 40 samples have no label, first 000"):
        probe(encoders, train, str(odd_shards / "unlabelled"), CPU)
    with pytest.raises(ValueError, match="--train .*4 of 40 samples have no label"):
        probe(encoders, str(odd_shards / "unlabelled"), train, CPU)
    with pytest.raises(ValueError, match="the same samples as --train"):
        probe(encoders, train, train, CPU)
    with pytest.raises(ValueError, match="2 differ, first 9"):
        probe(encoders, train, str(odd_shards / "renamed"), CPU)


def test_embed_npz_and_safetensors_hold_the_same(make_run, digits, tmp_path):
    run, shards = make_run(), str(digits / "test")
    index = open_shards(shards)
    expected = encoder_features(load_frozen(str(run)), index)
    keys = [index.key(i) for i in range(100)]
    assert embed(str(run), shards, tmp_path / "a.npz", "cpu") == (100, 24)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert np.array_equal(file["features"], expected.values) and file["features"].dtype == np.float32
        assert np.array_equal(file["labels"], index.label) and file["labels"].dtype == np.int64
        assert file["keys"].tolist() == keys
        about = json.loads(str(file["about"]))
    assert about["fingerprint"] == index.fingerprint and about["source"] == str(run)
    assert about["weights"] == "trained"
    embed(str(run), shards, tmp_path / "new" / "a.safetensors", "cpu")
    with safe_open(tmp_path / "new" / "a.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["about"]) == about
        assert np.array_equal(file.get_tensor("features"), expected.values)
        assert np.array_equal(file.get_tensor("labels"), index.label)
        text, offsets = file.get_tensor("key_bytes").tobytes(), file.get_tensor("key_offsets")
    assert [text[a:b].decode() for a, b in zip(offsets, offsets[1:])] == keys
    assert {path.name for path in tmp_path.iterdir()} == {"run", "a.npz", "new"}


def test_embed_takes_averaged_weights(make_run, digits, tmp_path):
    run, shards = make_run({"optim": {"ema": 0.9}}), str(digits / "test")
    main_embed(str(run), shards, out=tmp_path / "a.npz", weights="ema", device="cpu")
    expected = encoder_features(load_frozen(str(run), "ema"), open_shards(shards))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert np.array_equal(file["features"], expected.values)
        assert json.loads(str(file["about"]))["weights"] == "ema"


def test_embed_refuses_before_it_works(make_run, digits, tmp_path, monkeypatch):
    monkeypatch.setattr("selfsup.probe.embed.load_frozen", lambda *source: pytest.fail("work was done"))
    for name in ("a.pt", "a", "a.npy", "a.npz.gz"):
        with pytest.raises(ValueError, match=r"ending in .npz or .safetensors"):
            embed("x", str(digits / "test"), tmp_path / name)
    (tmp_path / "a.npz").touch()
    with pytest.raises(ValueError, match="already exists"):
        embed("x", str(digits / "test"), tmp_path / "a.npz")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}])
def test_numbers_out_of_range_are_refused_by_name(make_run, digits, tmp_path, options):
    run, option = str(make_run()), next(iter(options)).replace("_", "-")
    with pytest.raises(ValueError, match=f"--{option}: expected >= "):
        main_probe((run,), **options)
    with pytest.raises(ValueError, match=f"--{option}: expected >= "):
        main_embed(run, str(digits / "test"), out=tmp_path / "a.npz", **options)


def test_embed_below_a_file_is_one_line(make_run, digits, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out .*: .*file is a file; give another name"):
        main_embed(str(make_run()), str(digits / "test"), out=tmp_path / "file" / "a.npz")


def test_embed_that_fails_leaves_nothing(make_run, digits, tmp_path, monkeypatch):
    def full(*arguments, **arrays):
        raise OSError(28, "No space left on device")

    run = make_run()
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ValueError, match="No space left on device"):
        main_embed(str(run), str(digits / "test"), out=tmp_path / "a.npz")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_commands_read_as_users_expect(monkeypatch):
    """tyro makes RUN... and SOURCE SHARDS positional, the rest options."""
    seen = {}
    for main, line, expected in (
        (main_probe, "a b --train t --device cpu", {"runs": ("a", "b"), "train": "t", "device": "cpu"}),
        (main_embed, "m s --out f.npz", {"source": "m", "shards": "s"}),
    ):
        signature = inspect.signature(main)

        def capture(*positional, **options):
            seen.update(signature.bind(*positional, **options).arguments)

        capture.__signature__ = signature
        capture.__annotations__ = main.__annotations__
        capture.__doc__ = main.__doc__
        tyro.cli(capture, args=line.split())
        assert {key: seen[key] for key in expected} == expected
