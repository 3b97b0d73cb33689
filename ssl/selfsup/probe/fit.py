"""The one training loop of the supervised probes, and the batches that feed it.

Order, crops and model-side randomness are functions of (seed, step): the same seed gives the same
result bit by bit on the same kind of machine with the same number of threads.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tqdm import tqdm

from selfsup.batch import normalise
from selfsup.data.images import ImageData, eval_batches, train_batches
from selfsup.data.index import ShardIndex
from selfsup.data.order import BatchPlan, micro_batches, sample_order
from selfsup.export.frozen import FrozenEncoder
from selfsup.keyed import Purpose, random_bits

Batch = tuple[Tensor, Tensor]
"""Inputs (b, ...), and targets: labels int64 (b,) or class probabilities (b, classes)."""

FORWARD = 256
"""Images per pass of a frozen encoder."""

_STEPS, _INIT = 0, 1  # views of Purpose.MODEL


def seed_generators(seed: int, step: int | None = None) -> None:
    """Seeds torch's, NumPy's and Python's generators for one step, or (None) for initial weights.

    timm's mixing draws from NumPy's, its erasing from Python's, drop path from torch's.
    """
    view = _INIT if step is None else _STEPS
    position = torch.tensor(0)
    words = random_bits(seed, step or 0, position, Purpose.MODEL, 4, view).tolist()
    torch.manual_seed(words[0] << 32 | words[1])
    np.random.seed(words[2])
    random.seed(words[3])


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """The process's generators are as before when this ends, whatever was seeded inside."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def steps_of(epochs: float, samples: int, batch_size: int) -> int:
    """Optimizer steps of `epochs` passes over the data, at least one; epochs join without padding."""
    return max(1, round(epochs * samples / batch_size))


def fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    steps: int,
    lr: Callable[[int], float],
    seed: int,
    bf16: bool,
    title: str,
    mix: Callable[[Tensor, Tensor], Batch] | None = None,
    clip: float | None = None,
) -> float:
    """Trains `module` in place by cross-entropy; returns the mean loss of the last tenth of the steps.

    lr: learning rate by step, times a group's `lr_scale` where it has one. mix: random changes to a
    batch. clip: largest norm of the whole gradient. The generators are seeded by (seed, step) when a
    batch is there, whatever loading it drew.
    Raises ValueError for a loss that is not finite.
    """
    module.train()
    losses: list[Tensor] = []
    bar = tqdm(range(steps), desc=title, unit="step", disable=None)
    for step in bar:
        inputs, targets = next(batches)
        seed_generators(seed, step)
        if mix is not None:
            inputs, targets = mix(inputs, targets)
        for group in optimizer.param_groups:
            group["lr"] = lr(step) * group.get("lr_scale", 1.0)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            logits = module(inputs)
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        losses.append(loss.detach())
        if len(losses) % 50 == 0 or len(losses) == steps:  # not at every step: a GPU would wait
            if not torch.stack(losses[-50:]).isfinite().all():
                raise ValueError(
                    f"{title}: the loss is not finite by step {step + 1}; lower the learning rate"
                )
        # Without a terminal there is no bar: a line every tenth of the way.
        if bar.disable and 10 * len(losses) // steps > 10 * step // steps:
            print(f"{title}: step {len(losses)}/{steps}, loss {losses[-1].item():.3f}", flush=True)
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


@torch.no_grad()
def accuracy(module: nn.Module, batches: Iterable[Batch], bf16: bool) -> float:
    """Share of samples whose largest logit is their label, 0..1; `module` in eval mode."""
    module.eval()
    right, seen = 0, 0
    for inputs, labels in batches:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            logits = module(inputs)
        right += int((logits.float().argmax(dim=1) == labels).sum())
        seen += len(labels)
    return right / seen


def cached_batches(
    values: Float[Tensor, "n ..."],
    labels: Int64[Tensor, "n"],
    seed: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of rows without end, in the order law's order; float32, on `device`."""
    for cursors in micro_batches(BatchPlan(batch_size, batch_size, 0, 1), 0):
        epoch, position = np.divmod(cursors, len(labels))
        rows = torch.from_numpy(sample_order(seed, epoch, position, len(labels), "shuffled"))
        rows = rows.to(values.device)
        yield values[rows].to(device, torch.float32), labels[rows].to(device)


def in_order(
    values: Float[Tensor, "n ..."], labels: Int64[Tensor, "n"], device: torch.device
) -> Iterator[Batch]:
    """Every row once, FORWARD at a time; float32, on `device`."""
    for part, right in zip(values.split(FORWARD), labels.split(FORWARD)):
        yield part.to(device, torch.float32), right.to(device)


def train_views(
    encoder: FrozenEncoder,
    index: ShardIndex,
    crop_scale: tuple[float, float],
    seed: int,
    batch_size: int,
    micro_batch: int,
    workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Random resized crops, mirrored half the time, without end: normalised images and labels.

    `batch_size` / `micro_batch` of them make up a batch. Order and crops are keyed by `seed`.
    `.close()` ends the workers. Raises ValueError for a sample that cannot be read.
    """
    config = ImageData(shards=str(index.folder), crop_scale=crop_scale, mean=encoder.mean, std=encoder.std)
    plan = BatchPlan(batch_size, micro_batch, 0, 1)
    views = train_batches(config, index, seed, encoder.img_size, encoder.in_chans, plan, 0, workers)
    try:
        for batch in views:
            labels = torch.from_numpy(index.label[batch.index.numpy()])
            yield batch.to(device, encoder.mean, encoder.std).images, labels.to(device)
    finally:
        views.close()


def eval_views(
    encoder: FrozenEncoder, index: ShardIndex, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Every test image once, FORWARD at a time, centre crop: normalised images and labels."""
    for images, labels, _ in eval_batches(index, encoder.img_size, encoder.in_chans, FORWARD, workers):
        yield normalise(images.to(device), encoder.mean, encoder.std), labels.to(device)


def frozen_views(
    encoder: FrozenEncoder,
    forward: Callable[[Tensor], Tensor],
    index: ShardIndex,
    crop_scale: tuple[float, float],
    seed: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    bf16: bool,
) -> Iterator[Batch]:
    """`train_views` through a frozen encoder: float32 features or tokens, and labels, without end.

    forward: `encoder.features` or `encoder.tokens`; called on parts of a batch, of at most FORWARD.
    """
    encoder.to(device)
    part = max(size for size in range(1, FORWARD + 1) if batch_size % size == 0)
    views = train_views(encoder, index, crop_scale, seed, batch_size, part, workers, device)
    with closing(views):
        while True:
            outputs, labels = [], []
            for images, right in islice(views, batch_size // part):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    outputs.append(forward(images).float())
                labels.append(right)
            # Joined outside inference mode: a head could not learn from tensors made inside.
            yield torch.cat(outputs), torch.cat(labels)
