"""Fine-tuning of the whole encoder as in MAE (He et al. 2022, table 9), or the same training from scratch."""

import copy
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import tyro
from jaxtyping import Float
from rich.console import Console
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from selfsup.encoders.timm import TimmEncoder
from selfsup.encoders.vit import ViT
from selfsup.export.frozen import FrozenEncoder
from selfsup.layers.block import LAYER_NORM_EPS, DropPath
from selfsup.probe.fit import (
    Batch,
    accuracy,
    eval_views,
    fit,
    own_generators,
    seed_generators,
    steps_of,
    train_views,
)
from selfsup.probe.report import publish
from selfsup.probe.sources import Labelled, Setup, expect, expect_crop_scale, load_sources
from selfsup.probe.supervised import Trial, supervised
from selfsup.schedule import warmup_cosine

HEAD_STD = 2e-5
"""Of the classifier's first weights (facebookresearch/mae, main_finetune.py)."""
NO_DECAY = ("encoder.cls_token", "encoder.pos_embed", "encoder.reg_token", "encoder.dist_token")
"""Not decayed, nor are biases and norms (facebookresearch/mae, util/lr_decay.py)."""


@dataclass(frozen=True)
class FinetuneRecipe:
    """He et al. 2022, table 9, with what the authors' code takes for ViT-B, except for the batch size.

    Rand-augment is left out; test images are resized to the input size, not beyond it and cropped;
    sin-cos positions of a run stay fixed, where the authors' code trains them.
    """

    scratch: bool = False
    """The same architecture and training from random weights; layer decay is off unless given."""
    epochs: float = 100.0
    """Passes over the training data (table 9, ViT-B)."""
    batch_size: int = 128
    """Samples a step, even (table 9: 1024)."""
    base_lr: float = 5e-4
    """Peak learning rate of AdamW per 256 samples of a batch (facebookresearch/mae, FINETUNE.md,
    ViT-B; table 9 has 1e-3)."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine (facebookresearch/mae, main_finetune.py)."""
    warmup_fraction: float = 0.05
    """Share of the steps spent warming up (table 9: 5 of 100 epochs)."""
    weight_decay: float = 0.05
    """Decoupled decay of everything but biases, norms, class token and positions (table 9)."""
    layer_decay: float | None = None
    """Learning rate of a block over that of the block above; default 0.65 (FINETUNE.md, ViT-B; table 9 has
    0.75), 1.0 from scratch."""
    drop_path: float = 0.1
    """Stochastic depth at the last block, rising from 0 at the first (table 9, ViT-B)."""
    mixup: float = 0.8
    """Mixup's alpha, 0: none (table 9); a batch gets mixup or cutmix, by turns at random."""
    cutmix: float = 1.0
    """Cutmix's alpha, 0: none (table 9)."""
    smoothing: float = 0.1
    """Label smoothing (table 9)."""
    erase: float = 0.25
    """Probability of erasing a rectangle with noise (facebookresearch/mae, main_finetune.py)."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest area of a random crop (torchvision's and timm's default, as in MAE)."""

    def __post_init__(self) -> None:
        expect(self.epochs > 0, "--epochs", "> 0", self.epochs)
        even = self.batch_size >= 2 and self.batch_size % 2 == 0
        expect(even, "--batch-size", "an even number, for mixup", self.batch_size)
        expect(self.base_lr > 0, "--base-lr", "> 0", self.base_lr)
        expect(self.min_lr >= 0, "--min-lr", ">= 0", self.min_lr)
        expect(0 <= self.warmup_fraction <= 1, "--warmup-fraction", "0 to 1", self.warmup_fraction)
        expect(self.weight_decay >= 0, "--weight-decay", ">= 0", self.weight_decay)
        decay = self.layer_decay
        expect(decay is None or 0 < decay <= 1, "--layer-decay", "0 < x <= 1", decay)
        expect(0 <= self.drop_path < 1, "--drop-path", "0 <= x < 1", self.drop_path)
        expect(self.mixup >= 0, "--mixup", ">= 0", self.mixup)
        expect(self.cutmix >= 0, "--cutmix", ">= 0", self.cutmix)
        expect(0 <= self.smoothing < 1, "--smoothing", "0 <= x < 1", self.smoothing)
        expect(0 <= self.erase <= 1, "--erase", "0 to 1", self.erase)
        expect_crop_scale(self.crop_scale)

    @property
    def peak_lr(self) -> float:
        """Learning rate of the head after warm-up: linear in the batch."""
        return self.base_lr * self.batch_size / 256


