"""Where a vision transformer looks: the attention weights of every block and head.

Kernels return values, not weights, so the weights are computed once more from each layer's input by
`attention_weights`. That they are the layer's own is checked: with its values they must give its output.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.attention.reference import attention_weights
from selfsup.encoders.vit import ViT

_TOLERANCE = 1e-3
"""Of the largest output of a layer: kernels may differ by rounding, a forgotten step differs by far more."""


def no_attention(encoder: nn.Module) -> str | None:
    """Why there are no maps of this encoder; None where there are."""
    if isinstance(encoder, ViT):
        return None
    return (
        f"expected a vit encoder of selfsup, got {type(encoder).__name__}: other models keep their queries and "
        f"keys elsewhere, or have none"
    )


@torch.no_grad()
def attention_maps(encoder: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "depth b heads m"]:
    """How much the class token attends to each token, by block and head; each row sums to one.

    images: normalised, on the encoder's device. m counts all tokens, the prefix (class token,
    registers) first: `patch_maps` cuts it off. Without a class token: the mean over all patches as
    queries. Computed in eval mode; the encoder is left as it was. Raises ValueError for an encoder
    other than our ViT, and where the weights do not explain a layer's output, so that no map is shown
    that is not the layer's.
    """
    reason = no_attention(encoder)
    if reason is not None:
        raise ValueError(f"attention maps: {reason}")
    maps: list[Tensor] = []

    def catch(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights, explained = _weights_and_output(layer, *inputs[:2])  # a ViT has no scope, no cache
        limit = _TOLERANCE * max(1e-3, float(output.abs().max()))
        if not float((explained - output).abs().max()) <= limit:
            raise ValueError(
                "attention maps: the weights computed from a layer's input do not give its output; "
                "selfsup/look/attention.py lacks a step that layers/attention.py takes"
            )
        patches = weights[:, :, encoder.num_prefix_tokens :]  # as queries: (b, heads, n, m)
        maps.append(weights[:, :, 0] if encoder.config.class_token else patches.mean(dim=2))  # (b, heads, m)

    hooks = [block.attn.register_forward_hook(catch) for block in encoder.blocks]
    training = encoder.training
    try:
        encoder.eval().forward_features(images)
    finally:
        encoder.train(training)
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)


def _weights_and_output(
    layer: nn.Module, x: Float[Tensor, "b m d"], rotation: Any = None
) -> tuple[Float[Tensor, "b h m m"], Float[Tensor, "b m d"]]:
    """The weights of an attention layer on its input, and the output that follows from them."""
    q, k, v = layer.heads(x, rotation)
    weights = attention_weights(q, k)
    return weights, layer.proj(rearrange(weights @ v, "b h m c -> b m (h c)"))


def patch_maps(
    maps: Float[Tensor, "depth b heads m"], num_prefix_tokens: int
) -> Float[Tensor, "depth b heads side side2"]:
    """The weights on patches laid out as the image; what went to the prefix tokens is missing."""
    patches = maps[..., num_prefix_tokens:]
    side = round(patches.shape[-1] ** 0.5)
    return rearrange(patches, "l b h (y x) -> l b h y x", y=side, x=side)
