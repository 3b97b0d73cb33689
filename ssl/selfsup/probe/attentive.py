"""The attentive probe: one learned query reads the frozen patch tokens (Bardes et al. 2024, V-JEPA).

Features trained by masking spread what they know over the tokens, so a linear probe of one pooled
vector understates them. This is V-JEPA's full form, cross-attention and an MLP block. Cheaper ones
(AIM's, which has no MLP; arXiv 2506.10178) save the projections of a head that costs a few per cent
of the encoder's forward pass, and their published numbers are fewer.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import tyro
from einops import rearrange
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from selfsup.attention.dispatch import attention_function
from selfsup.export.frozen import FrozenEncoder
from selfsup.layers.block import Mlp
from selfsup.optim import param_groups
from selfsup.probe.features import encoder_tokens
from selfsup.probe.fit import (
    FORWARD,
    Batch,
    accuracy,
    cached_batches,
    eval_views,
    fit,
    frozen_views,
    in_order,
    own_generators,
    seed_generators,
    steps_of,
)
from selfsup.probe.report import Mode, publish
from selfsup.probe.sources import Labelled, Setup, expect, expect_crop_scale, load_sources
from selfsup.probe.supervised import Trial, supervised
from selfsup.schedule import warmup_cosine

INIT_STD = 0.02
"""Of the truncated normal that the query and the block start from (V-JEPA, attentive_pooler.py)."""
HEAD_WIDTH = 64
"""Channels of an attention head, as in the standard vision transformers."""


@dataclass(frozen=True)
class AttentiveRecipe:
    """V-JEPA's evaluation on ImageNet (facebookresearch/jepa, configs/evals/vitl16_in1k.yaml)."""

    mode: Mode = "fast"
    """fast: tokens computed once and kept in memory, no augmentation; paper: random crops and flips."""
    epochs: float = 20.0
    """Passes over the training data (V-JEPA)."""
    batch_size: int = 1024
    """Samples a step (V-JEPA: 16 on each of 64 GPUs)."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, whatever the batch (V-JEPA); then a cosine to 0."""
    warmup_fraction: float = 0.0
    """Share of the steps spent warming up (V-JEPA: none)."""
    weight_decay: float = 1e-3
    """Decoupled decay of everything but biases and norms (V-JEPA)."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the tokens' (V-JEPA)."""
    num_heads: int | None = None
    """Attention heads; default: one for each 64 channels, which for the standard ViTs is the encoder's
    own number, V-JEPA's choice."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest area of a random crop, in mode paper (torchvision's default; V-JEPA adds
    AutoAugment and erasing, this does not)."""

    def __post_init__(self) -> None:
        expect(self.epochs > 0, "--epochs", "> 0", self.epochs)
        expect(self.batch_size >= 1, "--batch-size", ">= 1", self.batch_size)
        expect(self.lr > 0, "--lr", "> 0", self.lr)
        expect(0 <= self.warmup_fraction <= 1, "--warmup-fraction", "0 to 1", self.warmup_fraction)
        expect(self.weight_decay >= 0, "--weight-decay", ">= 0", self.weight_decay)
        expect(self.mlp_ratio > 0, "--mlp-ratio", "> 0", self.mlp_ratio)
        expect(self.num_heads is None or self.num_heads >= 1, "--num-heads", ">= 1", self.num_heads)
        expect_crop_scale(self.crop_scale)


def main_attentive(
    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")],
    /,
    *,
    setup: Annotated[Setup, tyro.conf.arg(name="")],
    recipe: Annotated[AttentiveRecipe, tyro.conf.arg(name="")],
    baselines: tuple[Literal["random"], ...] = (),
) -> None:
    """Train an attentive classifier on the frozen encoder's patch tokens, as V-JEPA does.

    Several runs that differ in their seed give means and standard deviations; so do several seeds.

    Args:
        runs: run or checkpoint folders of one recipe, or one model: a folder, timm:NAME, hf:NAME.
        setup: what to read and where to compute.
        recipe: settings of the probe.
        baselines: also probe the encoder as it was initialised.
    """
    encoders = load_sources(runs, setup.weights)
    measure = partial(probe_attentive, setup=setup, recipe=recipe)
    result = supervised("attentive", recipe.mode, encoders, setup, recipe, measure, baselines)
    publish(result, encoders[0], setup.out, Console())