def main_finetune(
    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")],
    /,
    *,
    setup: Annotated[Setup, tyro.conf.arg(name="")],
    recipe: Annotated[FinetuneRecipe, tyro.conf.arg(name="")],
) -> None:
    """Train the whole encoder with labels, from its pretrained weights or (--scratch) from random ones.

    Args:
        runs: run or checkpoint folders of one recipe, or one vision transformer of timm's: a folder, timm:NAME.
        setup: what to read and where to compute.
        recipe: settings of the training.
    """
    encoders = load_sources(runs, setup.weights)
    for encoder in encoders:
        check_architecture(encoder, recipe.scratch)
    if recipe.scratch and setup.weights != "trained":
        raise ValueError("--scratch: no weights of the run enter; leave --weights out")
    if recipe.scratch and len(encoders) > 1:
        raise ValueError("--scratch: nothing of a run enters but its architecture; give one run and --seeds")
    if recipe.layer_decay is None:
        recipe = replace(recipe, layer_decay=1.0 if recipe.scratch else 0.65)
    measure = partial(finetune, setup=setup, recipe=recipe)
    kind = "scratch" if recipe.scratch else "pretrained"
    result = supervised("finetune", "paper", encoders, setup, recipe, measure, kind=kind)
    publish(result, encoders[0], setup.out, Console())


def check_architecture(encoder: FrozenEncoder, scratch: bool) -> None:
    """Raises ValueError for a model that cannot be fine-tuned here, or not started from scratch."""
    if not isinstance(encoder.module, (ViT, VisionTransformer)):
        raise ValueError(
            f"{encoder.name}: expected a vision transformer of selfsup's or timm's, got "
            f"{type(encoder.module).__name__}; this is MAE's recipe, whose layer decay and drop path go by its "
            f"blocks: use selfsup probe linear or attentive"
        )
    if scratch and encoder.recipe is None:
        raise ValueError(f"--scratch: {encoder.name} has no recipe of ours to be initialised from")


class Classifier(nn.Module):
    """A vision transformer without its last norm, the mean of its patch tokens, LayerNorm, linear.

    MAE's `global_pool`: the norm stands behind the pooling and is new, like the classifier.
    """

    def __init__(self, encoder: ViT | VisionTransformer, drop_path: float, classes: int):
        super().__init__()
        width = encoder.config.embed_dim if isinstance(encoder, ViT) else encoder.embed_dim
        fixed = {"pos_embed"} if isinstance(encoder, ViT) and encoder.config.pos_embed == "sincos" else set()
        for name, p in encoder.named_parameters():
            p.requires_grad_(name not in fixed)
        encoder.norm = nn.Identity()
        if isinstance(encoder, VisionTransformer):
            encoder.fc_norm, encoder.attn_pool = nn.Identity(), None  # behind timm's own pooling
        for i, block in enumerate(encoder.blocks):
            for name in ("drop_path", "drop_path1", "drop_path2"):  # ours; timm's two
                if hasattr(block, name):
                    setattr(block, name, DropPath(drop_path * i / max(1, len(encoder.blocks) - 1)))
        self.encoder = encoder
        self.fc_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits."""
        tokens = self.encoder.forward_features(images)  # (b, prefix + n, d)
        return self.head(self.fc_norm(tokens[:, self.encoder.num_prefix_tokens :].mean(dim=1)))

    def group_matcher(self, coarse: bool) -> dict[str, Any]:
        """timm's protocol: what is below the blocks, each block, and the rest above."""
        return {"stem": r"^encoder\.(?!blocks\.)", "blocks": [(r"^encoder\.blocks\.(\d+)", None)]}


