"""A ladder of sizes from one recipe, and what each size counts: parameters in three ways, FLOPs in two.

The way of counting moves the exponent a by up to 0.3 on the same runs, so all of them are kept with every cell.
"""

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import nn

from selfsup.config import Section, merge, validate
from selfsup.encoders.text import TextConfig
from selfsup.encoders.vit import ViTConfig
from selfsup.objectives import MAEConfig
from selfsup.objectives.base import Objective
from selfsup.objectives.clm import CLM
from selfsup.objectives.mae import MAE
from selfsup.objectives.masking import num_visible
from selfsup.objectives.mlm import MLM
from selfsup.recipe import Recipe

Width = Annotated[int, Field(ge=4, multiple_of=4)]
Count = Annotated[int, Field(ge=1)]
ParamsName = Literal["matrices", "all", "no_embedding"]
FlopsName = Literal["counted", "parameters"]


class LadderConfig(Section):
    """Sizes by width, depth and heads. MAE's decoder is scaled along: by the same share of width and of depth."""

    widths: tuple[Width, ...]
    """encoder.embed_dim of each size, ascending."""
    depths: tuple[Count, ...] | None = None
    """encoder.depth of each; or `aspect`."""
    aspect: Annotated[float, Field(gt=0)] | None = None
    """Width over depth: depth is width / aspect, rounded, at least 1."""
    heads: tuple[Count, ...] | None = None
    """encoder.num_heads of each; or `head_dim`."""
    head_dim: Annotated[int, Field(ge=1)] | None = None
    """Channels of a head: the number of heads is the divisor of the width nearest to width / head_dim."""

    @model_validator(mode="after")
    def _check(self) -> "LadderConfig":
        if list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths: expected different ones, ascending, got {list(self.widths)}")
        for one, other in (("depths", "aspect"), ("heads", "head_dim")):
            given, instead = getattr(self, one), getattr(self, other)
            if (given is None) == (instead is None):
                raise ValueError(f"{one}: expected {one}, one a width, or {other}, and not both")
            if given is not None and len(given) != len(self.widths):
                raise ValueError(f"{one}: expected {len(self.widths)}, one a width, got {len(given)}")
        return self

    def shapes(self) -> list[tuple[int, int, int]]:
        """(width, depth, heads) of each size."""
        found = []
        for i, width in enumerate(self.widths):
            depth = self.depths[i] if self.depths else max(1, round(width / self.aspect))
            heads = self.heads[i] if self.heads else nearest_divisor(width, width / self.head_dim)
            found.append((width, depth, heads))
        return found


class Account(NamedTuple):
    """What a size counts. FLOPs are of one sample (a row, an image), forward and backward."""

    all: int
    """Every trained parameter, padded rows of the token embedding among them."""
    no_embedding: int
    """Without what is only looked up or added: tokens, positions, types, class, register and mask tokens. A tied
    head is a lookup here (Kaplan et al. 2020)."""
    matrices: int
    """Weights of linear layers and convolutions, and of the vocabulary's head, tied or not: what multiplies."""
    counted: float
    """Matrix products as torch's counter has them, attention in full."""
    parameters: float
    """6 a matrix weight and token that passes it: 6 N of each token processed; mae 6 (N_enc visible + N_dec all);
    two views 12 N, with a target network 16 N (its forward pass too). Attention is left out."""
    unit: int
    """Of samples of data D in a sample: tokens of a row, 1 for an image."""


class Size(NamedTuple):
    """One size: what replaces keys of the base recipe, and its account."""

    name: str
    changes: dict[str, Any]
    account: Account


