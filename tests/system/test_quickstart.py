"""The README's first command, in a copy of the repository, and its gate over three seeds."""

import json

import pytest

from cloned import needs_setup, run
from running import ROOT

pytestmark = needs_setup


@pytest.fixture(scope="module")
def first(clone) -> str:
    if not any((ROOT / ".venv").glob("installed-*")):
        pytest.skip("the .venv was not made by launch/setup.sh")
    return run(clone, "bash", "launch/quickstart.sh")


def test_it_does_what_it_says(clone, first):
    for words in (
        "raw pixels",
        "random initialisation",
        "pretrained",
        "finished at step 1200",
        "smoke test",
        "timm",
    ):
        assert words in first
    folder = clone / "runs" / "mae-quickstart"
    measured = [json.loads(line).get("collapsed") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 in measured and 1 not in measured  # a healthy MAE run is not accused
    assert {p.name for p in (folder / "export" / "timm").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }


def test_run_again_it_reuses_what_is_there(clone, first):
    weights = clone / "runs/mae-quickstart/export/timm/model.safetensors"
    before = weights.stat().st_mtime_ns
    again = run(clone, "bash", "launch/quickstart.sh")
    assert "step 100/1200" not in again and "finished at step 1200 of 1200" in again
    assert weights.stat().st_mtime_ns == before


def test_gate_pretrained_beats_random_by_three_standard_deviations(clone, first):
    selfsup, runs = ".venv/bin/selfsup", ["runs/mae-quickstart", "runs/seed1", "runs/seed2"]
    for seed in (1, 2):
        run(
            clone,
            selfsup,
            "train",
            "configs/mae/quickstart.yaml",
            "--seed",
            str(seed),
            "--run.dir",
            f"runs/seed{seed}",
        )
    run(clone, selfsup, "probe", *runs, "--out", "gate.json")
    scores = json.loads((clone / "gate.json").read_text())["scores"]
    for probe in ("logreg", "knn"):
        random, pretrained = scores["random"][probe], scores["pretrained"][probe]
        spread = max(random["std"], pretrained["std"])
        assert pretrained["mean"] - random["mean"] >= 3 * spread > 0, (probe, random, pretrained)
