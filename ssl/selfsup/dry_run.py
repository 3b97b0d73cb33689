"""What a run would be, without running it."""

import os
from pathlib import Path

import torch

from selfsup import checkpoint, dist, start
from selfsup.checkpoint import TrainState
from selfsup.config import dump_yaml
from selfsup.data.index import ShardIndex
from selfsup.data.order import BatchPlan
from selfsup.data.rows import Rows
from selfsup.encoders import has_batch_norm
from selfsup.estimate import TYPES, CannotEstimate, Memory
from selfsup.headroom import GIB, Limit, Way, limit_of, remedies
from selfsup.objectives.base import Objective
from selfsup.optim import build_optimizer
from selfsup.recipe import Recipe

MIB = 2**20


def dry_run(recipe: Recipe, weights: Path | None = None) -> None:
    """Prints the resolved config, sizes, costs and the memory that a step takes. Where that fits, takes one
    micro-batch forward and backward; where not, says what would make it fit.

    weights: a run or checkpoint to begin from. Of a single process `run.expect_processes` says for how many the
    run is meant. Raises ValueError for whatever the user can mend.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    world = launched if launched > 1 else recipe.run.expect_processes or 1
    device = torch.device("cpu" if start.runs_on_cpu(recipe.run) else "cuda")
    way = Way(recipe, world, recipe.run.parallel == "fsdp2", device)
    memory, unknown = None, ""
    try:
        memory = way.estimate()  # before there is a process group: it runs the model as one process
    except CannotEstimate as error:
        unknown = str(error)
    # What goes through below is not sharded.
    whole = memory if memory is None or not way.fsdp else way._replace(fsdp=False).estimate()

    unbound = recipe.model_copy(update={"run": recipe.run.model_copy(update={"expect_processes": None})})
    device = start.accelerator(unbound if launched == 1 else recipe).device
    plan = start.batch_plan(recipe, None if world == launched else world)
    with torch.device("meta"):
        objective = start.build_objective(recipe, torch.device("meta"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if device.type == "cpu" else 1
    limit = limit_of(device, here)
    start.say(dump_yaml(recipe))
    # Memory before data: a recipe can be weighed where its shards are not.
    start.say(
        *([f"memory     cannot be estimated: {unknown}"] if memory is None else _account(memory, limit))
    )
    tight, whole_tight = dist.sum_over_ranks(
        *(float(each is not None and not limit.fits(each)) for each in (memory, whole))
    )
    if tight and dist.rank() == 0:
        _advise(way, limit, has_batch_norm(objective))
    data = start.open_data(recipe)
    _describe(recipe, plan, data, objective, device)
    if whole_tight:
        start.say("no micro-batch was taken through: it would run out of memory. Nothing was written.")
        return
    loss = _one_micro_batch(recipe, plan, data, device, weights)
    start.say(
        f"one micro-batch of {plan.micro_batch} samples went through: loss {loss:.4f}. Nothing was written."
    )


def _describe(
    recipe: Recipe,
    plan: BatchPlan,
    data: ShardIndex | Rows | None,
    objective: Objective,
    device: torch.device,
) -> None:
    """objective: on the meta device."""
    state = TrainState(objective, build_optimizer(recipe.optim, objective), None, recipe, 0, 0, {})
    start.summarise(recipe, plan, data, state, device)
    start.say(
        f"FLOPs      {objective.flops_per_sample() * plan.global_batch:.3g} per step, "
        f"{objective.flops_per_sample():.3g} per sample, forward and backward"
    )


def _account(memory: Memory, limit: Limit) -> list[str]:
    parallel = (
        f" + {memory.parallel / MIB:.0f} MiB of DDP's buckets or FSDP2's gathered blocks"
        if memory.parallel
        else ""
    )
    average = " and average" if memory.average else ""
    verdict = "fits" if limit.fits(memory) else "DOES NOT FIT"
    return [
        f"memory     {memory.state / MIB:.0f} MiB weights, gradients and optimizer{average} + "
        f"{memory.activations / MIB:.0f} MiB kept for the backward pass of a micro-batch{parallel}, per process",
        f"peak       {memory.peak / GIB:.2f} GiB at once, estimated; {verdict}: {limit.what}",
    ]


def _advise(way: Way, limit: Limit, batch_norm: bool) -> None:
    start.say("what would make it fit, each estimated again (peak per process):")
    found = remedies(way, limit)
    start.say(*(f"  {remedy.words}: {remedy.memory.peak / GIB:.2f} GiB" for remedy in found))
    if not found:
        start.say("  nothing that this recipe has a key for: take a smaller model or a larger device")
    if batch_norm and any("--run.micro-batch" in remedy.words for remedy in found):
        start.say(
            "  with batch norm another run.micro_batch gives another gradient: its statistics are of one"
        )


def _one_micro_batch(
    recipe: Recipe,
    plan: BatchPlan,
    data: ShardIndex | Rows | None,
    device: torch.device,
    weights: Path | None,
) -> float:
    """Forward and backward on real data; the loss."""
    objective = start.build_objective(recipe, device)
    if weights is not None:
        start.say(checkpoint.init_from(weights, objective, recipe, start.data_facts(data)))
    state = TrainState(objective, build_optimizer(recipe.optim, objective), None, recipe, 0, 0, {})
    batches = start.open_batches(recipe, data, plan, state)
    batch = recipe.data.to(next(batches), device)
    batches.close()
    if not batch.targets:
        raise ValueError(
            "nothing to predict in a micro-batch, its documents are empty; raise optim.batch_size"
        )
    dtype = TYPES[recipe.precision.mixed]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = objective(batch, float(batch.targets)).loss
    loss.backward()
    return loss.item()
