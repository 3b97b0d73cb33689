"""Checkpoints: exact round trip, crash safety under kill -9, damage seen and passed over."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import joint
from running import state_of
from selfsup import checkpoint, saving
from selfsup.checkpoint import TrainState, find_checkpoint, init_from, load_encoder, restore
from selfsup.config import validate
from selfsup.ema import Ema
from selfsup.recipe import Recipe
from selfsup.saving import save_checkpoint

CONTENT = {
    "objective": {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "encoder": {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "data": {"shards": "d"},
    "run": {"dir": "r"},
}
FILES = ["config.yaml", "objective.safetensors", "optimizer.safetensors", "state.json"]


def flat(state: TrainState) -> dict:
    tensors, groups = checkpoint.optimizer_to_names(state.optimizer)
    return {**state.objective.state_dict(), **tensors, "groups": json.dumps(groups)}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


@pytest.fixture
def recipe() -> Recipe:
    return validate(Recipe, CONTENT)


def test_round_trip_is_exact(recipe, tmp_path):
    saved = state_of(recipe, 0)
    path = save_checkpoint(tmp_path, saved)
    fresh = state_of(recipe, 1, steps=0)
    assert not equal(flat(saved), flat(fresh))
    restored = restore(path, fresh)
    assert equal(flat(saved), flat(restored)) and (restored.step, restored.samples) == (2, 512)
    for p in saved.objective.parameters():  # and the next update is the same
        p.grad = torch.ones_like(p) if p.requires_grad else None
    for p in restored.objective.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    saved.optimizer.step(), restored.optimizer.step()
    assert equal(flat(saved), flat(restored))


def test_files_hold_no_pickle(recipe, tmp_path):
    path = save_checkpoint(tmp_path, state_of(recipe, 0))
    assert sorted(p.name for p in path.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "objective.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert all(p.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"PK") for p in path.iterdir())


def test_pruning_keeps_the_newest(recipe, tmp_path):
    for steps in (1, 2, 3, 4):
        save_checkpoint(tmp_path, state_of(recipe, 0, steps))
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000004",
    ]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damage_falls_back_and_says_so(recipe, tmp_path, damage):
    first, second = (save_checkpoint(tmp_path, state_of(recipe, 0, steps)) for steps in (1, 2))
    victim = second / "objective.safetensors"
    content = victim.read_bytes()
    if damage == "truncate":
        victim.write_bytes(content[:-100])
    elif damage == "flip":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        victim.unlink()
    else:
        (second / "manifest.json").write_text("{")
    found, said = find_checkpoint(tmp_path)
    assert found == first and len(said) == 1 and str(second) in said[0]
    shutil.rmtree(first)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        find_checkpoint(tmp_path)
    if damage != "manifest":
        with pytest.raises(ValueError, match="damaged checkpoint"):
            find_checkpoint(second)


def test_a_full_disk_leaves_the_previous_one(recipe, tmp_path):
    first = save_checkpoint(tmp_path, state_of(recipe, 0, 1))
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(ValueError, match="NOT saved.*earlier checkpoints are intact"):
            save_checkpoint(tmp_path, state_of(recipe, 0, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert find_checkpoint(tmp_path) == (first, [])


def order_of_saving(recipe, folder, monkeypatch) -> list[str]:
    """What a save does to the disk, in order: fsync, rename, remove."""
    events: list[str] = []
    opened: dict[int, str] = {}
    real_open, real_fsync, real_rename, real_remove = os.open, os.fsync, os.rename, shutil.rmtree

    def track_open(path, *rest, **options):
        descriptor = real_open(path, *rest, **options)
        opened[descriptor] = Path(path).name
        return descriptor

    def track_remove(path, *rest, **options):
        if Path(path).name.startswith("step-"):
            events.append(f"remove {Path(path).name}")
        real_remove(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", track_open)
        patch.setattr(os, "fsync", lambda fd: (events.append(f"fsync {opened[fd]}"), real_fsync(fd)))
        patch.setattr(os, "rename", lambda a, b: (events.append(f"rename {Path(b).name}"), real_rename(a, b)))
        patch.setattr(shutil, "rmtree", track_remove)
        save_checkpoint(folder, state_of(recipe, 0, 3))
    return events


def durable(events: list[str]) -> bool:
    """Every file, then the manifest, then the folder reach the disk before the rename; the rename does before
    anything is removed."""
    files = [f"fsync {name}" for name in FILES]
    wanted = [
        *files,
        "fsync manifest.json",
        "fsync .tmp-00000003",
        "rename step-00000003",
        "fsync checkpoints",
    ]
    places = [events.index(event) if event in events else -1 for event in [*wanted, "remove step-00000001"]]
    return -1 not in places and places[4:] == sorted(places[4:]) and max(places[:4]) < places[4]


def test_a_save_reaches_the_disk_in_order(recipe, tmp_path, monkeypatch):
    for steps in (1, 2):
        save_checkpoint(tmp_path, state_of(recipe, 0, steps))
    assert durable(order_of_saving(recipe, tmp_path, monkeypatch))


def test_a_missing_fsync_or_an_early_prune_is_caught(recipe, tmp_path, monkeypatch):
    for steps in (1, 2):
        save_checkpoint(tmp_path, state_of(recipe, 0, steps))
    with monkeypatch.context() as patch:
        patch.setattr(saving, "fsync_path", lambda path: None)
        assert not durable(order_of_saving(recipe, tmp_path, monkeypatch))
    right = ["fsync manifest.json", "fsync .tmp-00000003", "rename step-00000003", "fsync checkpoints"]
    files = [f"fsync {name}" for name in FILES]
    assert durable([*files, *right, "remove step-00000001"])
    assert not durable([*files, "remove step-00000001", *right])
    assert not durable([*right, *files, "remove step-00000001"])


def test_weights_that_are_not_finite_are_not_saved(recipe, tmp_path):
    first, broken = save_checkpoint(tmp_path, state_of(recipe, 0, 1)), state_of(recipe, 0, 2)
    with torch.no_grad():
        broken.objective.decoder.mask_token[..., 0] = torch.inf
    with pytest.raises(
        ValueError, match="not finite at step 2, first decoder.mask_token: checkpoint NOT saved"
    ):
        save_checkpoint(tmp_path, broken)
    assert find_checkpoint(tmp_path) == (first, [])


def test_resuming_an_older_checkpoint_sets_later_ones_aside(recipe, tmp_path, capsys):
    for steps in (1, 2):
        save_checkpoint(tmp_path, state_of(recipe, 0, steps))
    saving.set_aside_later(tmp_path, 1)
    assert "step-00000002 is set aside" in capsys.readouterr().out
    for steps in (2, 3):
        save_checkpoint(tmp_path, state_of(recipe, 0, steps))
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == [
        "step-00000002",
        "step-00000003",
    ]


def test_the_run_folder_of_a_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert checkpoint.run_dir_of(Path("step-00000001")) == tmp_path
    with pytest.raises(ValueError, match="lies in no run folder"):
        checkpoint.run_dir_of(tmp_path / "elsewhere")


SAVER = """
import sys; sys.path.insert(0, {tests!r})
import test_checkpoint as t
from selfsup.config import validate
from selfsup.recipe import Recipe
from pathlib import Path
state = t.state_of(validate(Recipe, t.CONTENT), 0, 1)
{mutant}
print("ready", flush=True)
step = 1
while True:
    t.saving.save_checkpoint(Path({folder!r}), state._replace(step=step)); step += 1
