"""The model card of an export: facts of the run and the measured verification, nothing else."""

import json
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml

from selfsup.checkpoint import Weights
from selfsup.export.verify import Check
from selfsup.recipe import Recipe

# Entries of a checkpoint's state.json that belong to resuming, not to a reader.
_NOT_FACTS = ("step", "samples", "optimizer", "scaler")

POOLING = {
    "cls": "the class token after the last LayerNorm",
    "mean": "the mean over patch tokens after the last LayerNorm (norm, then pool)",
}

ENCODER = "An encoder for features: it has no classifier."
AUTOENCODER = "Encoder and decoder: it predicts the pixels of removed patches."


class Usage(NamedTuple):
    """What a card says of one target. `DIR` stands for the folder."""

    tags: tuple[str, ...]
    """Libraries that load it; the first is the Hub's library_name."""
    contents: str
    """What the weights are, a sentence."""
    code: tuple[str, ...]
    """Python that loads and calls it, a block each."""
    load: str
    """How to load it, a phrase."""
    compared: str
    """What was reloaded and compared, a sentence without its full stop."""
    remarks: tuple[str, ...] = ()
    """What a user could get wrong, a sentence each."""


def model_card(
    recipe: Recipe,
    state: dict[str, Any],
    weights: Weights,
    checks: tuple[Check, ...],
    unchecked: tuple[str, ...],
    usage: Usage,
) -> str:
    """README.md of an export: YAML header, what was trained on what and how, how to load, verification.

    state: the content of the checkpoint's state.json. Only what the run knows is said; a licence is
    for the publisher to add.
    """
    encoder, data = recipe.encoder, recipe.data
    facts = {key: value for key, value in state.items() if key not in _NOT_FACTS}
    header = {
        "library_name": usage.tags[0],
        "pipeline_tag": "image-feature-extraction",
        "tags": [*usage.tags, "self-supervised", recipe.objective.name, encoder.name],
    }
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {encoder.name} {encoder.embed_dim}/{encoder.depth}/{encoder.num_heads}, {recipe.objective.name}",
        "",
        f"A vision transformer (width {encoder.embed_dim}, {encoder.depth} blocks, {encoder.num_heads} "
        f"heads, patch {encoder.patch_size}) pretrained without labels by selfsup. {usage.contents}",
        "",
        f"- Objective: `{recipe.objective.name}`. {(type(recipe.objective).__doc__ or '').splitlines()[0]}",
        f"- Data: `{_short(str(data.shards))}`",
        f"- Training: {state['step']} optimizer steps, {state['samples']} samples (an image counts each "
        "time it is seen)",
        *([f"- Weights: averaged over steps, decay {recipe.optim.ema}"] if weights == "ema" else []),
        f"- Input: {encoder.in_chans} x {encoder.img_size} x {encoder.img_size} pixels, scaled to [0, 1], "
        f"then (x - mean) / std with mean {list(data.mean)}, std {list(data.std)}; short side resized "
        "(bicubic), centre crop",
        f"- Feature: {encoder.embed_dim} numbers, {POOLING[encoder.pool]}",
        *(f"- {key.replace('_', ' ')}: `{json.dumps(value)}`" for key, value in facts.items()),
        "",
        "## Load",
        "",
        "`DIR` is this folder; images are float32, normalised as above.",
        "",
        *(line for block in usage.code for line in ("```python", block.strip(), "```", "")),
        *(line for remark in usage.remarks for line in (remark, "")),
        "## Verified when exported",
        "",
        f"{usage.compared}. A fixed random input, on a CPU; missing, unexpected and mismatched weights: none.",
        "",
        *(f"- {check.sentence}" for check in checks),
        *(f"- {sentence}" for sentence in unchecked),
        "",
        "## Recipe",
        "",
        "```yaml",
        _recipe_yaml(recipe),
        "```",
        "",
    ]
    return "\n".join(lines)


def example_input(recipe: Recipe) -> str:
    """Python for one image of the right shape, for a card's code."""
    size = recipe.encoder.img_size
    return f"torch.randn(1, {recipe.encoder.in_chans}, {size}, {size})"


def _short(shards: str) -> str:
    """The last two parts of a path: a card is published, the folders above are nobody's business."""
    return "/".join(PurePath(shards).parts[-2:])


def _recipe_yaml(recipe: Recipe) -> str:
    """The sections that make the result (not `run`), with the data's path shortened."""
    content = recipe.model_dump(mode="json", exclude={"run"})
    content["data"]["shards"] = _short(str(recipe.data.shards))
    return yaml.safe_dump(content, sort_keys=False).strip()
