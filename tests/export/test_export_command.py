"""What all targets share: `selfsup export RUN --to TARGET`, where it writes, what it says, how it fails."""

import re

import pytest
import torch

from selfsup import cli
from selfsup.export import facebook, huggingface, huggingface_mae, timm, torchvision
from selfsup.export.command import main_export

TARGETS = {
    "timm": (timm.export_timm, "config.json"),
    "hf": (huggingface.export_hf, "config.json"),
    "hf-mae": (huggingface_mae.export_hf_mae, "config.json"),
    "mae": (facebook.export_mae, "checkpoint.pth"),
    "torchvision": (torchvision.export_torchvision, "config.json"),
}
every_target = pytest.mark.parametrize("to", TARGETS)


@every_target
def test_command_prints_what_was_measured(make_run, capsys, monkeypatch, to):
    run = make_run()
    monkeypatch.setattr("sys.argv", ["selfsup", "export", str(run), "--to", to])
    assert cli.main() == 0
    out = capsys.readouterr().out
    folder = run / "export" / f"{to}-step-7"
    assert "float32: largest difference" in out and "float64: largest difference" in out
    assert f"exported {run / 'checkpoints' / 'step-00000007'} to {folder}" in out
    load = out.splitlines()[-1]
    assert (
        load.startswith("load it with ") and str(folder) in load and "DIR" not in load.replace(str(run), "")
    )


def test_timm_is_the_default_and_anything_else_is_named(make_run, monkeypatch, capsys):
    run = make_run()
    main_export(run)
    assert (run / "export" / "timm-step-7").is_dir()
    monkeypatch.setattr("sys.argv", ["selfsup", "export", str(run), "--to", "keras"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "hf-mae" in capsys.readouterr().err


@every_target
def test_folders(make_run, tmp_path, to):
    run = make_run()
    export, _ = TARGETS[to]
    report = export(run, tmp_path / "deep" / "er")
    assert report.folder == tmp_path / "deep" / "er" and report.step == 7
    with pytest.raises(ValueError, match="already exists; remove it, or give another folder with --out"):
        export(run, report.folder)
    moved = report.checkpoint.rename(tmp_path / "step")
    with pytest.raises(ValueError, match="lies in no run folder; say where to write with --out"):
        export(moved)
    with pytest.raises(ValueError, match="NOT written"):
        export(moved, moved / "state.json" / "x")


@every_target
def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_one_named(make_run, to):
    run = make_run(step=7)
    make_run(step=9)
    (run / "checkpoints" / "step-00000009" / "objective.safetensors").write_bytes(b"no")
    report = TARGETS[to][0](run)
    assert report.step == 7 and "step-00000009: damaged checkpoint passed over" in report.notes[0]


@every_target
def test_a_full_disk_leaves_nothing(make_run, monkeypatch, to):
    run = make_run()
    export, last_file = TARGETS[to]
    write_text = type(run).write_text

    def full(path, text):
        if path.name == "README.md":  # the last file; all others stand
            assert (path.parent / last_file).exists()
            raise OSError(28, "No space left on device")
        return write_text(path, text)

    monkeypatch.setattr(type(run), "write_text", full)
    with pytest.raises(ValueError, match="export NOT written: .*No space left"):
        export(run)
    assert list((run / "export").iterdir()) == []


@every_target
def test_what_a_killed_export_left_is_swept(make_run, to):
    run = make_run()
    left = run / "export" / f".tmp-{to}-step-7"
    left.mkdir(parents=True)
    (left / "stray").write_text("x")
    folder = TARGETS[to][0](run).folder
    assert not (folder / "stray").exists() and list((run / "export").iterdir()) == [folder]


@every_target
def test_cards_say_what_was_verified_and_no_private_path(make_run, to):
    run = make_run({"data": {"shards": "/home/someone/digits/train"}})
    report = TARGETS[to][0](run)
    text = (report.folder / "README.md").read_text()
    assert all(f"- {check.sentence}" in text for check in report.checks)
    assert all(f"- {note}" in text for note in report.notes)
    assert "someone" not in text and "digits/train" in text and str(run) not in text
    assert "7 optimizer steps" in text and "f1ngerpr1nt" in text and "mask_ratio: 0.75" in text
    assert re.search(r"```python\n.*DIR", text, re.DOTALL)


@every_target
def test_two_exports_have_the_same_bytes(make_run, tmp_path, to):
    run = make_run()
    first, second = (TARGETS[to][0](run, tmp_path / name).folder for name in ("a", "b"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_the_timm_card_runs(make_run, run_card):
    run = make_run()
    images = torch.randn(2, 3, 16, 16)
    in_timm, in_transformers = run_card(timm.export_timm(run).folder, images)
    assert torch.allclose(in_timm["features"], in_transformers["features"], atol=1e-5)


OPTIONS = {
    "pos_embed": "rope",
    "reg_tokens": 2,
    "pre_norm": True,
    "patch_bias": False,
    "activation": "quick_gelu",
    "layer_scale": 0.1,
}


@pytest.mark.parametrize("option", OPTIONS)
@every_target
def test_an_option_the_target_lacks_is_refused_by_name(make_run, to, option):
    kept_by_timm = to == "timm" and option not in ("pos_embed", "pre_norm", "patch_bias")
    run = make_run({"encoder": {option: OPTIONS[option]}})
    if kept_by_timm:
        assert TARGETS[to][0](run).checks
    else:
        with pytest.raises(ValueError, match=rf"--to {to}: encoder\.\w+ .*NOT exported"):
            TARGETS[to][0](run)
        assert not (run / "export").exists()


def test_timm_takes_all_it_has(make_run):
    options = {key: value for key, value in OPTIONS.items() if key != "pos_embed"}
    assert TARGETS["timm"][0](make_run({"encoder": options})).checks


@every_target
def test_averaged_weights_are_asked_for_by_name(make_run, to):
    run = make_run({"optim": {"ema": 0.9}})
    plain, averaged = TARGETS[to][0](run), TARGETS[to][0](run, weights="ema")
    assert averaged.folder.name == f"{to}-step-7-ema"
    cards = [(folder / "README.md").read_text() for folder in (plain.folder, averaged.folder)]
    assert ["averaged over steps, decay 0.9" in card for card in cards] == [False, True]
    name = "checkpoint.pth" if to == "mae" else "model.safetensors"
    assert (plain.folder / name).read_bytes() != (averaged.folder / name).read_bytes()
    with pytest.raises(ValueError, match="keeps no averaged weights"):
        TARGETS[to][0](make_run(name="without"), weights="ema")
