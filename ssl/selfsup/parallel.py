"""How the processes of a run share its model: DDP, or FSDP2 (`sharding.py`)."""

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from selfsup import dist, sharding
from selfsup.layers.block import Block
from selfsup.objectives.base import Objective
from selfsup.recipe import Recipe


def split(recipe: Recipe) -> bool:
    """Whether weights will be split over processes."""
    return recipe.run.parallel == "fsdp2" and dist.world_size() > 1


def share(recipe: Recipe, objective: Objective, device: torch.device) -> None:
    """Compiles and splits the objective, as the run section says. Before the optimizer is built."""
    if recipe.run.compile:
        # Of what is split block by block, since between them weights are gathered.
        parts = [m for m in objective.modules() if isinstance(m, Block)] if split(recipe) else [objective]
        for part in parts:
            part.compile()
    if split(recipe):
        sharding.shard(objective, device)
    elif recipe.run.parallel == "fsdp2":
        print("parallel   fsdp2 over one process: it holds everything, as under ddp", flush=True)


def wrap(
    accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """What Accelerate makes of them: autocast, DDP where the weights are not split, loss scaling (fp16)."""
    if sharding.is_sharded(objective):  # evaluation_mode: not once more by DDP, which refuses it on CUDA
        model = accelerator.prepare_model(objective, evaluation_mode=True)
        return model, accelerator.prepare_optimizer(optimizer)
    return accelerator.prepare(objective, optimizer)


def gathered(recipe: Recipe, objective: Objective, device: torch.device) -> Objective:
    """The objective with whole weights, to look at on the first process; of a split one a copy (a collective)."""
    if not sharding.is_sharded(objective):
        return objective
    copy = recipe.objective.build(recipe.encoder) if dist.rank() == 0 else objective
    mine = copy.state_dict()
    for name, value in objective.state_dict().items():  # one at a time; the others drop them at once
        value = sharding.whole(value)
        if dist.rank() == 0:
            mine[name].copy_(value)
    return copy.to(device) if dist.rank() == 0 else objective
