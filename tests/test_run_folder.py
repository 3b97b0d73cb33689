"""The run folder: one run at a time, never over another, and metrics that a resume continues."""

import json
import subprocess
import sys

import pytest

from selfsup import run_folder
from selfsup.metrics import MetricsLog, StepClock


def test_two_runs_in_one_folder(tmp_path):
    lock = run_folder.claim(tmp_path / "run", resume=False)
    run = str(tmp_path / "run")
    claim = f"import pathlib; from selfsup import run_folder; run_folder.claim(pathlib.Path({run!r}), True)"
    other = subprocess.run([sys.executable, "-c", claim], capture_output=True, text=True)
    assert other.returncode == 1 and "in use by another run" in other.stderr
    lock.close()
    run_folder.claim(tmp_path / "run", resume=True).close()


def test_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    run_folder.claim(tmp_path, resume=False).close()  # killed before its first checkpoint: used again
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    with pytest.raises(ValueError, match="already holds a run; continue it with `selfsup train --resume"):
        run_folder.claim(tmp_path, resume=False)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="run.dir: cannot write"):
        run_folder.claim(tmp_path / "file" / "run", resume=False)


def test_left_over_temporary_saves_are_removed(tmp_path):
    (tmp_path / "checkpoints" / ".tmp-00000005").mkdir(parents=True)
    run_folder.claim(tmp_path, resume=False).close()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_metrics_continue_from_the_checkpoint(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0, 30)
    for step in (10, 20, 30):
        log.write(step, {"loss": step + 1 / 3})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    log = MetricsLog(tmp_path, 20, 30)
    log.write(30, {"loss": 0.1 + 0.2})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[2]["loss"] == 0.1 + 0.2 and lines[0]["loss"] == 10 + 1 / 3  # full precision
    assert "step 30/30" in capsys.readouterr().out


def test_clock():
    clock = StepClock()
    clock.waited(0.5)
    clock.step()
    values = clock.read(samples_per_step=8, unit=("images", 1), flops_per_sample=10.0, peak=None)
    assert values.keys() == {"images_per_s", "data_wait"} and values["images_per_s"] > 0
    clock.step()
    values = clock.read(8, ("tokens", 5), 10.0, 1e3)
    assert values["mfu"] == pytest.approx(values["tokens_per_s"] / 5 * 10 / 1e3) and values["data_wait"] == 0
