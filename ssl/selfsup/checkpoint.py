"""Crash-safe checkpoints without pickle: safetensors, JSON, a manifest of SHA-256.

A checkpoint is a folder `checkpoints/step-00001000` that appears by a rename, complete or not at
all: written to `.tmp-…`, every file fsynced, then the manifest, then the rename, then the parent's
fsync; only then are older ones removed. Loading verifies the manifest.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfsup.config import dump_yaml, read_yaml, validate
from selfsup.durable import fsync_path, sha256
from selfsup.ema import Ema
from selfsup.encoders import AnyEncoder
from selfsup.objectives.base import Objective
from selfsup.optim import RESCUE
from selfsup.recipe import Recipe

FILES = {"objective.safetensors", "optimizer.safetensors", "config.yaml", "state.json"}
EMA_FILE = "ema.safetensors"


class TrainState(NamedTuple):
    """All that a run is, between two steps."""

    objective: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    recipe: Recipe
    step: int
    """Optimizer steps done."""
    samples: int
    """Samples consumed: the cursor of the data order."""
    facts: dict[str, Any]
    """Index fingerprint, order version, git revision: JSON values."""
    ema: Ema | None = None
    """Averaged weights, where optim.ema asks for them."""


def save_checkpoint(run_dir: Path, state: TrainState) -> Path:
    """Writes `checkpoints/step-N` durably, then removes old ones beyond `run.keep_checkpoints`.

    Raises ValueError where it cannot be written, or holds a value that is not finite; earlier
    checkpoints are untouched then.
    """
    broken = [k for k, v in state.objective.state_dict().items() if not v.isfinite().all()]
    if broken:
        raise ValueError(
            f"weights are not finite at step {state.step}, first {broken[0]}: checkpoint NOT saved; earlier ones "
            f"are intact. {RESCUE}"
        )
    folder = run_dir / "checkpoints"
    final, tmp = folder / f"step-{state.step:08d}", folder / f".tmp-{state.step:08d}"
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        _write(tmp, state)
        if final.exists():  # this very step was saved before
            shutil.rmtree(final)
        os.rename(tmp, final)
        fsync_path(folder)
        fsync_path(run_dir)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        shutil.rmtree(tmp, ignore_errors=True)
        raise ValueError(f"{final}: checkpoint NOT saved: {error}; earlier checkpoints are intact") from error
    for old in _steps(folder)[: -state.recipe.run.keep_checkpoints]:
        shutil.rmtree(
            old, onerror=lambda _, path, fault: print(f"cannot remove {path}: {fault[1]}", file=sys.stderr)
        )
    return final


def set_aside_later(run_dir: Path, step: int) -> None:
    """Renames checkpoints beyond `step`, where a resumed run goes on, and says so: they belong to
    another course of training, and would crowd out the new ones."""
    for later in _steps(run_dir / "checkpoints"):
        if int(later.name.removeprefix("step-")) > step:
            aside = later.with_name(f".abandoned-{later.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(later, aside)
            print(f"going on from step {step}: {later.name} is set aside as {aside}")


def run_dir_of(checkpoint: Path) -> Path:
    """The run folder of RUN/checkpoints/step-N. Raises ValueError for one that lies elsewhere."""
    folder = checkpoint.absolute().parent
    if folder.name != "checkpoints":
        raise ValueError(
            f"{checkpoint}: lies in no run folder (RUN/checkpoints/step-N); use --init-from for weights"
        )
    return folder.parent


def _write(tmp: Path, state: TrainState) -> None:
    """All files of a checkpoint, fsynced; the manifest last."""
    save_file(
        {k: v.contiguous() for k, v in state.objective.state_dict().items()}, tmp / "objective.safetensors"
    )
    tensors, groups = optimizer_to_names(state.optimizer)
    save_file(tensors, tmp / "optimizer.safetensors")
    if state.ema is not None:
        save_file({k: v.contiguous() for k, v in state.ema.tensors.items()}, tmp / EMA_FILE)
    (tmp / "config.yaml").write_text(dump_yaml(state.recipe))
    content = {
        "step": state.step,
        "samples": state.samples,
        "optimizer": groups,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        **state.facts,
    }
    (tmp / "state.json").write_text(json.dumps(content, indent=1))
    manifest = {}
    for path in sorted(tmp.iterdir()):
        fsync_path(path)
        manifest[path.name] = sha256(path)
    (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1))
    fsync_path(tmp / "manifest.json")
    fsync_path(tmp)


def optimizer_to_names(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as tensors keyed `exp_avg:encoder.norm.weight`, and its groups as JSON."""
    content = optimizer.state_dict()
    names = _parameter_names(content)
    tensors = {
        f"{key}:{names[i]}": value.contiguous()
        for i, entries in content["state"].items()
        for key, value in entries.items()
    }
    return tensors, [{k: v for k, v in group.items() if k != "params"} for group in content["param_groups"]]


