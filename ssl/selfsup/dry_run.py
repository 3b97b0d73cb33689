"""What a run would be, without running it."""

from pathlib import Path

import torch
from torch import Tensor

from selfsup import checkpoint, start
from selfsup.checkpoint import TrainState
from selfsup.config import dump_yaml
from selfsup.optim import build_optimizer
from selfsup.recipe import Recipe


def dry_run(recipe: Recipe, weights: Path | None = None) -> None:
    """Prints the resolved config, sizes and costs, and takes one micro-batch forward and backward.

    weights: a run or checkpoint to begin from. Raises ValueError for whatever the user can mend.
    """
    device = start.accelerator(recipe).device
    plan, data = start.batch_plan(recipe), start.open_data(recipe)
    objective = start.build_objective(recipe, device)
    if weights is not None:
        start.say(checkpoint.init_from(weights, objective, recipe, start.data_facts(data)))
    optimizer = build_optimizer(recipe.optim, objective)
    state = TrainState(objective, optimizer, None, recipe, 0, 0, {})
    batches = start.open_batches(recipe, data, plan, state)
    batch = recipe.data.to(next(batches), device)
    batches.close()
    if not batch.targets:
        raise ValueError("nothing to predict in a micro-batch, its documents are empty; raise optim.batch_size")
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision.mixed]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = objective(batch, float(batch.targets)).loss
    loss.backward()
    parameters = [p.numel() for p in objective.parameters()]
    trainable = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    copies = 1 if recipe.optim.ema is None else 2
    per_trainable = 1 + recipe.optim.moments  # its gradient, and what the optimizer keeps
    state_bytes = 4 * copies * sum(parameters) + 4 * per_trainable * trainable
    start.say(dump_yaml(recipe))
    start.summarise(recipe, plan, data, state, device)
    start.say(
        f"FLOPs      {objective.flops_per_sample() * plan.global_batch:.3g} per step, "
        f"{objective.flops_per_sample():.3g} per sample, forward and backward",
        f"memory     {state_bytes / 2**20:.0f} MiB weights, gradients and optimizer + "
        f"{sum(saved.values()) / 2**20:.0f} MiB kept for the backward pass of a micro-batch, per process",
        f"one micro-batch of {plan.micro_batch} samples went through: loss {loss.item():.4f}. Nothing was written.",
    )
