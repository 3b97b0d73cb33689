"""Fine-tuning of a whole encoder of text as BERT's (Devlin et al. 2019, sec. 4.1 and appendix A.3), or the
same training from scratch."""

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from jaxtyping import Float, Int64
from rich.console import Console
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from selfsup.data.order import sample_order
from selfsup.encoders.text import TextEncoder, init_normal
from selfsup.keyed import Purpose, TextView, random_bits
from selfsup.probe.features import Device
from selfsup.probe.fit import Batch, accuracy, fit, own_generators, seed_generators, steps_of
from selfsup.probe.online import fixed_rows
from selfsup.probe.report import ProbeResult, publish
from selfsup.probe.sources import describe_source, expect, expect_new, expect_seeds, start_computing
from selfsup.probe.supervised import LIBRARIES, Trial, trial_scores
from selfsup.probe.text import (
    Documents,
    Pool,
    TextSets,
    TextWeights,
    by_length,
    load_text_runs,
    open_sets,
    padded,
    pooled,
    set_pool,
)
from selfsup.schedule import warmup_linear
from selfsup.text.load import TextRun

CLIP = 1.0
"""Largest norm of the gradient (google-research/bert, optimization.py)."""
_BUCKETS = 50
"""Batches whose documents are sorted by length among themselves."""


@dataclass(frozen=True)
class TextFinetuneRecipe:
    """BERT's fine-tuning: AdamW, a linear schedule with warm-up, the gradient's norm cut at 1."""

    scratch: bool = False
    """The same architecture and training from random weights."""
    epochs: float = 3.0
    """Passes over the training documents (BERT: 2 to 4)."""
    batch_size: int = 32
    """Documents a step (BERT: 16 or 32)."""
    lr: float = 2e-5
    """Peak learning rate (BERT: 2e-5 to 5e-5); small models and those from scratch want more."""
    warmup_fraction: float = 0.1
    """Share of the steps spent warming up."""
    weight_decay: float = 0.01
    """Decoupled decay of everything but biases and norms."""
    layer_decay: float = 1.0
    """Learning rate of a block over that of the block above."""
    dropout: float = 0.1
    """Of the feature before the classifier; inside the encoder it is the run's own encoder.dropout."""
    pool: Pool | None = None
    """The feature: the mean over a document's tokens, its first, or its last; none: the run's encoder.pool."""
    limit: int | None = None
    """Training documents used, chosen at random but the same for every run and seed; none: all."""

    def __post_init__(self) -> None:
        expect(self.epochs > 0, "--epochs", "> 0", self.epochs)
        expect(self.batch_size >= 1, "--batch-size", ">= 1", self.batch_size)
        expect(self.lr > 0, "--lr", "> 0", self.lr)
        expect(0 <= self.warmup_fraction <= 1, "--warmup-fraction", "0 to 1", self.warmup_fraction)
        expect(self.weight_decay >= 0, "--weight-decay", ">= 0", self.weight_decay)
        expect(0 < self.layer_decay <= 1, "--layer-decay", "0 < x <= 1", self.layer_decay)
        expect(0 <= self.dropout < 1, "--dropout", "0 <= x < 1", self.dropout)
        expect(self.limit is None or self.limit >= 1, "--limit", ">= 1", self.limit)


def main_text_finetune(
    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")],
    /,
    *,
    recipe: Annotated[TextFinetuneRecipe, tyro.conf.arg(name="")],
    train: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    test: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    weights: TextWeights = "trained",
    device: Device = "auto",
    threads: int | None = None,
    bf16: bool = False,
) -> None:
    """Train the whole encoder of text with labels, from its pretrained weights or (--scratch) random ones.

    Args:
        runs: run or checkpoint folders of one recipe.
        recipe: settings of the training.
        train: text or token shards with labels to fit on.
        test: text or token shards with labels to score on.
        seeds: one training each, with its own classifier, order and dropout; from scratch, weights too.
        out: JSON to write; default: a file of its own in RUN/probe, for the first run.
        weights: those of the last step, or their average over steps (optim.ema).
        device: auto: CUDA where there is one.
        threads: torch's threads in this process; default: as torch chooses.
        bf16: matrix products in bfloat16 (autocast).
    """
    expect_new(out)
    expect_seeds(seeds)
    expect(threads is None or threads >= 1, "--threads", ">= 1", threads)
    if recipe.scratch and (len(runs) > 1 or weights != "trained"):
        raise ValueError(
            "--scratch: nothing of a run enters but its architecture; give one run, --seeds, and no --weights"
        )
    loaded = load_text_runs(runs, weights, recipe.pool)
    sets = limited(open_sets(loaded[0], train, test), recipe.limit)
    expect(
        recipe.batch_size <= len(sets.train.ids), "--batch-size",
        f"at most the {len(sets.train.ids)} training documents", recipe.batch_size,
    )  # fmt: skip
    result = text_finetune(loaded, sets, start_computing(device, threads), seeds, recipe, bf16)
    publish(result, loaded[0], out, Console())


def limited(sets: TextSets, limit: int | None) -> TextSets:
    """The same with `limit` training documents. Raises ValueError where there are fewer."""
    if limit is None:
        return sets
    ids, labels, cut = sets.train
    expect(limit <= len(ids), "--limit", f"at most the {len(ids)} training documents", limit)
    rows = np.sort(fixed_rows(len(ids), limit))
    train = Documents([ids[row] for row in rows], labels[rows], cut[rows])
    about = {**sets.about, "train": {**sets.about["train"], "limited_to": limit, "truncated": train.truncated}}
    return sets._replace(train=train, about=about)


