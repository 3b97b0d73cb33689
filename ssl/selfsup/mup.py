"""The maximal update parametrisation for Adam (Yang et al. 2022, "Tensor Programs V", 2203.03466).

The learning rate that is best for a narrow model is then best for a wide one. With r = base width / width:

    input   embeddings, patches, positions, biases, norms    as at the base width     lr
    hidden  matrices from width to width                     init std * sqrt(r)       lr * r
    output  matrices from width to vocabulary or pixels      init std * r             lr * r

These are the paper's table 3, each row against the model as it is at the base width: there nothing changes. Table 8
has for the output an init and a learning rate as at the base width and a multiplier r in the forward pass: the same
function after every step of Adam, whose update does not depend on the scale of a gradient (but for its eps, and for
clipping: the norm of all gradients weighs such layers otherwise). So does a
head that is tied to the embeddings get its multiplier here: weight and bias of the norm before it start at r times what
they are and learn at lr * r. No forward pass changes, and a checkpoint is that of any other run.

Attention keeps 1/sqrt(channels of a head): that is muP's 1/channels as long as all sizes have heads of one size.

It is a rule for width alone. Depth, batch and length of a run move the best learning rate as they do without it.
"""

import math

import torch
from torch import Tensor, nn

from selfsup.config import Section
from selfsup.encoders.text import TextConfig, TextEncoder
from selfsup.encoders.vit import ViTConfig

OBJECTIVES = ("clm", "mlm", "mae")
"""Every layer of these can widen with the encoder; the projectors of the others do not."""


def check_mup(objective: str, encoder: Section, base_width: int, decoder: tuple[int, int] | None = None) -> None:
    """Raises ValueError where muP does not hold, or where no model of the base width has such heads.

    decoder: width and heads of mae's. At the base width it is narrower in the same proportion, as is an MLP of fixed size.
    """
    if objective not in OBJECTIVES or not isinstance(encoder, (TextConfig, ViTConfig)):
        raise ValueError(
            f"optim.mup_base_width: expected none, muP is here for {', '.join(OBJECTIVES)}, got objective.name "
            f"{objective}; remove it"
        )
    head_dim = encoder.embed_dim // encoder.num_heads
    if base_width % head_dim:
        raise ValueError(
            f"optim.mup_base_width: expected a multiple of {head_dim}, the channels of a head, which are the same at "
            f"every width, got {base_width}; change it or encoder.num_heads"
        )
    if decoder is not None and decoder[0] * base_width % (encoder.embed_dim * (decoder[0] // decoder[1])):
        raise ValueError(
            f"optim.mup_base_width: at width {base_width} the decoder would have {decoder[0] * base_width / encoder.embed_dim:g} "
            f"channels, which are no heads of {decoder[0] // decoder[1]}; change it or objective.decoder_embed_dim"
        )


def lr_scales(objective: nn.Module, base_width: int) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied by: r of hidden and output matrices and of the norm before
    a tied head, else 1. objective: clm, mlm or mae."""
    ratio, readouts = base_width / objective.encoder.embed_dim, objective.readouts
    found = {}
    for prefix, layer in objective.named_modules():
        for name, _ in layer.named_parameters(prefix, recurse=False):
            matrix = isinstance(layer, nn.Linear) and name.endswith("weight")
            before_tied = layer in readouts and not isinstance(layer, nn.Linear)
            found[name] = ratio if matrix or before_tied else 1.0
    return found


@torch.no_grad()
def scale_init(objective: nn.Module, base_width: int) -> None:
    """Multiplies fresh weights, so that their size is muP's. objective: clm, mlm or mae; on any device, meta too."""
    ratio = base_width / objective.encoder.embed_dim
    for layer in objective.modules():
        if layer in objective.readouts:
            scale = ratio
        elif isinstance(layer, nn.Linear):
            scale = math.sqrt(ratio)
        elif isinstance(layer, (nn.Embedding, nn.Conv2d)):
            scale = 1.0
        else:
            continue
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            scale *= drawn(layer, objective, ratio)
        for p in layer.parameters(recurse=False):  # of a linear layer the bias is 0
            p.mul_(scale)


def drawn(layer: nn.Linear | nn.Conv2d, objective: nn.Module, ratio: float) -> float:
    """How many times larger the layer's weights are drawn at the base width. Text's have one size at every width; those
    of images are Xavier's, sqrt(2 / (fan_in + fan_out)): of a hidden matrix 1 / sqrt(r), so that it stays as it is drawn."""
    if isinstance(objective.encoder, TextEncoder):
        return 1.0
    rows, columns = _fans(layer.weight)
    fixed_in, fixed_out = isinstance(layer, nn.Conv2d), layer in objective.readouts
    base = columns * (1 if fixed_in else ratio) + rows * (1 if fixed_out else ratio)
    return math.sqrt((rows + columns) / base)


def _fans(weight: Tensor) -> tuple[int, int]:
    """Outputs and inputs; of a convolution whose patches do not overlap, as of the linear layer that it is."""
    return weight.shape[0], weight[0].numel()
