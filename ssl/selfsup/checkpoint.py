"""Checkpoints found, verified and read. `saving.py` says what they are made of, and writes them.

Any of them can be read by any number of processes, split (run.parallel fsdp2) or not.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from selfsup import sharding
from selfsup.config import read_yaml, validate
from selfsup.durable import sha256
from selfsup.ema import Ema
from selfsup.encoders import AnyEncoder
from selfsup.objectives.base import Objective
from selfsup.recipe import Recipe

PARTS = {part: f"{part}.safetensors" for part in ("objective", "optimizer", "ema")}
"""Files of a state that was not split; a split one has a folder `tensors` instead."""


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
    skipped: int = 0
    """Steps left out because loss or gradient was not finite."""


def run_dir_of(checkpoint: Path) -> Path:
    """The run folder of RUN/checkpoints/step-N. Raises ValueError for one that lies elsewhere."""
    folder = checkpoint.absolute().parent
    if folder.name != "checkpoints":
        raise ValueError(
            f"{checkpoint}: lies in no run folder (RUN/checkpoints/step-N); use --init-from for weights"
        )
    return folder.parent


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


def read_tensors(checkpoint: Path, part: str, like: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The saved tensors of one of PARTS: split as those of the same name in `like` are, on their device, else whole, on
    the host."""
    if (checkpoint / "tensors").is_dir():
        return sharding.load_parts(checkpoint / "tensors", f"{part}/", like or {})
    tensors = load_file(checkpoint / PARTS[part])
    return {k: sharding.place(v, like.get(k.rpartition(":")[2])) for k, v in tensors.items()} if like else tensors


def restore(checkpoint: Path, state: TrainState) -> TrainState:
    """Loads weights, optimizer, scaler and averages in place; returns the state with its counters and facts."""
    like = state.objective.state_dict()
    state.objective.load_state_dict(read_tensors(checkpoint, "objective", like))
    content = json.loads((checkpoint / "state.json").read_text())
    moments = read_tensors(checkpoint, "optimizer", like)
    optimizer_from_names(state.optimizer, moments, content.pop("optimizer"))
    scaler = content.pop("scaler")
    if state.scaler is not None and scaler is not None:
        state.scaler.load_state_dict(scaler)
    if state.ema is not None:
        state.ema.load(read_tensors(checkpoint, "ema", like))
    counters = {key: content.pop(key, 0) for key in ("step", "samples", "skipped")}  # older ones skipped none
    return state._replace(**counters, facts=content)


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
    for checkpoint in reversed(steps_in(source / "checkpoints")):
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
    return read_tensors(checkpoint, "ema" if weights == "ema" else "objective")


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
    weights = read_tensors(checkpoint, "objective")
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


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints in RUN/checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        split = any(name.startswith("tensors/") for name in manifest)
        tensors = set() if split else {PARTS["objective"], PARTS["optimizer"]}
        absent = sorted((tensors | {"config.yaml", "state.json"}) - manifest.keys())
        if absent:
            return f"its manifest lacks {', '.join(absent)}"
        wrong = [name for name, digest in manifest.items() if sha256(checkpoint / name) != digest]
    except (OSError, ValueError) as error:
        return str(error)
    return f"SHA-256 differs from the manifest: {', '.join(wrong)}" if wrong else ""
