"""FLOPs of matrix products, two per multiply-add; element-wise work is not counted.

The same convention as torch's FlopCounterMode, which the tests hold this against, and as published
MFU figures. Also the dense peaks of devices we know.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def linear(tokens: int, in_features: int, out_features: int) -> float:
    """One linear layer over `tokens` rows, forward."""
    return 2.0 * tokens * in_features * out_features


def attention(tokens: int, dim: int) -> float:
    """Scores and weighted sum of full self-attention over `tokens`, all heads, forward."""
    return 4.0 * tokens * tokens * dim


def block(tokens: int, dim: int, mlp_ratio: float) -> float:
    """One transformer block, forward."""
    projections = linear(tokens, dim, 3 * dim) + linear(tokens, dim, dim)
    mlp = 2 * linear(tokens, dim, int(dim * mlp_ratio))
    return projections + mlp + attention(tokens, dim)


def linears(module: nn.Module) -> float:
    """Every Linear of the module once, over one row, forward: what an MLP costs a sample."""
    found = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum((linear(1, layer.in_features, layer.out_features) for layer in found), 0.0)


class Counted(NamedTuple):
    """What one image costs a module."""

    forward: float
    training: float
    """Forward and backward, without a gradient for the pixels."""


def counted(module: nn.Module, img_size: int, in_chans: int) -> Counted:
    """Matrix products and convolutions of one image (in_chans, img_size, img_size), by torch's own counter.

    module: on the meta device, where shapes are worked out and nothing is computed; it comes back in
    eval mode (a batch norm refuses a batch of one otherwise). For encoders without a closed form.
    """
    assert all(p.is_meta for p in module.parameters()), "counted: build the module under torch.device('meta')"
    images = torch.empty(1, in_chans, img_size, img_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        features = module.eval()(images)
        forward = counter.get_total_flops()
        features.sum().backward()
    return Counted(float(forward), float(counter.get_total_flops()))


# Dense bf16/fp16 tensor peaks in FLOP/s from the makers' data sheets (without sparsity), SXM where
# a name has several boards; the slower PCIe and NVL boards count as unknown.
_HALF_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def peak(device: torch.device, precision: str) -> float | None:
    """The device's dense peak in FLOP/s for "bf16" or "fp16"; None where we do not know it."""
    if device.type != "cuda" or precision == "fp32":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    if "MIG" in words or (words[-1] in ("PCIe", "NVL") and "A100" not in words):
        return None
    return next((value for key, value in _HALF_PEAKS.items() if key in words), None)