def build_classifier(encoder: FrozenEncoder, recipe: FinetuneRecipe, classes: int) -> Classifier:
    """A classifier on a copy of the encoder's weights, or (scratch) on its recipe's initialisation.

    Draws from the global generator. See `check_architecture` for what it takes.
    """
    if recipe.scratch:
        assert encoder.recipe is not None
        fresh = encoder.recipe.encoder.build()
        model = fresh.model if isinstance(fresh, TimmEncoder) else fresh
        return Classifier(model, recipe.drop_path, classes)
    return Classifier(copy.deepcopy(encoder.module), recipe.drop_path, classes)


def build_optimizer(model: Classifier, recipe: FinetuneRecipe) -> torch.optim.AdamW:
    """AdamW, fused where there is a fused kernel. Each group's `lr_scale` is its layer decay.

    With L blocks, head and norm have 1, block i (from 0) decay**(L - i), what lies below the blocks
    decay**(L + 1) (BEiT's and MAE's rule, by timm).
    """
    assert recipe.layer_decay is not None
    groups = param_groups_layer_decay(
        model, recipe.weight_decay, no_weight_decay_list=NO_DECAY, layer_decay=recipe.layer_decay
    )
    device = next(model.parameters()).device
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, fused=device.type in ("cpu", "cuda"))


def finetune(
    encoder: FrozenEncoder, data: Labelled, device: torch.device, setup: Setup, recipe: FinetuneRecipe
) -> list[Trial]:
    """One training for each seed; `encoder` itself is left as it was.

    Raises ValueError for a batch larger than the training set, for samples that cannot be read and
    for a loss that is not finite.
    """
    size = len(data.train)
    expect(
        recipe.batch_size <= size, "--batch-size", f"at most the {size} training images", recipe.batch_size
    )
    trials = []
    for seed in setup.seeds:
        with own_generators(device):
            model, loss = train_classifier(encoder, data, device, setup, recipe, seed)
            right = accuracy(model, eval_views(encoder, data.test, setup.workers, device), setup.bf16)
        trials.append(Trial({"finetune": right}, {"loss": loss}))
    return trials


def train_classifier(
    encoder: FrozenEncoder,
    data: Labelled,
    device: torch.device,
    setup: Setup,
    recipe: FinetuneRecipe,
    seed: int,
) -> tuple[Classifier, float]:
    """The classifier after the last step; with it `fit`'s loss. Seeds the global generators."""
    seed_generators(seed)
    model = build_classifier(encoder, recipe, data.classes).to(device)
    steps = steps_of(recipe.epochs, len(data.train), recipe.batch_size)
    batch_size = recipe.batch_size
    views = train_views(
        encoder, data.train, recipe.crop_scale, seed, batch_size, batch_size, setup.workers, device
    )
    erase = RandomErasing(recipe.erase, mode="pixel", device=device)
    mixup = build_mixup(recipe, data.classes)

    def mix(images: Tensor, labels: Tensor) -> Batch:
        return mixup(erase(images), labels)

    def lr(step: int) -> float:
        return warmup_cosine(step, steps, recipe.peak_lr, recipe.warmup_fraction, recipe.min_lr)

    title = f"{'from scratch' if recipe.scratch else 'fine-tune'}, seed {seed}"
    with closing(views):
        loss = fit(model, build_optimizer(model, recipe), views, steps, lr, seed, setup.bf16, title, mix)
    return model, loss


def build_mixup(recipe: FinetuneRecipe, classes: int) -> Mixup:
    """timm's mixing of a batch with itself reversed; without mixup and cutmix only the labels are smoothed."""
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=1.0 if recipe.mixup or recipe.cutmix else 0.0,
        label_smoothing=recipe.smoothing,
        num_classes=classes,
    )
