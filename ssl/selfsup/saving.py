"""Crash-safe checkpoints without pickle: safetensors, JSON, a manifest of SHA-256.

A checkpoint is a folder `checkpoints/step-00001000` that appears by a rename, complete or not at all: written to
`.tmp-…`, every file fsynced, then the manifest, then the rename, then the parent's fsync; only then are older ones
removed. `checkpoint.py` finds and reads them.

Where every process holds all weights the first one writes `objective.safetensors`, `optimizer.safetensors` and
`ema.safetensors`; where weights are split (run.parallel fsdp2) each writes its parts into `tensors/`.
"""

import json
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from selfsup import dist, sharding
from selfsup.checkpoint import PARTS, TrainState, optimizer_to_names, steps_in
from selfsup.config import dump_yaml
from selfsup.durable import fsync_path, sha256
from selfsup.optim import RESCUE


class Snapshot(NamedTuple):
    """What a checkpoint holds, apart from the objects that go on training."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """objective, optimizer and, where the recipe asks for it, ema: tensors by name."""
    config: str
    content: dict[str, Any]
    """state.json."""
    sharded: bool


def snapshot(state: TrainState, copy: bool = False) -> Snapshot:
    """The state between two steps; copy: in memory of its own, which training does not change.

    Raises ValueError where a weight is not finite.
    """
    weights = state.objective.state_dict()
    broken = [k for k, v in weights.items() if not sharding.local(v).isfinite().all()]
    if broken:
        raise ValueError(
            f"weights are not finite at step {state.step}, first {broken[0]}: checkpoint NOT saved; earlier ones "
            f"are intact. {RESCUE}"
        )
    moments, groups = optimizer_to_names(state.optimizer)
    tensors = {"objective": weights, "optimizer": moments}
    if state.ema is not None:
        tensors["ema"] = state.ema.tensors
    if copy:
        tensors = {part: sharding.host_copy(named) for part, named in tensors.items()}
    content = {
        "step": state.step,
        "samples": state.samples,
        "skipped": state.skipped,
        "optimizer": groups,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        **state.facts,
    }
    sharded = any(isinstance(v, DTensor) for v in weights.values())
    return Snapshot(state.step, tensors, dump_yaml(state.recipe), content, sharded)


class Saver:
    """Writes a run's checkpoints; all processes call it alike, each does its part."""

    def __init__(self, run_dir: Path, keep: int, background: bool) -> None:
        """keep: newest checkpoints that stay. background: write from a copy, while training goes on."""
        self._run_dir, self._keep = run_dir, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._group = dist.host_group("checkpoints" if background else "")
        self._writing: Future[Path] | None = None
        self.step: int | None = None
        """Of the last checkpoint begun, None before the first."""
        self.written: int | None = None
        """Of the last one that is on the disk."""

    def save(self, state: TrainState, prune: bool = True) -> None:
        """Writes `checkpoints/step-N`, or begins to; waits for the one before.

        prune: remove old ones. Raises ValueError on every process where one cannot write, or holds a value that is
        not finite: earlier checkpoints are untouched then. In the background that comes with the next call.
        """
        self.wait()
        takes_part = sharding.is_sharded(state.objective) or dist.rank() == 0
        # Agreed upon before anybody writes: what follows is a collective where the state is split.
        taken = dist.together(lambda: snapshot(state, self._thread is not None) if takes_part else None)
        self.step = state.step
        dist.together(lambda: None if taken is None else self._begin(taken, prune))
        if self._thread is None:
            self.written = state.step

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self._run_dir / "checkpoints" / f"step-{step:08d}"

    def wait(self) -> None:
        """Until what was begun is on the disk. Raises as `save` does."""
        writing, self._writing = self._writing, None
        dist.together(lambda: writing and writing.result())
        self.written = self.step

    def close(self) -> None:
        """Waits, then ends the thread."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def _begin(self, taken: Snapshot, prune: bool) -> None:
        job = (self._run_dir, taken, self._keep if prune else None, self._group)
        if self._thread is None:
            write_checkpoint(*job)
        else:
            self._writing = self._thread.submit(write_checkpoint, *job)


def save_checkpoint(run_dir: Path, state: TrainState) -> Path:
    """Writes `checkpoints/step-N` of a run in one process, then removes old ones. Raises as `write_checkpoint`."""
    return write_checkpoint(run_dir, snapshot(state), state.recipe.run.keep_checkpoints)


def write_checkpoint(
    run_dir: Path, taken: Snapshot, keep: int | None, group: ProcessGroup | None = None
) -> Path:
    """Writes `checkpoints/step-N` durably, then removes old ones but the newest `keep` (None: none).

    Of a split state all processes of `group` call it. Raises ValueError where it cannot be written; earlier
    checkpoints are untouched then.
    """
    folder = run_dir / "checkpoints"
    final, tmp = folder / f"step-{taken.step:08d}", folder / f".tmp-{taken.step:08d}"
    try:
        _write(tmp, taken, group)
        _alone(taken, group, _commit, tmp, final)
    except (OSError, SafetensorError, CheckpointException) as error:  # safetensors reports a full disk as its own
        if not taken.sharded or dist.rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise ValueError(f"{final}: checkpoint NOT saved: {error}; earlier checkpoints are intact") from error
    if keep is not None and (not taken.sharded or dist.rank() == 0):
        for old in steps_in(folder)[:-keep]:
            shutil.rmtree(
                old, onerror=lambda _, path, fault: print(f"cannot remove {path}: {fault[1]}", file=sys.stderr)
            )
    return final


def _write(tmp: Path, taken: Snapshot, group: ProcessGroup | None) -> None:
    """All files of a checkpoint, fsynced; the manifest last."""
    _alone(taken, group, _open, tmp, taken)
    if taken.sharded:
        named = {f"{part}/{k}": v for part, tensors in taken.tensors.items() for k, v in tensors.items()}
        assert group is not None
        sharding.save_parts(named, tmp / "tensors", group)
        own, fault = {}, None
        try:
            own = {str(path.relative_to(tmp)): _flush(path) for path in sharding.own_files(tmp / "tensors")}
        except OSError as error:  # where network file systems report a full disk
            fault = error
        parts = [json.loads(text) for text in dist.gather_texts(json.dumps(own), group)]
        dist.raise_together(fault, dist.sum_over_ranks(float(fault is not None), group=group)[0], group)
        manifest = {name: digest for part in parts for name, digest in part.items()}
    else:
        for part, tensors in taken.tensors.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, tmp / PARTS[part])
        manifest = {PARTS[part]: _flush(tmp / PARTS[part]) for part in taken.tensors}
    _alone(taken, group, _seal, tmp, manifest)


def _alone(taken: Snapshot, group: ProcessGroup | None, action: Any, *arguments: Any) -> None:
    """Calls `action` on the first process; of a split state the others wait for it and learn of a fault."""
    if not taken.sharded:
        action(*arguments)
        return
    fault = None
    if dist.rank() == 0:
        try:
            action(*arguments)
        except OSError as error:
            fault = error
    dist.raise_together(fault, dist.sum_over_ranks(float(fault is not None), group=group)[0], group)


def _open(tmp: Path, taken: Snapshot) -> None:
    shutil.rmtree(tmp, ignore_errors=True)
    (tmp / "tensors" if taken.sharded else tmp).mkdir(parents=True)
    (tmp / "config.yaml").write_text(taken.config)
    (tmp / "state.json").write_text(json.dumps(taken.content, indent=1))


def _flush(path: Path) -> str:
    """Fsyncs a file; its SHA-256."""
    fsync_path(path)
    return sha256(path)


def _seal(tmp: Path, manifest: dict[str, str]) -> None:
    """The manifest of the tensors' files and of the others, durably."""
    manifest |= {name: _flush(tmp / name) for name in ("config.yaml", "state.json")}
    (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1))
    fsync_path(tmp / "manifest.json")
    for folder in (tmp / "tensors", tmp):
        if folder.is_dir():
            fsync_path(folder)


def _commit(tmp: Path, final: Path) -> None:
    aside = final.with_name(f".abandoned-{final.name}")
    if final.exists():  # this very step was saved before
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(tmp, final)
    fsync_path(final.parent)
    fsync_path(final.parent.parent)
    shutil.rmtree(aside, ignore_errors=True)


def set_aside_later(run_dir: Path, step: int) -> None:
    """Renames checkpoints beyond `step`, where a resumed run goes on, and says so: they belong to
    another course of training, and would crowd out the new ones."""
    for later in steps_in(run_dir / "checkpoints"):
        if int(later.name.removeprefix("step-")) > step:
            aside = later.with_name(f".abandoned-{later.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(later, aside)
            print(f"going on from step {step}: {later.name} is set aside as {aside}")
