"""bench_simclr.py learn: one recipe, one side, a given time; then our probes on the encoder that came out."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from bench_mae import machine
from bench_simclr_peers import Batches, Side, build, open_batches, require_lightly
from safetensors.torch import save_file
from torch import Tensor, nn

from selfsup.data.index import ShardIndex, open_shards
from selfsup.durable import write_atomically
from selfsup.encoders.timm import TimmEncoder
from selfsup.export.frozen import FrozenEncoder, from_encoder
from selfsup.export.names import float_weights
from selfsup.memory import keep_freed_memory
from selfsup.optim import OptimConfig, build_optimizer, require_finite
from selfsup.probe.features import encoder_features
from selfsup.probe.knn import knn_accuracy
from selfsup.probe.logreg import logreg
from selfsup.probe.sources import Labelled, open_labelled
from selfsup.recipe import Recipe, load_recipe

TAIL = 50
"""Last steps whose mean loss is the final one."""


@dataclasses.dataclass(frozen=True)
class Learn:
    """Trains a recipe for a time, then scores the encoder by kNN and logistic regression as selfsup probe does.

    The recipe gives objective, encoder, data, optimizer, schedule, precision and seed to both sides; its run
    section and optim.steps are not read. The speed is measured first, by steps on a model that is then thrown
    away; from it follows the number of steps that fill the time, and the schedule is that of a run of so
    many steps. More options adjust the recipe: --optim.batch-size 256.
    """

    config: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CONFIG")]]
    """A recipe with objective simclr or byol, such as selfsup train takes."""
    minutes: float
    """Wall time of training, the measuring before it and the probes after it not counted."""
    out: Path
    """New folder for report.json and encoder.safetensors (timm's names)."""
    side: Side = "lightly"
    """Whose loss, heads, transform and loader. selfsup: ours in the same loop; selfsup train does a little more."""
    measure_seconds: float = 30.0
    """How long the speed is measured; at least five steps."""
    workers: int = 1
    """Loader processes."""
    threads: int = 1
    """Torch threads."""
    allocator: Literal["as-it-comes", "kept"] = "as-it-comes"
    """kept: the process keeps the memory it frees, as selfsup train does on a CPU and lightly does not."""
    bf16: bool = False
    """Features for the probes in bfloat16, as selfsup probe --bf16: of 60,000 images a ResNet takes minutes."""
    test: str | None = None
    """Labelled shards to score on; default: the folder `test` beside the recipe's."""

    def check(self) -> None:
        """Raises ValueError for values out of range, for a folder that exists, for lightly missing."""
        if self.minutes <= 0 or self.measure_seconds < 0 or self.threads < 1 or self.workers < 0:
            raise ValueError("--minutes: expected more than 0; --threads 1; --measure-seconds, --workers 0")
        if self.out.exists():
            raise ValueError(f"--out {self.out}: already exists; give another name")
        if self.side == "lightly":
            require_lightly()


class Trainer:
    """A side, its loader and its optimizer, as the recipe's seed makes them."""

    def __init__(self, options: Learn, recipe: Recipe, index: ShardIndex):
        torch.manual_seed(recipe.seed)
        self.recipe, self.losses = recipe, list[Tensor]()
        self.module = build(options.side, recipe.objective, recipe.encoder)
        self.optimizer = build_optimizer(recipe.optim, self.module)
        self.batches = batches_of(options, recipe, index)

    def step(self, optim: OptimConfig) -> None:
        """The next step of a run as long as `optim` says."""
        for group in self.optimizer.param_groups:
            group["lr"] = optim.lr(len(self.losses))
        views, mixed = next(self.batches), self.recipe.precision.mixed
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed == "bf16"):
            loss = self.module(views)
        loss.backward()
        if optim.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), optim.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())
        self.module.after_step(len(self.losses), optim.steps)


def batches_of(options: Learn, recipe: Recipe, index: ShardIndex) -> Batches:
    """Views of the recipe's data on the CPU."""
    size, device = recipe.optim.batch_size, torch.device("cpu")
    return open_batches(
        options.side, recipe.data, index, recipe.encoder, size, options.workers, device, recipe.seed
    )


