"""The representation command: the images, views and encoders it takes, what it prints, writes and refuses."""

import json
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from selfsup import cli
from selfsup.data import views
from selfsup.data.decode import decode_image
from selfsup.data.images import ImageData
from selfsup.data.index import open_shards
from selfsup.data.reader import ShardReader
from selfsup.data.views import augment
from selfsup.export.load import load_frozen
from selfsup.export.timm import export_timm
from selfsup.probe import describe as describe_module
from selfsup.probe.describe import describe, main_representation, print_description
from selfsup.probe.features import encoder_features, random_encoder
from selfsup.probe.online import fixed_rows
from selfsup.probe.representation import (
    alignment,
    alpha_req,
    feature_std,
    lidar,
    linear_cka,
    rankme,
    uniformity,
)

CPU = torch.device("cpu")


def views_by_hand(encoder, index, rows, views) -> torch.Tensor:
    """(n, q, d), one image and one view at a time."""
    reader, config, found = ShardReader(index), encoder.recipe.data, []
    for row in rows:
        image = decode_image(reader.read(np.array([row]))[0], 1, "x")
        for view in range(1, views + 1):
            pixels = augment(config.kinds(8)[0], 0, np.zeros(1, np.int64), np.array([row]), [image], 8, view)
            found.append(encoder.features((pixels / 255 - 0.3) / 0.4))
    return torch.cat(found).view(len(rows), views, -1)


def test_every_number_is_the_metric_of_the_features(make_run, digits):
    run = make_run()
    index = open_shards(str(digits / "test"))
    frozen, before = load_frozen(str(run)), torch.get_rng_state()
    result = describe(frozen, None, 60, 3, 20, CPU, batch_size=7)
    assert torch.equal(torch.get_rng_state(), before)
    rows, view_rows = (np.sort(fixed_rows(100, n)) for n in (60, 20))
    encoders = {"random": random_encoder(frozen.recipe, 0), "pretrained": frozen}
    clean = {}
    for kind, encoder in encoders.items():
        clean[kind] = torch.from_numpy(encoder_features(encoder, index).values[rows])
        views = views_by_hand(encoder, index, view_rows, 3)
        expected = {
            "feature_std": feature_std(clean[kind]),
            "rankme": rankme(clean[kind]),
            "alpha_req": alpha_req(clean[kind]),
            "uniformity": uniformity(clean[kind]),
            "alignment": alignment(views[:, 0], views[:, 1]),
            "lidar": lidar(views),
        }
        assert result.metrics[kind] == pytest.approx(expected, rel=1e-3)
    assert result.metrics["random"] != result.metrics["pretrained"]
    assert result.cka == pytest.approx(linear_cka(clean["random"], clean["pretrained"]), rel=1e-4)
    assert 0.2 < result.cka < 0.9999 and result.left_out == {}
    assert result.data == {
        "shards": str(digits / "test"),
        "fingerprint": index.fingerprint,
        "images": 100,
        "samples": 60,
        "view_samples": 20,
        "views": 3,
    }


def test_rows_are_the_same_for_every_run_and_fewer_are_a_part_of_more():
    assert sorted(fixed_rows(50, 50)) == sorted(fixed_rows(50, 99)) == list(range(50))
    assert np.array_equal(fixed_rows(1000, 10), fixed_rows(1000, 100)[:10])
    assert len(set(fixed_rows(1000, 100))) == 100 and not np.array_equal(fixed_rows(50, 50), np.arange(50))


def test_views_differ_and_view_0_is_trainings(digits, make_run):
    encoder = load_frozen(str(make_run()))
    views = views_by_hand(encoder, open_shards(str(digits / "test")), range(10), 2)
    assert (views[:, 0] != views[:, 1]).any(dim=1).all()
    image, one = np.arange(64, dtype=np.uint8).reshape(8, 8, 1), np.zeros(1, np.int64)
    kind = encoder.recipe.data.kinds(8)[0]
    assert torch.equal(augment(kind, 3, one, one, [image], 8), augment(kind, 3, one, one, [image], 8, 0))


