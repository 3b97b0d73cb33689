"""The model card of an export: facts of the run and the measured verification, nothing else."""

import json
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml

from selfsup.recipe import Recipe

# Entries of a checkpoint's state.json that belong to resuming, not to a reader.
_NOT_FACTS = ("step", "samples", "optimizer", "scaler")

POOLING = {
    "cls": "the class token after the last LayerNorm",
    "mean": "the mean over patch tokens after the last LayerNorm (norm, then pool)",
}


class Check(NamedTuple):
    """One comparison of the reloaded model with the trained one."""

    library: str
    """Name and version."""
    dtype: str
    """float32 or float64."""
    difference: float
    """Largest absolute difference over all tokens and features."""
    limit: float
    """What was allowed: a tolerance times max(1, largest activation)."""

    @property
    def sentence(self) -> str:
        found = f"largest difference {self.difference:.1e} (limit {self.limit:.1e})"
        return f"{self.library}, {self.dtype}: {found}"


def model_card(
    recipe: Recipe, state: dict[str, Any], checks: tuple[Check, ...], unchecked: tuple[str, ...]
) -> str:
    """README.md of an export: YAML header, what was trained on what and how, how to load, verification.

    state: the content of the checkpoint's state.json. Only what the run knows is said; a licence is
    for the publisher to add.
    """
    encoder, data = recipe.encoder, recipe.data
    facts = {key: value for key, value in state.items() if key not in _NOT_FACTS}
    header = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "transformers", "self-supervised", recipe.objective.name, encoder.name],
    }
    shape = f"{encoder.in_chans} x {encoder.img_size} x {encoder.img_size}"
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {encoder.name} {encoder.embed_dim}/{encoder.depth}/{encoder.num_heads}, {recipe.objective.name}",
        "",
        f"A vision transformer (width {encoder.embed_dim}, {encoder.depth} blocks, {encoder.num_heads} "
        f"heads, patch {encoder.patch_size}) pretrained without labels by selfsup. An encoder for "
        "features: it has no classifier.",
        "",
        f"- Objective: `{recipe.objective.name}`. {(type(recipe.objective).__doc__ or '').splitlines()[0]}",
        f"- Data: `{_short(str(data.shards))}`",
        f"- Training: {state['step']} optimizer steps, {state['samples']} samples (an image counts each "
        "time it is seen)",
        f"- Input: {shape} pixels, scaled to [0, 1], then (x - mean) / std with mean {list(data.mean)}, "
        f"std {list(data.std)}; short side resized (bicubic), centre crop",
        f"- Feature: {encoder.embed_dim} numbers, {POOLING[encoder.pool]}",
        *(f"- {key.replace('_', ' ')}: `{json.dumps(value)}`" for key, value in facts.items()),
        "",
        "## Load",
        "",
        *_loading(shape.replace(" x ", ", ")),
        "## Verified when exported",
        "",
        "Reloaded from this folder and compared with the trained encoder on a fixed random input, on a "
        "CPU, all tokens and the pooled feature; missing, unexpected and mismatched weights: none.",
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


def _loading(shape: str) -> list[str]:
    return [
        "`DIR` is this folder; images are float32, normalised as above.",
        "",
        "```python",
        "import timm, torch",
        "",
        'model = timm.create_model("local-dir:DIR", pretrained=True).eval()',
        f"features = model(torch.randn(1, {shape}))",
        "data = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**data)  # a PIL image to a normalised tensor",
        "```",
        "",
        "```python",
        "from transformers import AutoModel",
        "",
        'model = AutoModel.from_pretrained("DIR")  # needs timm installed',
        f"features = model(torch.randn(1, {shape})).pooler_output",
        "```",
        "",
    ]


def _short(shards: str) -> str:
    """The last two parts of a path: a card is published, the folders above are nobody's business."""
    return "/".join(PurePath(shards).parts[-2:])


def _recipe_yaml(recipe: Recipe) -> str:
    """The sections that make the result (not `run`), with the data's path shortened."""
    content = recipe.model_dump(mode="json", exclude={"run"})
    content["data"]["shards"] = _short(str(recipe.data.shards))
    return yaml.safe_dump(content, sort_keys=False).strip()
