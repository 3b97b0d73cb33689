"""MAE training steps per second: selfsup against Hugging Face's ViTMAEForPreTraining on the same work.

    python tools/bench_mae.py                                  ViT-Tiny, 64 px, patch 8, batch 128, bf16
    python tools/bench_mae.py --shards data/cifar10/train      end to end from shards against the pure step
    python tools/bench_mae.py --help

One step is forward, backward and fused AdamW on the same shapes, mask ratio and decoder. The
contestants take turns; printed are the median images/s, and the median and range of the ratio to
the first one, round by round: ratios hold on a busy machine, single figures do not.
"""

import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
import tyro

from selfsup.attention.dispatch import AttentionName
from selfsup.batch import ImageBatch
from selfsup.data.images import ImageData, train_batches
from selfsup.data.index import open_shards
from selfsup.data.order import BatchPlan
from selfsup.encoders.vit import ViTConfig
from selfsup.objectives.mae import MAEConfig
from selfsup.optim import OptimConfig, build_optimizer

Precision = Literal["fp32", "bf16"]
Step = Callable[[], None]


def main(
    img_size: int = 64,
    patch_size: int = 8,
    embed_dim: int = 192,
    depth: int = 12,
    num_heads: int = 3,
    decoder_embed_dim: int = 512,
    decoder_depth: int = 8,
    decoder_num_heads: int = 16,
    batch_size: int = 128,
    precision: Precision = "bf16",
    rounds: int = 5,
    threads: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    compile: bool = False,
    shards: str | None = None,
) -> None:
    """Time MAE steps.

    Args:
        img_size: image side in pixels.
        patch_size: patch side in pixels.
        embed_dim: encoder width.
        depth: encoder blocks.
        num_heads: encoder heads.
        decoder_embed_dim: decoder width.
        decoder_depth: decoder blocks.
        decoder_num_heads: decoder heads.
        batch_size: images per step.
        precision: bf16 is autocast.
        rounds: timed steps of each contestant, after two that are not counted.
        threads: torch threads.
        device: where to run.
        compile: torch.compile every contestant.
        shards: a folder of shards: compare our step on ready tensors with our step fed from it.
    """
    torch.set_num_threads(threads)
    vit = ViTConfig(
        img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads
    )
    mae = MAEConfig(
        decoder_embed_dim=decoder_embed_dim, decoder_depth=decoder_depth, decoder_num_heads=decoder_num_heads
    )
    where = torch.device(device)
    if shards is not None:
        contestants = {
            "selfsup, ready tensors": ours(mae, vit, "reference", batch_size, precision, where, compile),
            "selfsup, from shards": from_shards(mae, vit, shards, batch_size, precision, where, compile),
        }
    else:
        contestants = {
            "transformers, sdpa (default)": theirs(mae, vit, "sdpa", batch_size, precision, where, compile),
            "transformers, eager": theirs(mae, vit, "eager", batch_size, precision, where, compile),
            "selfsup, reference": ours(mae, vit, "reference", batch_size, precision, where, compile),
            "selfsup, torch": ours(mae, vit, "torch", batch_size, precision, where, compile),
        }
    print(
        f"ViT {embed_dim}/{depth}/{num_heads}, {img_size} px, patch {patch_size}, batch {batch_size}, {precision}, ",
        end="",
    )
    print(
        f"{device}, {threads} threads, {'compiled' if compile else 'eager'}, torch {torch.__version__}, {rounds} rounds"
    )
    report(interleave(contestants, rounds, where), batch_size)


def optimised(
    module: torch.nn.Module, loss: Callable[[], torch.Tensor], precision: Precision, device: torch.device
) -> Step:
    """A training step around a loss."""
    optimizer = build_optimizer(OptimConfig(), module)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(
    mae: MAEConfig,
    vit: ViTConfig,
    attention: AttentionName,
    batch_size: int,
    precision: Precision,
    device: torch.device,
    compile: bool,
) -> Step:
    module = mae.build(vit.model_copy(update={"attention": attention})).to(device)
    if compile:
        module.compile()
    images = torch.randn(batch_size, vit.in_chans, vit.img_size, vit.img_size, device=device)
    rows = torch.arange(batch_size, device=device)
    batch = ImageBatch(images, 0, torch.zeros_like(rows), rows, rows)
    return optimised(module, lambda: module(batch, float(batch_size)).loss, precision, device)


def from_shards(
    mae: MAEConfig,
    vit: ViTConfig,
    shards: str,
    batch_size: int,
    precision: Precision,
    device: torch.device,
    compile: bool,
) -> Step:
    """As `ours`, but images come from shards through one loader process: read, checked, decoded, cropped."""
    module = mae.build(vit).to(device)
    if compile:
        module.compile()
    data, plan = ImageData(shards=shards), BatchPlan(batch_size, batch_size, rank=0, world=1)
    batches = train_batches(data, open_shards(shards), 0, vit.img_size, vit.in_chans, plan, 0, workers=1)

    def loss() -> torch.Tensor:
        batch = next(batches).to(device, data.mean, data.std)
        return module(batch, float(batch_size)).loss

    return optimised(module, loss, precision, device)


def theirs(
    mae: MAEConfig,
    vit: ViTConfig,
    attention: str,
    batch_size: int,
    precision: Precision,
    device: torch.device,
    compile: bool,
) -> Step:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=vit.img_size,
        patch_size=vit.patch_size,
        hidden_size=vit.embed_dim,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.num_heads,
        intermediate_size=int(vit.embed_dim * vit.mlp_ratio),
        decoder_hidden_size=mae.decoder_embed_dim,
        decoder_num_hidden_layers=mae.decoder_depth,
        decoder_num_attention_heads=mae.decoder_num_heads,
        decoder_intermediate_size=4 * mae.decoder_embed_dim,
        norm_pix_loss=True,
        attn_implementation=attention,
    )
    module = ViTMAEForPreTraining(config).to(device)
    if compile:
        module.compile()
    images = torch.randn(batch_size, vit.in_chans, vit.img_size, vit.img_size, device=device)
    return optimised(module, lambda: module(images).loss, precision, device)


def interleave(contestants: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step, one of each contestant a round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, step in contestants.items():
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(seconds: dict[str, list[float]], batch_size: int) -> None:
    """Median images/s of each, and its ratio to the first, round by round."""
    first = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratios = [base / mine for base, mine in zip(first, times, strict=True)]
        rate = batch_size / statistics.median(times)
        print(
            f"{name:30s} {rate:9.1f} images/s   x{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    tyro.cli(main)