"""
IN_PLACE = """
def in_place(run_dir, state):  # no rename: written where it will be read, the old one removed first
    import shutil
    folder = run_dir / "checkpoints"
    for old in folder.glob("step-*"): shutil.rmtree(old)
    final = folder / f"step-{state.step:08d}"
    final.mkdir(parents=True)
    t.saving._write(final, t.saving.snapshot(state), None)
t.saving.save_checkpoint = in_place
"""


def survivors(folder: Path, kills: int, mutant: str) -> int:
    """How often a loadable checkpoint is left after kill -9 at a random moment of back-to-back saves."""
    alive = 0
    for i in range(kills):
        where = folder / str(i)
        code = SAVER.format(tests=str(Path(__file__).parent), folder=str(where), mutant=mutant)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline().strip() == "ready"
        while not list(where.glob("checkpoints/step-*/manifest.json")):
            time.sleep(0.001)
        time.sleep(0.02 + 0.0137 * i)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        try:
            found, _ = find_checkpoint(where)
            assert json.loads((found / "state.json").read_text())["step"] >= 1
            alive += 1
        except ValueError:
            pass  # counted: not alive
    return alive


@pytest.mark.slow
def test_kill_during_saves_always_leaves_a_whole_checkpoint(tmp_path):
    assert survivors(tmp_path, 6, mutant="") == 6


@pytest.mark.slow
def test_saving_in_place_is_caught(tmp_path):
    assert survivors(tmp_path, 6, mutant=IN_PLACE) < 6


def test_load_encoder_and_init_from(recipe, tmp_path):
    saved = state_of(recipe, 0)
    save_checkpoint(tmp_path, saved)
    encoder, again, *_ = load_encoder(tmp_path)
    assert again == recipe and not encoder.training
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder(images), saved.objective.encoder.eval()(images))
    fresh = state_of(recipe, 3, 0)
    assert "all weights" in init_from(tmp_path, fresh.objective, recipe, {})
    assert torch.equal(fresh.objective.decoder.mask_token, saved.objective.decoder.mask_token)
    wider = validate(Recipe, {**CONTENT, "encoder": {**CONTENT["encoder"], "embed_dim": 32}})
    with pytest.raises(ValueError, match="do not fit this recipe, first .*: expected .* got"):
        init_from(tmp_path, state_of(wider, 0, 0).objective, wider, {})


def test_weights_of_another_tokenizer_are_refused(recipe, tmp_path):
    """Shapes say nothing: two vocabularies of one size number other words."""
    saved = state_of(recipe, 0)
    save_checkpoint(tmp_path, saved._replace(facts={**saved.facts, "tokenizer_sha256": "a" * 64}))
    fresh = state_of(recipe, 3, 0).objective
    assert "all weights" in init_from(tmp_path, fresh, recipe, {"tokenizer_sha256": "a" * 64})
    with pytest.raises(ValueError, match="for another tokenizer: expected SHA-256 aaaaaaaaaaaa, data.shards has b"):
        init_from(tmp_path, fresh, recipe, {"tokenizer_sha256": "b" * 64})


def test_a_target_starts_from_the_encoder_of_another_objective(tmp_path):
    """Against a random target the online network would unlearn what it brings."""
    simclr, byol = joint.recipe(), joint.recipe(objective={"name": "byol"})
    saved, fresh = state_of(simclr, 0), state_of(byol, 3, 0)
    save_checkpoint(tmp_path, saved)
    assert "the encoder's weights and its target's" in init_from(tmp_path, fresh.objective, byol, {})
    for network in (fresh.objective.encoder, fresh.objective.target_encoder):
        assert equal(dict(network.state_dict()), dict(saved.objective.encoder.state_dict()))
    again = state_of(byol, 5, 0)
    save_checkpoint(tmp_path / "byol", fresh)
    assert "all weights" in init_from(tmp_path / "byol", again.objective, byol, {})
    assert equal(dict(fresh.objective.state_dict()), dict(again.objective.state_dict()))


def averaged(recipe: Recipe, seed: int) -> TrainState:
    """A state with an average that is not its weights."""
    state = state_of(recipe, seed)
    ema = Ema(state.objective, 0.9)
    for value in ema.tensors.values():
        value += 0.01 * torch.randn_like(value)
    return state._replace(ema=ema)


def test_averaged_weights_are_saved_verified_and_restored(tmp_path):
    recipe = validate(Recipe, {**CONTENT, "optim": {"ema": 0.9}})
    saved, fresh = averaged(recipe, 0), averaged(recipe, 1)
    path = save_checkpoint(tmp_path, saved)
    assert not equal(saved.ema.tensors, fresh.ema.tensors)
    restored = restore(path, fresh)
    assert equal(flat(saved), flat(restored)) and equal(saved.ema.tensors, restored.ema.tensors)
    images = torch.randn(2, 3, 16, 16)
    trained, average = load_encoder(tmp_path)[0], load_encoder(tmp_path, weights="ema")[0]
    assert torch.equal(trained(images), saved.objective.encoder.eval()(images))
    for name, value in average.state_dict().items():
        assert torch.equal(value, saved.ema.tensors[f"encoder.{name}"]), name
    assert not average.training and not torch.equal(average(images), trained(images))
    content = (path / "ema.safetensors").read_bytes()
    (path / "ema.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"SHA-256 differs from the manifest: ema\.safetensors"):
        find_checkpoint(path)


def test_averaged_weights_of_a_run_that_kept_none(recipe, tmp_path):
    path = save_checkpoint(tmp_path, state_of(recipe, 0))
    with pytest.raises(
        ValueError, match=r"keeps no averaged weights \(its optim.ema is none\); use `trained`"
    ):
        load_encoder(path, weights="ema")
