"""Runs collapsed on purpose are found out, with the step; healthy ones, SimSiam among them, are not accused."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import mutants
from joint import write_joint_config
from running import Server, metrics
from selfsup.batch import normalise
from selfsup.checkpoint import load_objective
from selfsup.data.pack import pack_arrays
from selfsup.encoders.vit import ViT
from selfsup.metrics import MetricsLog
from selfsup.probe.online import collapsed

EVERY = 20
RUNS = {  # name: (objective, momentum, mutant, steps)
    "byol": ("byol", 0.9, None, 60),
    "simsiam": ("byol", 0.0, None, 60),
    "simclr": ("simclr", None, None, 40),
    "no_predictor": ("byol", 0.9, "no_predictor", 120),
    "no_stop_gradient": ("byol", 0.9, "no_stop_gradient", 120),
    "constant_encoder": ("byol", 0.9, "constant_encoder", 20),
}
HEALTHY = ("byol", "simsiam", "simclr")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """A folder with one run of each kind."""
    folder = tmp_path_factory.mktemp("collapse")
    pictures = (digits.images * 15.9).astype(np.uint8).repeat(2, 1).repeat(2, 2)[..., None].repeat(3, 3)
    pack_arrays(pictures, digits.target, list("0123456789"), folder / "shards", 900)
    server = Server()
    try:
        for run, (objective, momentum, mutant, steps) in RUNS.items():
            config = write_joint_config(folder, folder / "shards", objective)
            options = {"--optim.steps": steps, "--optim.batch-size": 64, "--optim.base-lr": 4e-3,
                       "--optim.warmup-fraction": 0, "--encoder.depth": 2, "--encoder.patch-size": 8,
                       "--run.log-every": EVERY, "--run.monitor-every": EVERY, "--run.checkpoint-every": 200}  # fmt: skip
            options |= {} if momentum is None else {"--objective.momentum": momentum}
            pairs = [part for pair in options.items() for part in pair]
            server.run([config, "--run.dir", folder / run, *pairs], folder / f"{run}.log", mutant=mutant)
    finally:
        server.close()
    return folder


def spread(run, digits) -> float:
    """Trace of the covariance of the embeddings' directions, 0 to 1: what a run left, not what its monitor said."""
    objective = load_objective(run)[0]
    pixels = torch.from_numpy((digits.images[:400] * 15.9).astype(np.uint8)).repeat_interleave(2, 1)
    pixels = pixels.repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad():
        images = normalise(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        z = torch.nn.functional.normalize(objective.projector(objective.encoder(images)).double())
    return float(torch.trace(torch.cov(z.T)))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_collapsed_runs_are_detected_and_healthy_ones_are_not(runs, digits, monkeypatch, name):
    if name == "constant_encoder":
        monkeypatch.setattr(ViT, "pool", ViT.pool)  # undone afterwards
        mutants.constant_encoder()
    said = [line["collapsed"] for line in metrics(runs / name)]
    outcome = json.loads((runs / name / "outcome.json").read_text())
    log = (runs / f"{name}.log").read_text()
    if name in HEALTHY:
        assert spread(runs / name, digits) > 0.02
        assert not any(said) and outcome["collapsed_at"] is None and "COLLAPSED" not in log
    else:
        assert spread(runs / name, digits) < 0.003
        at = outcome["collapsed_at"]
        assert said[-1] == 1 and at == EVERY * (len(said) - said[::-1].index(0) + 1 if 0 in said else 1)
        assert f"step {at}: COLLAPSED" in log and f"COLLAPSED since step {at}" in log.splitlines()[-1]


@pytest.mark.slow
def test_a_low_loss_and_a_good_knn_are_not_health(runs):
    """What the loss and the labels say of the collapsed run without predictor."""
    collapsed_run, healthy = metrics(runs / "no_predictor")[-1], metrics(runs / "byol")[-1]
    assert collapsed_run["loss"] < 0.5 < healthy["loss"]
    assert collapsed_run["knn"] > 0.5  # of ten classes


def test_constants_and_lines_are_collapsed_and_clouds_are_not():
    torch.manual_seed(0)
    cloud, mean, line = torch.randn(300, 16), 30 * torch.randn(16), torch.randn(300, 1) * torch.randn(16)
    assert not collapsed(cloud) and not collapsed(cloud + 0.1 * mean)
    assert collapsed(torch.ones(300, 16)) and collapsed(cloud + mean)  # all but constant
    assert collapsed(line) and collapsed(line + 0.1 * mean)
    assert collapsed(line + 0.1 * mean + 1e-3 * cloud)


def test_two_images_and_one_dimension_lie_on_a_line_in_health():
    torch.manual_seed(0)
    assert not collapsed(torch.randn(2, 16)) and not collapsed(torch.randn(300, 1))
    assert collapsed(torch.ones(2, 16)) and collapsed(torch.ones(300, 1)) and collapsed(torch.zeros(300, 16))


def test_the_log_names_the_step_and_survives_a_resume(tmp_path, capsys):
    said = {10: 0.0, 20: 1.0, 30: 0.0, 40: 1.0, 50: 1.0}
    numbers = {"feature_std": 0.5, "rankme": 9.0, "embedding_std": 0.01, "embedding_rankme": 1.0}
    log = MetricsLog(tmp_path, 0, 100)
    for step, value in said.items():
        log.write(step, {"collapsed": value, **numbers})
        log.write(step + 1, {"loss": 1.0})
    assert log.collapsed_at == 40
    log.close()
    printed = [line for line in capsys.readouterr().out.splitlines() if "COLLAPSED" in line]
    assert [line.split(":")[0] for line in printed] == ["step 20", "step 40"]
    assert "at step 30 they were not" in printed[1]
    assert "feature_std 0.5, rankme 9, embedding_std 0.01, embedding_rankme 1;" in printed[0]  # what collapsed
    for start, expected in ((50, 40), (35, None), (20, 20)):
        log = MetricsLog(tmp_path, start, 100)
        assert log.collapsed_at == expected
        log.close()