def optimizer_from_names(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Undoes `optimizer_to_names`. Raises ValueError where the parameter names differ."""
    content = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    ours = [group["param_names"] for group in content["param_groups"]]
    theirs = [group["param_names"] for group in groups]
    if ours != theirs:
        raise ValueError("optimizer state: its parameter names are not those of this model")
    index = {name: i for i, name in _parameter_names(content).items()}
    for key, value in tensors.items():
        field, name = key.split(":", 1)
        state.setdefault(index[name], {})[field] = value
    merged = [
        {**new, "params": old["params"]} for old, new in zip(content["param_groups"], groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def _parameter_names(content: dict[str, Any]) -> dict[int, str]:
    """An optimizer's state_dict numbers its parameters; their names by number."""
    return {
        i: name
        for group in content["param_groups"]
        for i, name in zip(group["params"], group["param_names"], strict=True)
    }


def restore(checkpoint: Path, state: TrainState) -> TrainState:
    """Loads weights, optimizer, scaler and averages in place; returns the state with its counters and facts."""
    state.objective.load_state_dict(load_file(checkpoint / "objective.safetensors"))
    content = json.loads((checkpoint / "state.json").read_text())
    optimizer_from_names(
        state.optimizer, load_file(checkpoint / "optimizer.safetensors"), content.pop("optimizer")
    )
    scaler = content.pop("scaler")
    if state.scaler is not None and scaler is not None:
        state.scaler.load_state_dict(scaler)
    if state.ema is not None:
        state.ema.load(load_file(checkpoint / EMA_FILE))
    return state._replace(step=content.pop("step"), samples=content.pop("samples"), facts=content)


def find_checkpoint(source: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint of a run folder (or `source` itself, if it is one).

    Returns it with one line for every newer one that is damaged. Raises ValueError where none is whole.
    """
    if (source / "manifest.json").exists():
        faults = _damage(source)
        if faults:
            raise ValueError(f"{source}: damaged checkpoint: {faults}")
        return source, []
    passed_over = []
    for checkpoint in reversed(_steps(source / "checkpoints")):
        faults = _damage(checkpoint)
        if not faults:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint}: damaged checkpoint passed over: {faults}")
    missing = f"{source}: no whole checkpoint in this folder; start it anew with selfsup train CONFIG"
    raise ValueError("\n".join([missing, *passed_over]))


def read_recipe(checkpoint: Path) -> Recipe:
    """The recipe a checkpoint was made with."""
    return validate(Recipe, read_yaml(checkpoint / "config.yaml"))


Weights = Literal["trained", "ema", "target"]
"""Those of the last step, their average over steps (optim.ema), or the target network's, of an objective
that keeps one (byol): asked for by name, so that a result always says which it was."""


def weights_suffix(weights: Weights) -> str:
    """What the name of a file or folder ends in, so that other weights never share one."""
    return "" if weights == "trained" else f"-{weights}"


def weights_title(weights: Weights) -> str:
    """What the title of a result ends in."""
    return {"trained": "", "ema": ", averaged weights", "target": ", target network"}[weights]


def load_objective(source: Path, weights: Weights = "trained") -> tuple[Objective, Recipe, Path, list[str]]:
    """The whole pretrained objective of a run folder or checkpoint, in eval mode, its recipe, and what
    `find_checkpoint` says: the checkpoint, and a line for every newer one that is damaged.

    Raises ValueError for the average of a run that kept none, and for a target network: it is a part.
    """
    if weights == "target":
        raise ValueError(
            "weights: a target network is an encoder, not a whole objective; use `trained`, or a command that "
            "takes the encoder alone (probe, embed, export --to timm)"
        )
    checkpoint, passed_over = find_checkpoint(source)
    recipe = read_recipe(checkpoint)
    objective = recipe.objective.build(recipe.encoder)
    objective.load_state_dict(_tensors(checkpoint, recipe, weights))
    return objective.eval(), recipe, checkpoint, passed_over


def load_encoder(source: Path, weights: Weights = "trained") -> tuple[AnyEncoder, Recipe, Path, list[str]]:
    """The encoder alone, and the rest as `load_objective`.

    Raises ValueError for the average of a run that kept none, and for the target network of an
    objective that has none.
    """
    checkpoint, passed_over = find_checkpoint(source)
    recipe, prefix = read_recipe(checkpoint), "target_encoder." if weights == "target" else "encoder."
    tensors = _tensors(checkpoint, recipe, weights)
    parts = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if weights == "target" and not parts:
        raise ValueError(
            f"weights: {checkpoint} holds no target network, its objective {recipe.objective.name} keeps no "
            "target; use `trained`"
        )
    encoder = recipe.encoder.build()
    encoder.load_state_dict(parts)
    return encoder.eval(), recipe, checkpoint, passed_over


def _tensors(checkpoint: Path, recipe: Recipe, weights: Weights) -> dict[str, Tensor]:
    if weights == "ema" and recipe.optim.ema is None:
        raise ValueError(
            f"weights: {checkpoint} keeps no averaged weights (its optim.ema is none); use `trained`"
        )
    return load_file(checkpoint / (EMA_FILE if weights == "ema" else "objective.safetensors"))


def init_from(source: Path, objective: nn.Module, recipe: Recipe, facts: dict[str, Any]) -> str:
    """Loads weights only, for a new run; returns lines saying what was taken and what passed over.

    The whole objective where the saved one has the same name, else its encoder; a target network's too, which
    would otherwise begin at random and have the online one unlearn what it brings.
    facts: of the new run's data, as TrainState has them. Raises ValueError where shapes or names do not fit, and
    for weights that read text by another tokenizer: every token would mean another word.
    """
    checkpoint, passed_over = find_checkpoint(source)
    saved = read_recipe(checkpoint)
    known = json.loads((checkpoint / "state.json").read_text()).get("tokenizer_sha256")
    ours = facts.get("tokenizer_sha256")
    if None not in (known, ours) and known != ours:
        raise ValueError(
            f"--init-from {source}: its weights are for another tokenizer: expected SHA-256 {known[:12]}, data.shards "
            f"has {ours[:12]}; tokenise with the tokenizer.json of that run's folder"
        )
    weights = load_file(checkpoint / "objective.safetensors")
    fresh = objective.state_dict()
    whole = saved.objective.name == recipe.objective.name
    twice = not whole and any(k.startswith("target_encoder.") for k in fresh)
    if not whole:
        weights = {k: v for k, v in weights.items() if k.startswith("encoder.")}
        weights |= {f"target_{k}": v for k, v in weights.items()} if twice else {}
    taken = "" if whole else ("encoder.", "target_encoder.")
    target = {k: v for k, v in fresh.items() if k.startswith(taken)}
    unlike = [k for k in sorted({*weights, *target}) if _shape(weights, k) != _shape(target, k)]
    if unlike:
        k = unlike[0]
        raise ValueError(
            f"--init-from {source}: {len(unlike)} tensors do not fit this recipe, first {k}: "
            f"expected {_shape(target, k)}, got {_shape(weights, k)}; compare its config.yaml"
        )
    objective.load_state_dict(weights, strict=whole)
    part = "all weights" if whole else "the encoder's weights" + twice * " and its target's"
    return "\n".join([*passed_over, f"initialised {part} from {checkpoint}"])


def _shape(tensors: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(tensors[key].shape) if key in tensors else None


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        absent = sorted(FILES - manifest.keys())
        if absent:
            return f"its manifest lacks {', '.join(absent)}"
        wrong = [name for name, digest in manifest.items() if sha256(checkpoint / name) != digest]
    except (OSError, ValueError) as error:
        return str(error)
    return f"SHA-256 differs from the manifest: {', '.join(wrong)}" if wrong else ""
