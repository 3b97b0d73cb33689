"""Every pair of options, since kernels forget one for the other: window under grouped heads, causal with a soft cap."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from selfsup.conformance.inputs import Shape
from selfsup.conformance.masks import bool_mask, float_mask, segments, slopes


class Pair(NamedTuple):
    """Two options in one call."""

    id: str
    shape: Shape
    options: dict[str, Any]
    extra: tuple[str, ...]


class _Part(NamedTuple):
    sizes: Mapping[str, int] = {}
    options: Mapping[str, Any] = {}
    extra: tuple[str, ...] = ()


_PARTS = {
    "gqa": _Part({"h": 4, "hk": 2}),
    "width": _Part({"d": 64, "dv": 64}),
    "values": _Part({"dv": 8}),
    "top-left": _Part({"l": 37}, {"is_causal": True}),
    "bottom-right": _Part({"l": 37}, {"is_causal": True, "causal_align": "bottom_right"}),
    "window": _Part({"l": 37}, {"window": (9, 4)}),
    "bool-mask": _Part({}, {"attn_mask": bool_mask("b", "h", "l", "s")}, ("bool_mask",)),
    "float-mask": _Part({}, {"attn_mask": float_mask("b", "h", "l", "s")}, ("float_mask",)),
    "softcap": _Part({}, {"softcap": 1.5}),
    "alibi": _Part({"l": 37}, {"alibi_slopes": slopes("h")}),
    "documents": _Part({"l": 67}, {"document_ids": segments(20, 30)}),
    "lse": _Part({}, {"return_lse": True}),
    "scale": _Part({}, {"scale": 0.6}),
}


def pairs() -> list[Pair]:
    """All that can be asked for together: one length, one mask, and no mask beside is_causal."""
    found = []
    for (a, first), (b, second) in itertools.combinations(_PARTS.items(), 2):
        both = [first, second]
        keys = [key for part in both for key in (*part.sizes, *part.options)]
        if any(keys.count(k) > 1 and k != "l" for k in keys) or {"attn_mask", "is_causal"} <= set(keys):
            continue
        sizes = {"b": 2, "h": 2, "hk": 2, "l": 37, "s": 67, "d": 16, "dv": 16}
        for part in both:
            sizes |= part.sizes
        if "documents" in (a, b):
            sizes["l"] = 67  # as many queries as keys
        options = {k: v for part in both for k, v in part.options.items()}
        found.append(Pair(f"{a}+{b}", Shape(**sizes), options, first.extra + second.extra))
    return found
