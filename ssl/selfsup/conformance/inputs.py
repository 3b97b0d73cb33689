"""What a kernel is called with, as data: shapes, ways to draw, ways to lie in memory."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Shape(NamedTuple):
    """Batch, query heads, key heads, queries, keys, width of q and k, width of v."""

    b: int = 1
    h: int = 2
    hk: int = 2
    l: int = 33  # noqa: E741
    s: int = 33
    d: int = 16
    dv: int = 16


class Inputs(NamedTuple):
    """One call: arguments, and the gradients that come back into its outputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    grad_out: Tensor
    grad_lse: Tensor | None


Draw = Callable[[Shape, torch.Generator], tuple[Tensor, Tensor, Tensor]]
Option = Callable[[Shape, torch.Generator], Any]


@dataclass(frozen=True)
class InputRecipe:
    """Makes the inputs of a case from a seed. A smaller `shape` gives a smaller case of the same kind."""

    shape: Shape = Shape()
    dtype: str = "fp32"
    draw: Draw = field(default=lambda shape, generator: normal(shape, generator))
    options: Mapping[str, Any] = field(default_factory=dict)
    """SDPA's and our keyword arguments; a callable is called with (shape, generator)."""
    layout: str = "contiguous"
    """How q, k and v lie in memory: one of LAYOUTS."""
    grad_layout: str = "contiguous"
    """The same of the gradient that comes in: contiguous, transposed, or expanded."""

    def __call__(self, seed: int, device: str = "cpu") -> Inputs:
        """The inputs, with q, k, v (and a float mask that wants one) requiring a gradient."""
        generator, shape = torch.Generator().manual_seed(seed), self.shape
        dtype = DTYPES[self.dtype]
        q, k, v = (x.to(dtype).to(device) for x in self.draw(shape, generator))
        q, k, v = LAYOUTS[self.layout](q, k, v)
        options = {n: o(shape, generator) if callable(o) else o for n, o in self.options.items()}
        for name, value in options.items():
            if isinstance(value, Tensor):
                value = value.to(device)
                # A mask of fp64 is about no dtype; one of fp32 stays so, beside half precision too.
                options[name] = value.to(dtype) if name == "attn_mask" and value.dtype == torch.float64 else value
        if shape.h != shape.hk:
            options["enable_gqa"] = True
        grad_out = torch.randn(shape.b, shape.h, shape.l, shape.dv, generator=generator, dtype=torch.float64)
        grad_out = GRAD_LAYOUTS[self.grad_layout](grad_out.to(dtype).to(device))
        grad_lse = None
        if options.get("return_lse"):
            grad_lse = torch.randn(shape.b, shape.h, shape.l, generator=generator, dtype=torch.float64)
            grad_lse = grad_lse.to(torch.promote_types(dtype, torch.float32)).to(device)
            if self.grad_layout != "contiguous":
                grad_lse = grad_lse.mT.contiguous().mT
        return Inputs(q, k, v, options, grad_out, grad_lse)

    def at(self, shape: Shape) -> "InputRecipe":
        """The same recipe for another shape."""
        return dataclasses.replace(self, shape=shape)


def _sizes(shape: Shape) -> list[tuple[int, ...]]:
    return [
        (shape.b, shape.h, shape.l, shape.d),
        (shape.b, shape.hk, shape.s, shape.d),
        (shape.b, shape.hk, shape.s, shape.dv),
    ]


