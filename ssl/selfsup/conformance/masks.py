"""Masks, documents and slopes of the cases, drawn anew for each shape: functions of (shape, generator)."""

import torch
from torch import Tensor

from selfsup.conformance.inputs import Option, Shape


def bool_mask(*dims: str) -> Option:
    """Random, 60% allowed, the first key always; dims out of "b", "h", "l", "s", or "1" for a broadcast one."""

    def mask(shape: Shape, generator: torch.Generator) -> Tensor:
        size = [1 if n == "1" else getattr(shape, n) for n in dims]
        keep = torch.rand(size, generator=generator) < 0.6
        keep[..., :1] = True
        return keep

    return mask


def float_mask(*dims: str, grad: bool = False) -> Option:
    """Standard normal numbers."""

    def mask(shape: Shape, generator: torch.Generator) -> Tensor:
        size = [1 if n == "1" else getattr(shape, n) for n in dims]
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_(grad)

    return mask


def rows_without_keys(shape: Shape, generator: torch.Generator) -> Tensor:
    """Every third query sees no key."""
    keep = torch.rand(shape.l, shape.s, generator=generator) < 0.6
    keep[:, :1] = True
    keep[::3] = False
    return keep


def first_keys_hidden(shape: Shape, generator: torch.Generator) -> Tensor:
    """Even queries see only the last keys: the online softmax meets whole tiles without one."""
    keep = torch.ones(shape.l, shape.s, dtype=torch.bool)
    keep[::2, : -max(1, shape.s // 5)] = False
    return keep


def last_keys_hidden(shape: Shape, generator: torch.Generator) -> Tensor:
    """Even queries see only the first keys."""
    return first_keys_hidden(shape, generator).flip(-1)


def padding(shape: Shape, generator: torch.Generator) -> Tensor:
    """A batch of sentences of falling length, the last of length 0, keys and queries padded: (b, 1, l, s)."""
    lengths = torch.tensor([max(0, shape.s - n * shape.s // max(1, shape.b - 1)) for n in range(shape.b)])
    keep = torch.arange(shape.s) < lengths[:, None]
    rows = torch.arange(shape.l) < lengths[:, None]
    return (rows[:, :, None] & keep[:, None, :])[:, None]


def as_infinities(mask: Option, grad: bool = False) -> Option:
    """A bool mask as floats: 0 where allowed, -inf elsewhere."""

    def floats(shape: Shape, generator: torch.Generator) -> Tensor:
        keep = mask(shape, generator)
        return torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf).requires_grad_(grad)

    return floats


def lowest(shape: Shape, generator: torch.Generator) -> Tensor:
    """The lowest finite number of fp16 for 40% of the keys: a soft mask, not a hard one."""
    keep = bool_mask("b", "1", "1", "s")(shape, generator)
    return torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -65504.0)


def segments(*lengths: int) -> Option:
    """Documents of these lengths, the last one up to the end; the second batch entry shifted by one token."""

    def ids(shape: Shape, generator: torch.Generator) -> Tensor:
        ends = torch.tensor(lengths).cumsum(0)
        places = torch.arange(shape.s) + torch.arange(shape.b)[:, None]
        return (places[..., None] >= ends).sum(-1)

    return ids


def slopes(*dims: str) -> Option:
    """2^-1, 2^-2, ..., as in the paper for 8 heads; with "b" scaled for each batch entry."""

    def draw(shape: Shape, generator: torch.Generator) -> Tensor:
        by_head = 2.0 ** -(1 + torch.arange(shape.h) * 8 / max(1, shape.h)).double()
        return by_head if dims == ("h",) else by_head * torch.linspace(0.5, 1.5, shape.b).double()[:, None]

    return draw


def laid_out(mask: Option, layout: str) -> Option:
    """The mask as a view: "transposed" in memory, or "expanded" to (b, h, l, s) by strides of 0."""

    def view(shape: Shape, generator: torch.Generator) -> Tensor:
        drawn = mask(shape, generator)
        if layout == "expanded":
            return drawn.expand(shape.b, shape.h, shape.l, shape.s)
        return drawn.mT.contiguous().mT

    return view


def in_fp32(mask: Option) -> Option:
    """The mask in fp32, whatever q is in."""
    return lambda shape, generator: mask(shape, generator).float()


def returning(shape: Shape, generator: torch.Generator) -> Tensor:
    """Documents 0, 1 and 0 again: equal ids belong together, wherever they stand."""
    place = torch.arange(shape.s) * 3 // max(1, shape.s)
    return (place == 1).long().expand(shape.b, -1).clone()
