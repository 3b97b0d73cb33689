"""Everything that stands when the first step begins."""

from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from selfsup import checkpoint, dist, flops, parallel, run_folder, start
from selfsup.batch import ImageBatch, TextBatch
from selfsup.checkpoint import TrainState
from selfsup.cost import CostMeter
from selfsup.data.index import ShardIndex
from selfsup.data.order import BatchPlan
from selfsup.data.rows import Rows
from selfsup.data.views import ViewBatch
from selfsup.ema import Ema
from selfsup.metrics import MetricsLog
from selfsup.objectives.base import Objective
from selfsup.optim import build_optimizer
from selfsup.probe.online import OnlineMonitor, open_monitor
from selfsup.recipe import Recipe
from selfsup.saving import Saver, set_aside_later


class Opened(NamedTuple):
    """A run that is ready for its next step."""

    accelerator: Accelerator
    plan: BatchPlan
    data: ShardIndex | Rows | None
    objective: Objective
    """The module itself; `model` is what Accelerate made of it."""
    model: nn.Module
    stepper: AcceleratedOptimizer
    state: TrainState
    batches: Generator[ImageBatch | ViewBatch | TextBatch, None, None]
    saver: Saver
    log: MetricsLog | None
    """On the first process only, as monitor and lock."""
    monitor: OnlineMonitor | None
    lock: TextIO | None
    meter: CostMeter
    peak: float | None
    """FLOP/s of one device, None where unknown."""


def open_run(recipe: Recipe, resume: Path | None, weights: Path | None) -> Opened:
    """Devices, data, model, a resumed state, the run folder; says what will run.

    resume: the checkpoint to go on from; weights: a run or checkpoint to take weights from. Raises ValueError for
    whatever the user can mend.
    """
    accelerator = start.accelerator(recipe)
    plan, data = start.batch_plan(recipe), start.open_data(recipe)
    objective, facts = start.build_objective(recipe, accelerator.device), start.data_facts(data)
    if weights is not None:
        start.say(dist.together(checkpoint.init_from, weights, objective, recipe, facts))
    parallel.share(recipe, objective, accelerator.device)
    optimizer = build_optimizer(recipe.optim, objective)
    ema = None if recipe.optim.ema is None else Ema(objective, recipe.optim.ema)
    state = TrainState(objective, optimizer, accelerator.scaler, recipe, 0, 0, facts, ema)
    if resume is not None:
        state = start.resume(resume, state)
    batches = start.open_batches(recipe, data, plan, state)

    run_dir = Path(recipe.run.dir)
    lock = dist.on_first_rank(run_folder.claim, run_dir, resume is not None)
    peak = flops.peak(accelerator.device, recipe.precision.mixed)
    meter = CostMeter(run_dir, plan.world, accelerator.device, objective.flops_per_sample(), peak)
    dist.on_first_rank(set_aside_later, run_dir, state.step)
    saver = Saver(run_dir, recipe.run.keep_checkpoints, recipe.run.background_checkpoints)
    if weights is not None:
        # Before `describe`: a folder that is described but has no checkpoint is resumed from the seed.
        saver.save(state)
        saver.wait()
    elif resume is not None:
        saver.step = saver.written = state.step
    dist.on_first_rank(run_folder.describe, run_dir, recipe, plan.world, accelerator.device)
    dist.on_first_rank(start.keep_tokenizer, run_dir, data)
    log = dist.on_first_rank(MetricsLog, run_dir, state.step, recipe.optim.steps)
    start.summarise(recipe, plan, data, state, accelerator.device)
    monitor = None
    if start.monitored(recipe) or (recipe.run.monitor_every and isinstance(data, Rows)):  # that says it is off
        monitor = dist.on_first_rank(open_monitor, recipe, data, accelerator.device)
    elif recipe.run.monitor_every:
        start.say(
            f"monitor    off: run.monitor_every {recipe.run.monitor_every} is beyond the last step {recipe.optim.steps}"
        )
    model, stepper = parallel.wrap(accelerator, objective, optimizer)
    meter.record(state.step, state.samples)
    return Opened(
        accelerator, plan, data, objective, model, stepper, state, batches, saver, log, monitor, lock, meter, peak
    )
