"""FLOPs of matrix products, two per multiply-add; element-wise work is not counted.

The same convention as torch's FlopCounterMode, which the tests hold this against, and as published
MFU figures. Also the dense peaks of devices we know.
"""

import torch


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