class TextClassifier(nn.Module):
    """Encoder, one feature a document, dropout, linear."""

    def __init__(self, encoder: TextEncoder, dropout: float, classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.embed_dim, classes)
        init_normal(self.head.weight, encoder.config.init_std, truncated=encoder.config.init == "bert")
        nn.init.zeros_(self.head.bias)

    def forward(self, rows: Int64[Tensor, "b n"]) -> Float[Tensor, "b k"]:
        """Logits of documents, padded with -1."""
        return self.head(self.dropout(pooled(self.encoder, rows)))

    def group_matcher(self, coarse: bool) -> dict[str, Any]:
        """timm's protocol: what is below the blocks, each block, and the rest above."""
        stem = r"^encoder\.(?:token_embed|pos_embed|type_embed|embed_norm)\."
        return {"stem": stem, "blocks": [(r"^encoder\.blocks\.(\d+)", None)]}


def build_text_classifier(run: TextRun, recipe: TextFinetuneRecipe, classes: int) -> TextClassifier:
    """On a copy of the run's encoder, or (scratch) a fresh one. Draws from the global generator."""
    if not recipe.scratch:
        return TextClassifier(copy.deepcopy(run.encoder), recipe.dropout, classes)
    fresh = run.recipe.encoder.build()
    assert isinstance(fresh, TextEncoder)
    set_pool(fresh, run.encoder.config.pool)
    return TextClassifier(fresh, recipe.dropout, classes)


def build_text_optimizer(model: TextClassifier, recipe: TextFinetuneRecipe) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.999), fused. Each group's `lr_scale` is its layer decay: with L blocks the head and
    the last norm have 1, block i (from 0) decay**(L - i), the embeddings decay**(L + 1)."""
    groups = param_groups_layer_decay(model, recipe.weight_decay, layer_decay=recipe.layer_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, eps=1e-6, fused=True)


def bucketed_rows(
    lengths: Int64[np.ndarray, " n"], seed: int, batch_size: int, steps: int
) -> Iterator[Int64[np.ndarray, " b"]]:
    """Rows of each step's batch: epoch after epoch in keyed orders, of which 50 batches' documents at a time are
    sorted by length, so that a batch holds little padding, and the batches shuffled again.

    Every batch is full, and after all steps the rows seen are the first steps * batch_size of the keyed orders.
    """
    for number, first in enumerate(range(0, steps, _BUCKETS)):
        count = min(_BUCKETS, steps - first)
        cursors = np.arange(first * batch_size, (first + count) * batch_size)
        epoch, position = np.divmod(cursors, len(lengths))
        rows = sample_order(seed, epoch, position, len(lengths), "shuffled")
        rows = rows[np.argsort(lengths[rows], kind="stable")].reshape(count, batch_size)
        bits = random_bits(seed, 0, np.array([number]), Purpose.TEXT, count, TextView.BATCHES)[0]
        yield from rows[np.argsort(bits, kind="stable")]


def text_finetune(
    runs: list[TextRun],
    sets: TextSets,
    device: torch.device,
    seeds: tuple[int, ...],
    recipe: TextFinetuneRecipe,
    bf16: bool,
) -> ProbeResult:
    """One training for each run and seed; the runs are left as they were."""
    began = time.monotonic()
    trials = [[_trial(run, sets, device, seed, recipe, bf16) for seed in seeds] for run in runs]
    several = len(runs) > 1
    return ProbeResult(
        probe="text-finetune",
        mode="paper",
        scores={"scratch" if recipe.scratch else "pretrained": trial_scores(trials, seeds, several)},
        spread="runs, each the mean over the seeds of the probe" if several else "seeds of the probe",
        left_out={},
        sources=tuple(map(describe_source, runs)),
        recipe={
            **asdict(recipe),
            "pool": runs[0].encoder.config.pool,
            "seeds": list(seeds),
            "clip_grad_norm": CLIP,
            "max_length": runs[0].max_length,
            "computed_in": "bfloat16" if bf16 else "float32",
        },
        data=sets.about,
        versions={
            **{library: version(library) for library in LIBRARIES},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": str(torch.get_num_threads()),
        },
        seconds=time.monotonic() - began,
    )


def _trial(
    run: TextRun, sets: TextSets, device: torch.device, seed: int, recipe: TextFinetuneRecipe, bf16: bool
) -> Trial:
    """Raises ValueError for a loss that is not finite."""
    with own_generators(device):
        seed_generators(seed)
        model = build_text_classifier(run, recipe, sets.classes).to(device)
        ids, labels, _ = sets.train
        steps = steps_of(recipe.epochs, len(ids), recipe.batch_size)
        rows = bucketed_rows(np.array([len(each) for each in ids]), seed, recipe.batch_size, steps)

        def lr(step: int) -> float:
            return warmup_linear(step, steps, recipe.lr, recipe.warmup_fraction, 0.0)

        title = f"{'from scratch' if recipe.scratch else 'fine-tune'}, seed {seed}"
        optimizer = build_text_optimizer(model, recipe)
        batches = (_batch(ids, labels, part, device) for part in rows)
        loss = fit(model, optimizer, batches, steps, lr, seed, bf16, title, clip=CLIP)
        ids, labels, _ = sets.test
        parts = np.split(by_length(ids), range(128, len(ids), 128))
        right = accuracy(model, (_batch(ids, labels, part, device) for part in parts), bf16)
    return Trial({"finetune": right}, {"loss": loss})


def _batch(ids: list[np.ndarray], labels: np.ndarray, rows: np.ndarray, device: torch.device) -> Batch:
    return padded([ids[row] for row in rows]).to(device), torch.from_numpy(labels[rows]).to(device)
