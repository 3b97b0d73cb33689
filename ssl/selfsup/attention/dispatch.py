"""One name, one function. Every kernel takes the arguments of `reference_attention`."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from selfsup.attention.library import flex_attention_adapter, torch_attention
from selfsup.attention.reference import reference_attention
from selfsup.attention.tiled import tiled_attention

AttentionName = Literal["reference", "tiled", "torch", "flex", "auto"]

TORCH_FROM = {torch.bfloat16: 1 << 26, torch.float16: 0, torch.float32: 1 << 20, torch.float64: 1 << 20}
"""On a CPU: the scores of a call (batch x heads x l x s) from which torch's fused kernel is faster than
`reference`, whose matrix of scores then no longer fits the caches. Measured: README.md, Attention."""
TILED_FROM = 1 << 27
"""The scores of a call from which `reference` takes gigabytes: half a GiB in fp32 for each matrix of them."""


class Choice(NamedTuple):
    """What `auto` takes, and why."""

    kernel: AttentionName
    why: str


def pick(
    device: str, dtype: torch.dtype, scores: int, torch_knows_all: bool, causal: bool = False
) -> AttentionName:
    """The kernel for a call, from what was measured. No text in here: torch.compile traces it with symbols."""
    if not torch_knows_all:
        return "reference" if scores < TILED_FROM else "tiled"
    if causal and dtype == torch.float32:  # torch's kernel leaves out the half that nobody sees
        return "torch"
    return "reference" if device == "cpu" and scores < TORCH_FROM.get(dtype, 0) else "torch"


def choose(
    device: str,
    dtype: torch.dtype,
    batch_heads: int,
    length: int,
    keys: int,
    unknown_to_torch: list[str],
    causal: bool = False,
) -> Choice:
    """What `pick` takes, with the reason.

    device: its type, "cpu" or "cuda". dtype: of the matrix products. batch_heads: batch entries times heads.
    unknown_to_torch: the options of the call that torch's kernel cannot honour (softcap, return_lse). causal:
    with is_causal.
    """
    scores = batch_heads * length * keys
    kernel = pick(device, dtype, scores, not unknown_to_torch, causal)
    limit, name = TORCH_FROM.get(dtype, 0), str(dtype).removeprefix("torch.")
    if unknown_to_torch:
        missing = f"torch's kernel has no {' and no '.join(unknown_to_torch)}"
        why = f"{missing}, and {scores:,} scores are {'not ' if kernel == 'reference' else ''}too many to keep"
    elif device != "cpu":
        why = f"its fused kernels; nothing else was measured on {device}"
    elif causal and dtype == torch.float32:
        why = "in float32 on a CPU its fused kernel is faster for causal calls, of which it skips half"
    elif kernel == "reference":
        why = f"in {name} on a CPU plain matrix products are faster below {limit:,} scores, here {scores:,}"
    else:
        why = f"in {name} on a CPU its fused kernel is faster from {limit:,} scores on, here {scores:,}"
    return Choice(kernel, why)


def auto_attention(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **options: Any) -> Any:
    """The kernel that `choose` names; arguments as in `reference_attention`."""
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    known = not (options.get("softcap") or options.get("return_lse"))
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), arguments), **options)
    extras = ("alibi_slopes", "document_ids", "window")
    plain = all(options.get(name) is None for name in extras)
    causal = bool(given.get("is_causal")) and plain and q.shape[-2] == k.shape[-2]
    kernel = pick(device, dtype, math.prod(q.shape[:-1]) * k.shape[-2], known, causal)
    slopes, dropout_p = options.get("alibi_slopes"), given.get("dropout_p")
    if kernel == "tiled" and (dropout_p or (slopes is not None and slopes.requires_grad)):
        kernel = "reference"  # the only one with both
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