def normal(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal numbers: logits of unit variance."""
    q, k, v = (torch.randn(size, generator=generator, dtype=torch.float64) for size in _sizes(shape))
    return q, k, v


def _along_ones(shape: Shape, generator: torch.Generator, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q near a constant, so that the logit of key j is about logits[j] at the default scale."""
    q, k, v = normal(shape, generator)
    q = 1 + 0.01 * q
    k = 0.01 * k + (logits * shape.d**-0.5)[:, None]
    return q, k, v


def very_negative(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """All logits about -120: an accumulator that starts at zero, or a tail that is not masked, wins."""
    return _along_ones(shape, generator, torch.full((shape.s,), -120.0, dtype=torch.float64))


def very_positive(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """All logits about 120: exp overflows without the running maximum."""
    return _along_ones(shape, generator, torch.full((shape.s,), 120.0, dtype=torch.float64))


def rising(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits rise along the keys: the running maximum moves in every tile, so sums must be rescaled."""
    return _along_ones(shape, generator, torch.linspace(-20, 20, max(shape.s, 1), dtype=torch.float64)[: shape.s])


def falling(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits fall along the keys: the first tile holds the maximum."""
    return _along_ones(shape, generator, torch.linspace(20, -20, max(shape.s, 1), dtype=torch.float64)[: shape.s])


def cliff(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of 100 for the first third of the keys, -100 behind: what follows must not lift the first out."""
    logits = torch.full((shape.s,), -100.0, dtype=torch.float64)
    logits[: (shape.s + 2) // 3] = 100.0
    return _along_ones(shape, generator, logits)


def peaky(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of standard deviation 8: nearly one-hot weights."""
    q, k, v = normal(shape, generator)
    return q * 8, k, v


def constant(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Equal logits: every weight is the same, and so the output is the mean of v."""
    q, k, v = normal(shape, generator)
    return torch.ones_like(q) * 0.5, torch.ones_like(k), v


def overflowing(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Products that overflow fp16 unless the scale, 2^-12, comes first or sums are wide; logits of some units."""
    q, k, v = normal(shape, generator)
    return q * 128, k * 64, v


def lost_in_the_sum(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """v starts with one large row, then small ones: an accumulator in half precision loses them all.

    The columns differ in how small, so that for every size of tile there is one whose tile sum is lost.
    """
    q, k, v = constant(shape, generator)
    small = 2.0 ** -torch.linspace(0, 12, shape.dv, dtype=torch.float64)
    v = small.expand(v.shape).clone()
    v[:, :, :1] = 512.0
    return q, k, v


def _contiguous(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [x.contiguous() for x in (q, k, v)]


def _blhd(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """(b, l, h, d) in memory, seen as (b, h, l, d)."""
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]


def _fused(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Slices of one (b, l, h, d + d + dv) where the shapes allow it, else each a slice of its own."""
    if q.shape[:3] != k.shape[:3]:
        return _padded(q, k, v)
    whole = torch.cat([x.transpose(1, 2) for x in (q, k, v)], dim=-1)
    return [x.transpose(1, 2) for x in whole.split([q.shape[-1], k.shape[-1], v.shape[-1]], dim=-1)]


def _padded(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """A view into storage that holds NaN before, between and after: one read outside is seen."""
    views = []
    for x in (q, k, v):
        storage = x.new_full((x.shape[0], x.shape[1] + 2, x.shape[2] + 5, x.shape[3] + 3), torch.nan)
        view = storage[:, 1:-1, 2:-3, 1:-2]
        view.copy_(x)
        views.append(view)
    return views


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """k and v of one head, seen by all through stride 0."""
    return [q.contiguous(), k[:, :1].contiguous().expand_as(k), v[:, :1].contiguous().expand_as(v)]


def _columns(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Transposed in memory: neighbours along the width are far apart."""
    return [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]


def _strides_differ(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Each of the three lies another way: a kernel that takes one's strides for another's reads nonsense."""
    return [q.contiguous(), _blhd(q, k, v)[1], v.transpose(2, 3).contiguous().transpose(2, 3)]


LAYOUTS = {
    "contiguous": _contiguous,
    "blhd": _blhd,
    "fused": _fused,
    "padded": _padded,
    "expanded": _expanded,
    "columns": _columns,
    "differing": _strides_differ,
}
GRAD_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda g: g.contiguous(),
    "transposed": lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda g: g[:, :, :1, :1].contiguous().expand_as(g) if g.numel() else g,
    "columns": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
}
