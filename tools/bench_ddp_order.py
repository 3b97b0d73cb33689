"""What it costs to keep the order in which DDP sums gradients.

    torchrun --standalone --nproc_per_node 4 tools/bench_ddp_order.py

DDP as it comes rebuilds its buckets after the first backward pass, so that a resumed run on three or more processes
sums in another order than one never stopped. `selfsup train` sets find_unused_parameters there, which keeps the first
order at the price of one walk over the autograd graph a step. Both forms of one MAE take steps in turn; printed: the
ratio of their times, median (range) over --rounds.
"""

import argparse
import copy
import statistics
import time

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from selfsup import dist
from selfsup.batch import ImageBatch
from selfsup.encoders.vit import ViTConfig
from selfsup.objectives.mae import MAEConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="a round and form")
    parser.add_argument("--embed-dim", type=int, default=192)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8, help="images a process")
    options = parser.parse_args()
    Accelerator(cpu=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = ViTConfig(img_size=64, patch_size=8, embed_dim=options.embed_dim, depth=options.depth, num_heads=3)
    mae = MAEConfig(decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4).build(encoder)
    forms = {
        keep: DistributedDataParallel(copy.deepcopy(mae), find_unused_parameters=keep) for keep in (False, True)
    }
    b = options.batch_size
    place = torch.arange(b) + b * dist.rank()
    batch = ImageBatch(torch.randn(b, 3, 64, 64), 0, 0 * place, place, place)

    def seconds(model: DistributedDataParallel) -> float:
        dist.sum_over_ranks(0.0)
        began = time.perf_counter()
        for _ in range(options.steps):
            model.zero_grad()
            model(batch, float(b * dist.world_size())).loss.backward()
        dist.sum_over_ranks(0.0)
        return (time.perf_counter() - began) / options.steps

    for model in forms.values():  # buckets are rebuilt in here
        seconds(model)
    ratios, plain = [], []
    for _ in range(options.rounds):
        times = {keep: seconds(model) for keep, model in forms.items()}
        ratios.append(times[True] / times[False])
        plain.append(times[False])
    if dist.rank() == 0:
        print(
            f"{dist.world_size()} processes, {sum(p.numel() for p in mae.parameters()) / 1e6:.1f} M weights, {b} images "
            f"each: a step takes {1e3 * statistics.median(plain):.0f} ms as it comes, with a constant order "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) times that"
        )
    dist.leave()


if __name__ == "__main__":
    main()
