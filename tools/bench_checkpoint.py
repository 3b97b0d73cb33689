"""Times saving and resuming a state of the size of ViT-B's MAE: at once, in the background, whole and split.

    python tools/bench_checkpoint.py FOLDER                                          whole, one process
    torchrun --standalone --nproc_per_node 2 tools/bench_checkpoint.py FOLDER        split over two (FSDP2)

FOLDER lies on the disk to be measured; what is written there is removed. Each figure is the median (range) of
--rounds. `loop waits` is what a training step waits for, `until durable` when the checkpoint is there after a
rename, fsynced. Resuming verifies every SHA-256 and reads weights and moments into the model.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from selfsup import dist, sharding
from selfsup.checkpoint import TrainState, find_checkpoint, restore
from selfsup.config import read_yaml, validate
from selfsup.optim import build_optimizer
from selfsup.recipe import Recipe
from selfsup.saving import Saver

RECIPE = Path(__file__).parent.parent / "configs" / "mae" / "imagenet-base.yaml"


def state_of(recipe: Recipe) -> TrainState:
    """Weights and moments, none of them special; split where there are several processes."""
    objective = recipe.objective.build(recipe.encoder)
    if dist.world_size() > 1:
        sharding.shard(objective, torch.device("cpu"))
    optimizer = build_optimizer(recipe.optim, objective)
    for p in objective.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    return TrainState(objective, optimizer, None, recipe, 1, 0, {})


def once(folder: Path, state: TrainState, background: bool) -> tuple[float, float, float]:
    """Seconds that the loop waits, until it is durable, and to resume."""
    if dist.rank() == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    dist.sum_over_ranks(0.0)
    saver = Saver(folder, 2, background)
    began = time.perf_counter()
    saver.save(state)
    waited = time.perf_counter() - began
    saver.close()
    durable = time.perf_counter() - began
    began = time.perf_counter()
    restore(find_checkpoint(folder)[0], state)
    dist.sum_over_ranks(0.0)
    return waited, durable, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    Accelerator(cpu=True)
    torch.set_num_threads(1)
    content = read_yaml(RECIPE)
    content["run"]["dir"] = str(arguments.folder)
    state = state_of(validate(Recipe, content))
    folder = arguments.folder / "bench-checkpoint"
    rows = {False: [], True: []}
    for _ in range(arguments.rounds):  # by turns
        for background, found in rows.items():
            found.append(once(folder, state, background))
    if dist.rank() == 0:
        size = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
        weights = sum(p.numel() for p in state.objective.parameters())
        print(f"{RECIPE.stem}: {weights / 1e6:.0f} M weights, {size / 1e9:.2f} GB, {dist.world_size()} processes")
        for background, found in rows.items():
            texts = [
                f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f}) s" for c in zip(*found, strict=True)
            ]
            names = ("loop waits", "until durable", "resume")
            print("background" if background else "at once   ", *(f"  {n} {t}" for n, t in zip(names, texts)))
        shutil.rmtree(folder)
    dist.leave()


if __name__ == "__main__":
    main()