class AttentiveHead(nn.Module):
    """query + attention(query, norm(tokens)), then + mlp(norm(query)), then a linear classifier."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, classes: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), "gelu", bias=True)
        self.init_weights()
        self.classifier = nn.Linear(dim, classes)  # starts as torch's own do, in V-JEPA too

    @torch.no_grad()
    def init_weights(self) -> None:
        """V-JEPA's block: truncated normal, biases zero, its two last layers over sqrt(2)."""
        nn.init.trunc_normal_(self.query, std=INIT_STD)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=INIT_STD)
                nn.init.zeros_(layer.bias)
        self.proj.weight /= 2**0.5
        self.mlp.fc2.weight /= 2**0.5

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        """Logits."""
        query = self.query.expand(len(tokens), -1, -1)
        q = rearrange(self.q(query), "b one (h d) -> b h one d", h=self.num_heads)
        k, v = rearrange(self.kv(self.norm1(tokens)), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        read = attention_function("auto")(q, k, v)  # (b, h, 1, d)
        query = query + self.proj(rearrange(read, "b h one d -> b one (h d)"))
        query = query + self.mlp(self.norm2(query))
        return self.classifier(query[:, 0])


def heads_of(dim: int, num_heads: int | None) -> int:
    """The number of attention heads for tokens of width `dim`. Raises ValueError where it does not divide."""
    heads = num_heads or max(1, dim // HEAD_WIDTH)
    expect(dim % heads == 0, "--num-heads", f"a divisor of the tokens' width {dim}", heads)
    return heads


def probe_attentive(
    encoder: FrozenEncoder, data: Labelled, device: torch.device, setup: Setup, recipe: AttentiveRecipe
) -> list[Trial]:
    """An attentive probe of one encoder for each seed. The encoder is left as it was.

    Raises ValueError for a batch larger than the training set, for tokens that do not fit in memory
    (mode fast), for samples that cannot be read and for tokens or losses that are not finite.
    """
    size, batch_size = len(data.train), recipe.batch_size
    expect(batch_size <= size, "--batch-size", f"at most the {size} training images", batch_size)
    how = (FORWARD, setup.workers, device, setup.bf16)
    encoder.to(device)
    if recipe.mode == "fast":
        labels = [torch.tensor(index.label) for index in (data.train, data.test)]
        train = encoder_tokens(encoder, data.train, *how, "training tokens")
        test = encoder_tokens(encoder, data.test, *how, "test tokens")

    def batches_of(seed: int) -> Iterator[Batch]:
        if recipe.mode == "fast":
            return cached_batches(train, labels[0], seed, batch_size, device)
        return frozen_views(
            encoder, encoder.tokens, data.train, recipe.crop_scale, seed, batch_size, setup.workers, device,
            setup.bf16,
        )  # fmt: skip

    def held_out() -> Iterator[Batch]:
        if recipe.mode == "fast":
            yield from in_order(test, labels[1], device)
            return
        for images, right in eval_views(encoder, data.test, setup.workers, device):
            with torch.autocast(device.type, torch.bfloat16, enabled=setup.bf16):
                tokens = encoder.tokens(images)
            yield tokens.float(), right

    return [
        fit_attentive(batches_of(seed), held_out, data, device, setup, recipe, seed) for seed in setup.seeds
    ]


def fit_attentive(
    batches: Iterator[Batch],
    held_out: Callable[[], Iterator[Batch]],
    data: Labelled,
    device: torch.device,
    setup: Setup,
    recipe: AttentiveRecipe,
    seed: int,
) -> Trial:
    """A head fitted to batches of tokens (b, n, d) and scored on `held_out()`."""
    steps = steps_of(recipe.epochs, len(data.train), recipe.batch_size)

    def lr(step: int) -> float:
        return warmup_cosine(step, steps, recipe.lr, recipe.warmup_fraction, 0.0)

    with closing(batches), own_generators(device):
        seed_generators(seed)
        with closing(held_out()) as first:
            width = next(first)[0].shape[2]
        head = AttentiveHead(width, heads_of(width, recipe.num_heads), recipe.mlp_ratio, data.classes).to(
            device
        )
        optimizer = torch.optim.AdamW(
            param_groups(head, recipe.weight_decay), lr=recipe.lr, fused=device.type in ("cpu", "cuda")
        )
        title = f"attentive, seed {seed}"
        loss = fit(head, optimizer, batches, steps, lr, seed, setup.bf16, title)
        return Trial({"attentive": accuracy(head, held_out(), setup.bf16)}, {"loss": loss})