def test_the_flip_of_a_view_is_its_own():
    config = ImageData(shards="x", crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    image, n = np.arange(64, dtype=np.uint8).reshape(8, 8, 1), 200
    zeros, position = np.zeros(n, np.int64), np.arange(n)
    a, b = (augment(config.kinds(8)[0], 0, zeros, position, [image] * n, 8, view) for view in (1, 2))
    assert 60 < (a != b).flatten(1).any(dim=1).sum() < 140


def test_a_flip_keyed_without_the_view_is_caught(monkeypatch):
    original = views.flips
    monkeypatch.setattr(
        views, "flips", lambda seed, epoch, position, p, view=0: original(seed, epoch, position, p)
    )
    with pytest.raises(AssertionError):
        test_the_flip_of_a_view_is_its_own()


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["selfsup", "probe", "representation", *map(str, arguments)])
    return cli.main()


def test_the_table_and_the_file(make_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = make_run()
    options = ("--samples", "40", "--views", "2", "--view-samples", "30", "--device", "cpu")
    assert command(monkeypatch, run, *options) == 0
    (path,) = (run / "probe").iterdir()
    content = json.loads(path.read_text())
    fingerprint = content["data"]["fingerprint"]
    assert path.name == f"representation-step-00000007-{fingerprint[:8]}.json"
    assert content["source"]["step"] == 7 and content["source"]["width"] == 24
    assert content["recipe"]["rankme"] == {"epsilon": 1e-7, "centred": False}
    assert content["recipe"]["alpha_req"]["fit_range"] == [4, 100]
    printed = capsys.readouterr().out
    assert "40 of the 100 images" in printed and "2 views of 30" in printed and str(path) in printed
    for kind in ("random", "pretrained"):
        assert set(content["metrics"][kind]) == set(describe_module.READING)
        for value in content["metrics"][kind].values():
            assert f"{value:.4g}" in printed
    assert f"{content['cka']:.4f}" in printed and "1 collapsed, 24 most" in printed
    elsewhere = run.parent / "elsewhere.json"
    main_representation(str(run), samples=40, views=2, view_samples=30, device="cpu", out=elsewhere)
    assert json.loads(elsewhere.read_text())["metrics"] == content["metrics"]


def collapse(run):
    """A constant encoder: the last norm gives its bias, whatever comes in."""
    encoder = load_frozen(str(run))
    encoder.module.norm.weight.zero_()
    encoder.module.norm.bias.fill_(0.5)
    return encoder


def test_a_collapsed_encoder_is_shown_as_one(make_run):
    result = describe(collapse(make_run()), None, 100, 2, 100, CPU)
    found = result.metrics["pretrained"]
    assert found["feature_std"] == pytest.approx(0, abs=1e-6)
    assert found["rankme"] == pytest.approx(1, abs=1e-3) and found["lidar"] == pytest.approx(1, abs=1e-3)
    assert found["uniformity"] == pytest.approx(0, abs=1e-6)
    assert "alpha_req" not in found and result.cka is None
    assert set(result.left_out) == {"pretrained, alpha_req", "cka"}
    console = Console(record=True, width=200)
    print_description(result, console)
    text = console.export_text()
    assert "pretrained, alpha_req left out" in text and "cka left out" in text and text.count("collapsed") > 4
    assert set(result.metrics["random"]) == set(describe_module.READING)


def test_what_it_refuses(make_run, digits, tmp_path, monkeypatch, capsys):
    run = make_run()
    assert command(monkeypatch, run, "--views", "1", "--device", "cpu") == 2
    assert "error: --views: expected at least 2, got 1" in capsys.readouterr().err
    for options, message in (
        ({"samples": 9}, "--samples: expected at least 10, got 9"),
        ({"views": 1}, "--views: expected at least 2, got 1"),
        ({"view_samples": 1}, "--view-samples: expected at least 2"),
        ({"batch_size": 0}, "--batch-size: expected at least 1"),
        ({"workers": -1}, "--workers: expected at least 0, got -1"),
        ({"shards": str(tmp_path / "none")}, "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            main_representation(str(run), device="cpu", **options)
    folder = export_timm(run).folder
    with pytest.raises(ValueError, match="expected a run of selfsup"):
        main_representation(str(folder), shards=str(digits / "test"), device="cpu")
    alone = make_run({"data": {"shards": str(tmp_path)}}, "alone")
    with pytest.raises(ValueError, match="beside the run's training shards; give --shards"):
        main_representation(str(alone), device="cpu")
    assert not (run / "probe").exists()


def test_features_that_are_not_numbers_are_refused(make_run):
    encoder = load_frozen(str(make_run()))
    encoder.module.norm.bias[0] = float("nan")
    with pytest.raises(ValueError, match="features of 100 of 100 images are NaN or infinite"):
        describe(encoder, None, 100, 2, 100, CPU)
