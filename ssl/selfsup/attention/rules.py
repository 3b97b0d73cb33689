"""Which keys a query may attend to, and what is added to its score: one meaning for every kernel.

A kernel that works on tiles asks for a tile's rows and columns; `everything` gives the whole matrix.
Query i stands at position p = i + offset, where offset is 0 (aligned at the top left, torch's way) or
s - l (at the bottom right, flash-attention's way since 2.1: the last query sees the last key).
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

CausalAlign = Literal["top_left", "bottom_right"]
Mask = Bool[Tensor, "..."] | Float[Tensor, "..."]
DocumentIds = Num[Tensor, "*b s"]


class Rules(NamedTuple):
    """The options of a call, checked and brought into the form that kernels work with."""

    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    document_ids: Tensor | None
    left: int | None
    """A query at p sees keys from p - left on; None: from the first."""
    right: int | None
    """A query at p sees keys up to p + right; None: up to the last."""
    offset: int
    softcap: float | None

    @property
    def is_plain(self) -> bool:
        """Every query sees every key, and nothing is added."""
        tensors = (self.attn_mask, self.alibi_slopes, self.document_ids)
        return all(t is None for t in tensors) and self.left is None and self.right is None

    def always_sees(self, length: int, keys: int) -> bool:
        """Whether every query surely sees a key, the one at its own place, whatever the values of tensors."""
        ids = self.document_ids
        return (
            self.attn_mask is None
            and length <= keys
            and self.offset in (0, keys - length)
            and (ids is None or not ids.is_floating_point())  # a NaN would not even equal itself
        )

    def everything(self, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`bias` and `allowed` for all queries and keys."""
        rows, cols = slice(0, q.shape[-2]), slice(0, k.shape[-2])
        return self.bias(rows, cols, q.device), self.allowed(rows, cols, q.device)

    def bias(self, rows: slice, cols: slice, device: torch.device) -> Tensor | None:
        """What is added to the (capped) scores of a tile, broadcastable to (*b, h, rows, cols); or None."""
        bias = None
        if self.alibi_slopes is not None:
            distance = (self.positions(rows, device)[:, None] - _range(cols, device)).abs()
            bias = -self.alibi_slopes[..., None, None] * distance  # (*b, h, rows, cols)
        if self.attn_mask is not None and self.attn_mask.dtype != torch.bool:
            mask = cut(self.attn_mask, rows, cols)
            bias = mask if bias is None else bias + mask
        return bias

    def allowed(self, rows: slice, cols: slice, device: torch.device) -> Tensor | None:
        """True where a query may see a key, broadcastable to (*b, h, rows, cols); None: everywhere."""
        parts = []
        if self.left is not None or self.right is not None:
            ahead = _range(cols, device) - self.positions(rows, device)[:, None]  # (rows, cols)
            if self.right is not None:
                parts.append(ahead <= self.right)
            if self.left is not None:
                parts.append(ahead >= -self.left)
        if self.attn_mask is not None:
            mask = cut(self.attn_mask, rows, cols)
            parts.append(mask if mask.dtype == torch.bool else mask != -torch.inf)
        if self.document_ids is not None:
            ids = self.document_ids.unsqueeze(-2)  # (*b, 1, s): the same for all heads
            parts.append(ids[..., rows, None] == ids[..., None, cols])
        if not parts:
            return None
        allowed = parts[0]
        for part in parts[1:]:
            allowed = allowed & part
        return allowed

    def positions(self, rows: slice, device: torch.device) -> Tensor:
        """Where the queries stand among the keys."""
        return _range(rows, device) + self.offset

    def skips(self, rows: slice, cols: slice) -> bool:
        """Whether the band (causal, window) leaves nothing of a tile."""
        first, last = rows.start + self.offset, rows.stop - 1 + self.offset
        too_late = self.right is not None and cols.start > last + self.right
        too_early = self.left is not None and cols.stop - 1 < first - self.left
        return too_late or too_early


