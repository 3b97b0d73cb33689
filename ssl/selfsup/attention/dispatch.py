"""One name, one function. Every kernel takes the arguments of `reference_attention`."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from selfsup.attention.library import flex_attention_adapter, torch_attention
from selfsup.attention.reference import reference_attention
from selfsup.attention.tiled import tiled_attention

AttentionName = Literal["reference", "tiled", "torch", "flex", "auto"]

TORCH_FROM = {torch.bfloat16: 1 << 20, torch.float16: 1 << 20, torch.float32: 1 << 12, torch.float64: 1 << 12}
"""On a CPU: the scores of one head (l * s) from which torch's fused kernel is faster than `reference`."""
TILED_FROM = 1 << 24
"""The scores of one head from which their matrix is too large to keep: a row of 4,096 against itself."""


class Choice(NamedTuple):
    """What `auto` takes, and why."""

    kernel: AttentionName
    why: str


def choose(device: str, dtype: torch.dtype, length: int, keys: int, unknown_to_torch: list[str]) -> Choice:
    """The kernel for a call, from what was measured (docs/attention.md has the table).

    device: its type, "cpu" or "cuda". dtype: of the matrix products. unknown_to_torch: the options of
    the call that torch's kernel cannot honour (softcap, return_lse).
    """
    scores = length * keys
    if unknown_to_torch:
        missing = f"torch's kernel has no {' and no '.join(unknown_to_torch)}"
        if scores < TILED_FROM:
            return Choice("reference", f"{missing}; {length} x {keys} scores a head still fit the memory")
        return Choice("tiled", f"{missing}; {length} x {keys} scores a head are too many to keep")
    if device != "cpu":
        return Choice("torch", f"its fused kernels; nothing else was measured on {device}")
    limit = TORCH_FROM.get(dtype, 0)
    if scores < limit:
        return Choice("reference", f"plain matrix products are faster below {limit:,} scores a head in {dtype}")
    return Choice("torch", f"its fused kernel is faster from {limit:,} scores a head in {dtype} on a CPU")


def auto_attention(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **options: Any) -> Any:
    """The kernel that `choose` names; arguments as in `reference_attention`."""
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    unknown = [name for name in ("softcap", "return_lse") if options.get(name)]
    kernel = choose(device, dtype, q.shape[-2], k.shape[-2], unknown).kernel
    return KERNELS[kernel](q, k, v, *arguments, **options)


KERNELS: dict[str, Callable[..., Any]] = {
    "reference": reference_attention,
    "tiled": tiled_attention,
    "torch": torch_attention,
    "flex": flex_attention_adapter,
    "auto": auto_attention,
}


def attention_function(name: AttentionName) -> Callable[..., Any]:
    """The attention function for a name. Raises ValueError for an unknown one."""
    if name not in KERNELS:
        raise ValueError(f"attention: expected {', '.join(KERNELS)}, got {name!r}")
    return KERNELS[name]
