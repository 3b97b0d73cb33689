"""One name, one function. Every kernel takes the arguments of `reference_attention`."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from selfsup.attention.reference import reference_attention

AttentionName = Literal["reference", "torch", "auto"]


def attention_function(name: AttentionName, device: torch.device) -> Callable[..., Tensor]:
    """The attention function for a name.

    `auto`: on a CPU `reference` (in bf16 torch's fused backward is several times slower there),
    elsewhere `torch`. Raises ValueError for an unknown name.
    """
    if name == "reference" or (name == "auto" and device.type == "cpu"):
        return reference_attention
    if name in ("torch", "auto"):
        return torch.nn.functional.scaled_dot_product_attention
    raise ValueError(f"attention: expected reference, torch or auto, got {name!r}")
