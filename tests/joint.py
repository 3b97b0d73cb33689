"""What the tests of joint-embedding objectives share: a small recipe, random views, shards and configs for runs."""

from pathlib import Path

import numpy as np
import torch

from selfsup.config import validate
from selfsup.data.pack import pack_arrays
from selfsup.data.views import ViewBatch
from selfsup.recipe import Recipe

RECIPE = {
    "objective": {"name": "simclr", "hidden_dim": 24, "out_dim": 8},
    "encoder": {"name": "vit", "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "data": {"shards": "nowhere", "views": "simclr-32"},
    "optim": {"batch_size": 8},
    "run": {"dir": "nowhere"},
}

VIT = "{img_size: 16, patch_size: 4, embed_dim: 32, depth: 4, num_heads: 2}"
# 32 px: at 16 its last stage convolves a 1 x 1 map with stride 2, where PyTorch 2.15's bf16 gradient on an AVX-512
# CPU reads memory nobody wrote (NaN whenever that held one).
RESNET = "{name: timm, model: test_resnet, img_size: 32}"
CONFIG = """
objective: {name: NAME, hidden_dim: 32, out_dim: 16}
encoder: ENCODER
data: {views: simclr-32, shards: SHARDS}
optim: {steps: 20, batch_size: 16, base_lr: 1.0e-2}
run: {workers: 0, log_every: 1, checkpoint_every: 3, picture_every: 0, monitor_every: 0}
"""


def recipe(**sections) -> Recipe:
    """RECIPE with keys of its sections changed."""
    return validate(Recipe, {**RECIPE, **{k: {**RECIPE[k], **v} for k, v in sections.items()}})


def batch_of(b: int, size: int = 16, dtype: torch.dtype = torch.float32) -> ViewBatch:
    """Two random views of b images, as an objective gets them."""
    views = tuple(torch.randn(b, 3, size, size, dtype=dtype) for _ in range(2))
    place = torch.arange(b)
    return ViewBatch(views=views, seed=0, epoch=place * 0, position=place, index=place, colours=())


def make_colour_shards(folder: Path, samples: int = 83, per_shard: int = 30) -> Path:
    """Small RGB images of coloured blocks in several shards of unequal size."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (samples, 4, 5, 3)).repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    pack_arrays(images, np.arange(samples) % 3, ["a", "b", "c"], folder, per_shard)
    return folder


def write_joint_config(folder: Path, shards: Path, name: str, encoder: str = VIT) -> Path:
    """A YAML for `selfsup train`; name: of the objective."""
    path = folder / f"{name}-{'vit' if encoder == VIT else 'resnet'}.yaml"
    path.write_text(CONFIG.replace("NAME", name).replace("SHARDS", str(shards)).replace("ENCODER", encoder))
    return path
