"""Our tensors under the names and in the shapes of other libraries. The ViT's are timm's."""

import re

import torch
from torch import Tensor, nn

BLOCK = re.compile(r"(?:decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)")


def float_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors in float32 under their own names, integers (a batch norm's counter) as they are."""
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in module.state_dict().items()
    }


def rename(
    weights: dict[str, Tensor], outside: dict[str, str], blocks: str, inside: dict[str, str]
) -> dict[str, Tensor]:
    """The same tensors under another library's names.

    outside: our name of a tensor, or of a module with weight and bias, to theirs; blocks: their prefix
    before the number of a block; inside: the same as `outside`, for modules within a block.
    Raises ValueError for a tensor that has no place there, so that none is dropped unseen.
    """
    renamed = {}
    for name, tensor in weights.items():
        block = BLOCK.fullmatch(name)
        module, _, leaf = name.rpartition(".")
        if block and block[2] in inside:
            renamed[f"{blocks}{block[1]}.{inside[block[2]]}.{block[3]}"] = tensor
        elif name in outside:
            renamed[outside[name]] = tensor
        elif module in outside:
            renamed[f"{outside[module]}.{leaf}"] = tensor
        else:
            raise ValueError(f"{name}: this tensor has no place in the target; NOT exported, try --to timm")
    return renamed


def with_qkv_bias(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function where a library always has this bias: zeros where we have none."""
    suffix = ".attn.qkv.weight"
    prefixes = [name.removesuffix(suffix) for name in weights if name.endswith(suffix)]
    zeros = {f"{prefix}.attn.qkv.bias": torch.zeros(len(weights[f"{prefix}{suffix}"])) for prefix in prefixes}
    return zeros | weights


def split_qkv(weights: dict[str, Tensor], heads: tuple[int, int, int] = (1, 1, 1)) -> dict[str, Tensor]:
    """The fused `attn.qkv` as `attn.query`, `attn.key`, `attn.value`; heads: how many each has, or their ratio."""
    split = {}
    for name, tensor in weights.items():
        if ".attn.qkv." not in name:
            split[name] = tensor
            continue
        head = len(tensor) // sum(heads)
        parts = tensor.split([head * count for count in heads])
        for part, rows in zip(("query", "key", "value"), parts, strict=True):
            split[name.replace("qkv", part)] = rows.clone()  # safetensors saves no shared memory
    return split