def nearest_divisor(number: int, wanted: float) -> int:
    """The divisor of `number` nearest to `wanted` in ratio; the smaller of two alike."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (max(d / wanted, wanted / d), d))


def sizes(base: Recipe, ladder: LadderConfig) -> list[Size]:
    """The sizes, each validated as a recipe. Raises ValueError, naming the size, for one that is none."""
    if not isinstance(base.encoder, (TextConfig, ViTConfig)):
        raise ValueError(
            f"encoder.name: expected text or vit, whose widths a ladder can change, got {base.encoder.name}"
        )
    found = []
    for width, depth, heads in ladder.shapes():
        changes = scaled(base, width, depth, heads)
        name = f"{width}/{depth}/{heads}"
        try:
            recipe = resized(base, changes)
        except ValueError as error:
            raise ValueError(f"ladder: size {name}: {error}") from None
        found.append(Size(name, changes, account(recipe)))
    return found


def scaled(base: Recipe, width: int, depth: int, heads: int) -> dict[str, Any]:
    """What a size of the base recipe changes."""
    encoder: dict[str, Any] = {"embed_dim": width, "depth": depth, "num_heads": heads}
    objective: dict[str, Any] = {}
    if isinstance(base.encoder, TextConfig):
        if base.encoder.hidden_dim is not None:
            encoder["hidden_dim"] = max(1, round(base.encoder.hidden_dim * width / base.encoder.embed_dim))
        if base.encoder.num_kv_heads is not None:
            encoder["num_kv_heads"] = nearest_divisor(
                heads, heads * base.encoder.num_kv_heads / base.encoder.num_heads
            )
    if isinstance(base.objective, MAEConfig):
        mae = base.objective
        decoder = max(4, 4 * round(mae.decoder_embed_dim * width / base.encoder.embed_dim / 4))
        head_dim = mae.decoder_embed_dim / mae.decoder_num_heads
        objective = {
            "decoder_embed_dim": decoder,
            "decoder_depth": max(min(1, mae.decoder_depth), round(mae.decoder_depth * depth / base.encoder.depth)),
            "decoder_num_heads": nearest_divisor(decoder, decoder / head_dim),
        }
    return {"encoder": encoder, **({"objective": objective} if objective else {})}


def resized(base: Recipe, changes: dict[str, Any]) -> Recipe:
    """The base recipe with changes. Raises ValueError, a line a fault."""
    return validate(Recipe, merge(base.model_dump(mode="json"), changes))


def account(recipe: Recipe) -> Account:
    """Counts a recipe's model, built on the meta device: nothing is computed."""
    with torch.device("meta"):
        objective = recipe.objective.build(recipe.encoder)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    looked_up = sum(p.numel() for name, p in trained.items() if _is_lookup(name))
    everything = sum(p.numel() for p in trained.values())
    unit = recipe.throughput[1]
    return Account(
        everything, everything - looked_up, matrices(objective), objective.flops_per_sample(),
        parameter_flops(objective, recipe), unit,
    )  # fmt: skip


_LOOKUPS = ("token_embed.weight", "pos_embed.weight", "type_embed.weight", "pos_embed", "cls_token", "reg_token",
            "mask_token", "decoder_pos_embed")  # fmt: skip


def _is_lookup(name: str) -> bool:
    return any(name == end or name.endswith("." + end) for end in _LOOKUPS)


def matrices(module: nn.Module) -> int:
    """Weights that multiply; those of a target network, which is not trained, left out. A tied head is counted."""
    found = sum(
        layer.weight.numel() for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not name.startswith("target")
    )  # fmt: skip
    tied = isinstance(module, (CLM, MLM)) and module.config.tied
    return found + (module.word_weights.numel() if tied else 0)


def parameter_flops(objective: Objective, recipe: Recipe) -> float:
    """`Account.parameters`."""
    if isinstance(objective, (CLM, MLM)):
        return 6.0 * matrices(objective) * recipe.encoder.max_length
    vit = recipe.encoder
    assert isinstance(vit, ViTConfig)
    if isinstance(objective, MAE):
        visible = num_visible(vit.num_patches, recipe.objective.mask_ratio)
        return 6.0 * (matrices(objective.encoder) * visible + matrices(objective.decoder) * vit.num_patches)
    per_weight = 16.0 if any(name.startswith("target") for name, _ in objective.named_children()) else 12.0
    return per_weight * matrices(objective.encoder) * vit.num_patches


def vocabulary(recipe: Recipe) -> int | None:
    """V where the loss is a cross-entropy over a vocabulary: an untrained model's is ln V."""
    return recipe.encoder.vocab_size if isinstance(recipe.encoder, TextConfig) else None