def learn(options: Learn, overrides: list[str]) -> int:
    """Measures, trains, scores, reports; returns the exit code. Raises ValueError for what the user can mend."""
    options.check()
    recipe = load_recipe(options.config, ["--run.dir", str(options.out), *overrides])
    if recipe.objective.name not in ("simclr", "byol") or recipe.precision.mixed == "fp16":
        raise ValueError("learn: expected objective.name simclr or byol, precision.mixed fp32 or bf16")
    torch.set_num_threads(options.threads)
    if options.allocator == "kept" and not keep_freed_memory():
        raise ValueError("--allocator kept: this C library has no such switch; leave it out")
    torch.set_float32_matmul_precision(recipe.precision.float32_matmul)
    index, test = open_shards(recipe.data.shards), options.test or beside(recipe.data.shards)
    labelled = open_labelled(recipe.data.shards, test)

    rate = seconds_per_step(Trainer(options, recipe, index), options.measure_seconds)
    optim = recipe.optim.model_copy(update={"steps": planned_steps(options.minutes, rate)})
    epochs = optim.steps * optim.batch_size / len(index)
    print(
        f"{options.side}: {rate:.3f} s a step of {optim.batch_size} images; {options.minutes:g} minutes are "
        f"{optim.steps} steps, {epochs:.2f} epochs; the schedule ends with them",
        flush=True,
    )
    trainer, began = Trainer(options, recipe, index), time.perf_counter()
    train(trainer, optim)
    seconds = time.perf_counter() - began
    losses = torch.stack(trainer.losses).tolist()
    final = float(np.mean(losses[-TAIL:]))
    print(f"trained for {seconds / 60:.2f} minutes, final loss {final:.4f}", flush=True)

    options.out.mkdir(parents=True)
    encoder = as_ours(trainer.module.encoder, recipe, options.side)
    save_file(float_weights(encoder.module), options.out / "encoder.safetensors")
    print("scoring", flush=True)
    scores = score(encoder, labelled, options)
    report = {
        **machine(options, torch.device("cpu")),
        "recipe": recipe.model_copy(update={"optim": optim}).model_dump(mode="json", exclude={"run"}),
        "measured_seconds_per_step": rate,
        "seconds": seconds,
        "epochs": epochs,
        "final_loss": final,
        "losses": losses,
        **scores,
    }
    write_atomically(options.out / "report.json", json.dumps(report, indent=1, default=str).encode())
    print(f"kNN {scores['knn']:.2%}, logistic regression {scores['logreg']['accuracy']:.2%}: {options.out}")
    return 0


def beside(shards: str) -> str:
    """The folder of test shards. Raises ValueError where there is none."""
    sibling = Path(shards).parent / "test"
    if not sibling.is_dir():
        raise ValueError(f"no folder {sibling} beside the training shards; give --test SHARDS")
    return str(sibling)


def seconds_per_step(trainer: Trainer, at_least: float) -> float:
    """Mean of five steps or more, after two that are not counted; the loader runs as in training."""
    optim = trainer.recipe.optim
    trainer.step(optim)
    trainer.step(optim)
    count, began = 0, time.perf_counter()
    while count < 5 or time.perf_counter() - began < at_least:
        trainer.step(optim)
        count += 1
    elapsed = time.perf_counter() - began
    trainer.batches.close()
    return elapsed / count


def planned_steps(minutes: float, seconds_per_step: float) -> int:
    """As many whole steps as fit, at least one."""
    return max(1, int(60 * minutes / seconds_per_step))


def train(trainer: Trainer, optim: OptimConfig) -> None:
    """All steps. Raises ValueError for a loss that is not finite."""
    every = max(1, optim.steps // 20)
    for done in range(1, optim.steps + 1):
        trainer.step(optim)
        if done % every == 0 or done == optim.steps:
            loss = trainer.losses[-1].item()
            require_finite(loss, done)
            print(f"step {done} of {optim.steps}: loss {loss:.4f}", file=sys.stderr, flush=True)
    trainer.batches.close()


def as_ours(encoder: nn.Module, recipe: Recipe, side: Side) -> FrozenEncoder:
    """What a side trained, its weights in our encoder, as the probes take the encoder of a run."""
    ours = recipe.encoder.build()
    model = ours.model if isinstance(ours, TimmEncoder) else ours
    if isinstance(encoder, TimmEncoder):
        encoder = encoder.model
    model.load_state_dict(encoder.state_dict())
    return from_encoder(ours, recipe, side)


def score(encoder: FrozenEncoder, data: Labelled, options: Learn) -> dict[str, Any]:
    """Accuracies of the two probes, by the functions that selfsup probe calls."""
    train, test = (
        encoder_features(encoder, index, workers=options.workers, bf16=options.bf16)
        for index in (data.train, data.test)
    )
    return {"knn": knn_accuracy(train, test), "logreg": logreg(train, test)._asdict()}