def _range(span: slice, device: torch.device) -> Tensor:
    return torch.arange(span.start, span.stop, device=device)


def cut(mask: Tensor, rows: slice, cols: slice) -> Tensor:
    """A tile of a mask that broadcasts to (*b, h, l, s): dimensions of size 1 stay."""
    if mask.dim() >= 2 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return mask[..., cols] if mask.dim() >= 1 and mask.shape[-1] > 1 else mask


def read_rules(
    q: Float[Tensor, "*b h l d"],
    k: Float[Tensor, "*b hk s d"],
    v: Float[Tensor, "*b hk s dv"],
    attn_mask: Mask | None,
    is_causal: bool,
    causal_align: CausalAlign,
    window: tuple[int, int] | None,
    softcap: float | None,
    alibi_slopes: Float[Tensor, "..."] | None,
    document_ids: DocumentIds | None,
    enable_gqa: bool,
) -> Rules:
    """Checks the arguments of an attention call. Raises ValueError naming the argument, and says what to do."""
    heads, length, keys = q.shape[-3], q.shape[-2], k.shape[-2]
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them alike")
    if k.shape[-3] != heads and (not enable_gqa or not k.shape[-3] or heads % k.shape[-3]):
        raise ValueError(
            f"attention heads: {heads} query heads with {k.shape[-3]} key or value heads need "
            f"enable_gqa=True and a whole ratio, got enable_gqa={enable_gqa}"
        )
    if v.shape[-3:-1] != k.shape[-3:-1]:
        raise ValueError(
            f"k, v: expected as many heads and keys in both, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[-1] != k.shape[-1] or q.shape[:-3] != k.shape[:-3]:
        raise ValueError(
            f"q, k: expected one batch and one width in both, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if attn_mask is not None:
        _check_mask(attn_mask, (*q.shape[:-1], keys))
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal: give one of them; write the causal part into attn_mask")
    if causal_align not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_align: expected top_left or bottom_right, got {causal_align!r}")
    if window is not None and (len(window) != 2 or any(int(w) != w or w < -1 for w in window)):
        raise ValueError(f"window: expected (left, right), whole numbers >= 0 or -1 for no bound, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a number > 0 or None, got {softcap}")
    if alibi_slopes is not None and alibi_slopes.shape not in (q.shape[-3:-2], q.shape[:-2]):
        raise ValueError(
            f"alibi_slopes: expected the shape {tuple(q.shape[-3:-2])} or {tuple(q.shape[:-2])}, "
            f"got {tuple(alibi_slopes.shape)}"
        )
    if document_ids is not None and (length != keys or document_ids.shape != (*k.shape[:-3], keys)):
        raise ValueError(
            f"document_ids: expected the shape {(*k.shape[:-3], keys)} and as many queries as keys, "
            f"got {tuple(document_ids.shape)} with {length} queries and {keys} keys"
        )
    left, right = (None if bound < 0 else bound for bound in (window or (-1, -1)))
    return Rules(
        attn_mask,
        alibi_slopes,
        document_ids,
        left,
        0 if is_causal else right,
        keys - length if causal_align == "bottom_right" else 0,
        softcap,
    )


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a mask that is neither bool nor floats, or does not broadcast to (*b, h, l, s)."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"attn_mask: expected bool (True = may attend) or floats to be added, got {mask.dtype}; "
            f"of zeros and ones make a mask with .bool()"
        )
    fits = mask.dim() <= len(shape) and all(n in (1, m) for n, m in zip(mask.shape[::-1], shape[::-1]))
    if not fits:
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {shape}, got {tuple(mask.shape)}")


def refuse(kernel: str, advice: str, **options: object) -> None:
    """Raises ValueError for every option that is set and that the kernel cannot honour, by name."""
    given = [name for name, value in options.items() if value not in (None, False, 0.0)]
    if given:
        raise ValueError(f"{', '.join(given)}: the attention kernel {kernel!r} cannot honour this; take {advice}")
