"""The model card of an export: facts of the run and the measured verification, nothing else."""

import json
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml

from selfsup.checkpoint import Weights
from selfsup.encoders import AnyEncoderConfig
from selfsup.encoders.text import TextConfig
from selfsup.encoders.vit import ViTConfig
from selfsup.export.verify import Check
from selfsup.recipe import Recipe

# Entries of a checkpoint's state.json that belong to resuming, not to a reader.
_NOT_FACTS = ("step", "samples", "optimizer", "scaler")

# The Hub's names for what objectives of text predict.
_PIPELINES = {"mlm": "fill-mask", "clm": "text-generation"}

POOLING = {
    "cls": "the class token after the last LayerNorm",
    "mean": "the mean over patch tokens after the last LayerNorm (norm, then pool)",
}
TEXT_POOLING = {
    "mean": "the mean over the text's tokens after the last norm, padding left out",
    "cls": "the first token after the last norm",
    "last": "the text's last token after the last norm",
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
    encoder, data, described = recipe.encoder, recipe.data, describe(recipe.encoder)
    text = isinstance(encoder, TextConfig)
    facts = {key: value for key, value in state.items() if key not in _NOT_FACTS}
    header = {
        "library_name": usage.tags[0],
        "pipeline_tag": _PIPELINES.get(recipe.objective.name, "image-feature-extraction"),
        "tags": [*usage.tags, "self-supervised", recipe.objective.name, described.tag],
    }
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {described.title}, {recipe.objective.name}",
        "",
        f"{described.sentence} pretrained without labels by selfsup. {usage.contents}",
        "",
        f"- Objective: `{recipe.objective.name}`. {(type(recipe.objective).__doc__ or '').splitlines()[0]}",
        f"- Data: `{_short(str(data.shards))}`",
        f"- Training: {state['step']} optimizer steps, {state['samples']} samples "
        f"({'a row' if text else 'an image'} counts each time it is seen)",
        *_weights_line(recipe, weights),
        _input_line(recipe),
        f"- Feature: {encoder.embed_dim} numbers, {described.feature}",
        *(f"- {key.replace('_', ' ')}: `{json.dumps(value)}`" for key, value in facts.items()),
        "",
        "## Load",
        "",
        "`DIR` is this folder" + ("." if text else "; images are float32, normalised as above."),
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


class Described(NamedTuple):
    """An encoder in words."""

    title: str
    """A few words."""
    tag: str
    """One word for the Hub."""
    sentence: str
    """The beginning of a sentence: what it is."""
    feature: str
    """What a feature is, a phrase."""


def describe(encoder: AnyEncoderConfig) -> Described:
    """Architecture and feature, for a card."""
    if isinstance(encoder, TextConfig):
        dim, depth, heads = encoder.embed_dim, encoder.depth, encoder.num_heads
        causal = "causal " if encoder.causal else ""
        shape = f"width {dim}, {depth} blocks, {heads} heads, {encoder.vocab_size} tokens"
        sentence = f"A {causal}transformer over tokens ({shape})"
        return Described(
            f"{encoder.name} {dim}/{depth}/{heads}", encoder.name, sentence, TEXT_POOLING[encoder.pool]
        )
    if isinstance(encoder, ViTConfig):
        dim, depth, heads = encoder.embed_dim, encoder.depth, encoder.num_heads
        return Described(
            f"{encoder.name} {dim}/{depth}/{heads}",
            encoder.name,
            f"A vision transformer (width {dim}, {depth} blocks, {heads} heads, patch {encoder.patch_size})",
            POOLING[encoder.pool],
        )
    title, stem = encoder.model, ""
    if encoder.stem == "cifar":
        title += " for small images"
        stem = ", but with a 3x3 convolution of stride 1 and no max-pool for a stem (Chen et al. 2020, B.9),"
    pooling = "as timm pools what the last layer gives"
    return Described(title, encoder.model, f"timm's {encoder.model}{stem}", pooling)


def _input_line(recipe: Recipe) -> str:
    encoder, data = recipe.encoder, recipe.data
    if isinstance(encoder, TextConfig):
        wrap = {"bert": "`[CLS] text [SEP]`", "gpt": "`text [SEP]`"}[recipe.objective.wrap]
        return f"- Input: up to {encoder.max_length} tokens, each document as {wrap} of its tokenizer"
    return (
        f"- Input: {encoder.in_chans} x {encoder.img_size} x {encoder.img_size} pixels, scaled to [0, 1], "
        f"then (x - mean) / std with mean {list(data.mean)}, std {list(data.std)}; short side resized "
        "(bicubic), centre crop"
    )


def _weights_line(recipe: Recipe, weights: Weights) -> list[str]:
    """Nothing for those of the last step."""
    if weights == "ema":
        return [f"- Weights: averaged over steps, decay {recipe.optim.ema}"]
    if weights == "target":
        return [f"- Weights: the target network's, which {recipe.objective.name} averages while it trains"]
    return []


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
    for key in {"shards", "tokenizer"} & content["data"].keys():
        if content["data"][key] is not None:
            content["data"][key] = _short(content["data"][key])
    return yaml.safe_dump(content, sort_keys=False).strip()
