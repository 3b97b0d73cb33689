"""What a kernel says it can do, how it is found, and how it is called."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from selfsup.attention.dispatch import KERNELS
from selfsup.conformance.inputs import DTYPES, Inputs, Shape
from selfsup.conformance.oracle import Answer

Layout = Literal["BHLD", "BLHD", "THD"]

FEATURES = {
    **{dtype: f"inputs in {dtype}" for dtype in DTYPES},
    "backward": "gradients of q, k, v",
    "cross": "another number of keys than queries",
    "value_dim": "v of another width than q and k",
    "scale": "a scale of one's own: any number, 0 and negative ones included",
    "causal": "is_causal, as many keys as queries",
    "top_left": "is_causal and window aligned at the top left where l != s (causal_align, or by nature)",
    "bottom_right": "the same aligned at the bottom right",
    "gqa": "fewer key heads than query heads: query head i uses key head i // (h / hk)",
    "bool_mask": "attn_mask of bool: True = may attend",
    "float_mask": "attn_mask of floats, added to the scores; -inf forbids",
    "mask_grad": "the gradient of a float mask",
    "wide_mask": "a float mask in fp32 beside q, k, v in half precision",
    "masked_rows": "a row without a key gives exact zeros, in value and gradient",
    "window": "(left, right), both ends inclusive, -1 = no bound",
    "softcap": "softcap * tanh(scores / softcap) before anything is added",
    "alibi": "alibi_slopes (h,) or (b, h) times the distance, taken off the scores",
    "documents": "document_ids (b, s); in THD the segments: a query sees its own only",
    "lse": "return_lse: the natural log of the denominators, -inf for a row without a key",
    "lse_grad": "a right gradient through the log-sum-exp",
    "empty": "no batch entry, no query, or no key: right shapes, zeros",
    "dropout": "dropout_p on the weights, the same mask in the backward pass, new ones at every call",
    "deterministic": "the same bits whenever it is called again, gradients included",
    "linear_memory": "no (l, s) matrix is kept: memory grows with l",
    "compile": "torch.compile(fullgraph=True) gives the same numbers",
    "autocast": "under autocast the output has the autocast type",
}
NEEDS_CLAIM = {"deterministic", "linear_memory", "autocast"}
"""Good to have, not expected of a kernel that does not say so: tried only where claimed."""


class KernelRaised(Exception):
    """The kernel under test raised; the cause is `__cause__`."""


@dataclass(frozen=True)
class Claims:
    """What holds by the kernel's own word. Whatever is not claimed must raise, never return wrong numbers."""

    features: frozenset[str]
    head_dims: Container[int] | None = None
    """Widths of q, k, v that are claimed; None: any."""
    length_multiple: int = 1
    """Numbers of queries and keys that are multiples of this are claimed."""
    declared: bool = True
    """False: found by trying. Then a clean refusal of a shape is no fault, since nothing was said of it."""

    def cover(self, requires: Iterable[str], shape: Shape) -> bool:
        """Whether a case is claimed."""
        widths = self.head_dims is None or (shape.d in self.head_dims and shape.dv in self.head_dims)
        lengths = shape.l % self.length_multiple == 0 == shape.s % self.length_multiple
        return set(requires) <= self.features and widths and lengths


@dataclass(frozen=True)
class Kernel:
    """A callable under test with the way to call it."""

    name: str
    call: Callable[..., Any]
    claims: Claims | None = None
    layout: Layout = "BHLD"
    causal_align: str = "top_left"
    """What is_causal means to it, without an argument, where l != s."""
    accepts: frozenset[str] | None = field(default=None)
    """Its keyword parameters; None: anything."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        """Calls it on (b, h, l, d) tensors, whatever it takes itself. Raises KernelRaised where it raises."""
        try:
            return self.raw(q, k, v, options)
        except (Exception, SystemExit) as error:
            raise KernelRaised(f"{type(error).__name__}: {str(error).strip()[:300]}") from error

    def raw(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        """The same call with the kernel's own exceptions."""
        options = self._spoken(options, q.shape[-2] == k.shape[-2])
        if self.layout == "BHLD":
            return self.call(q, k, v, **options)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        result = self.call(q, k, v, **options) if self.layout == "BLHD" else self._packed(q, k, v, options)
        out, lse = read(result, bool(options.get("return_lse")))
        return out.transpose(1, 2) if lse is None else (out.transpose(1, 2), lse)

    def _spoken(self, options: dict[str, Any], square: bool) -> dict[str, Any]:
        """The options as this kernel wants to hear them: only what differs from SDPA's defaults."""
        options = dict(options)
        asked = options.pop("causal_align", "top_left")
        if asked != self.causal_align and not square and (options.get("is_causal") or options.get("window")):
            options["causal_align"] = asked
        if self.accepts is not None and "enable_gqa" not in self.accepts:
            options.pop("enable_gqa", None)  # it tells from the shapes, or raises
        return options

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        """(b, l, h, d) as (t, h, d) with cumulative lengths, as flash-attention's varlen functions take it."""
        (b, length), keys = q.shape[:2], k.shape[1]
        ids = options.pop("document_ids", None)
        ends_q, ends_k = (torch.arange(b + 1) * n for n in (length, keys))
        if ids is not None:
            ends = segment_ends(ids)
            ends_q = ends_k = torch.cat([ends[:1], ends])  # and an empty segment, which is one too
        offsets = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k}
        longest = {f"max_seqlen_{n[-1]}": int(ends.diff().max()) if len(ends) > 1 else 0 for n, ends in offsets.items()}
        if self.accepts is not None:
            options |= {n: size for n, size in longest.items() if n in self.accepts}
        offsets = {n: ends.to(device=q.device, dtype=torch.int32) for n, ends in offsets.items()}
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        out, lse = read(self.call(*flat, **offsets, **options), bool(options.get("return_lse")))
        out = out.reshape(b, length, *out.shape[1:])
        return out if lse is None else (out, lse.reshape(-1, b, length).transpose(0, 1))  # lse: (h, t)

    def answer(self, inputs: Inputs, gradients: bool = True) -> Answer:
        """Outputs and gradients. Raises KernelRaised where the kernel does, forward or backward."""
        q, k, v = (x.detach().requires_grad_(gradients) for x in (inputs.q, inputs.k, inputs.v))
        options = dict(inputs.options)
        mask, leaves = options.get("attn_mask"), [q, k, v]
        if mask is not None and mask.requires_grad and gradients:
            options["attn_mask"] = mask = mask.detach().requires_grad_()
            leaves.append(mask)
        with torch.set_grad_enabled(gradients):
            out, lse = self.outputs(q, k, v, options)
        if not gradients:
            return Answer(out, lse)
        outputs, grads = [out], [inputs.grad_out]
        if lse is not None:
            if not lse.requires_grad:
                raise KernelRaised("the log-sum-exp carries no gradient")
            outputs, grads = [out, lse], [inputs.grad_out, inputs.grad_lse.to(lse.dtype)]
        wanted = gradients_of(outputs, leaves, grads)
        return Answer(out.detach(), None if lse is None else lse.detach(), *wanted)

    def outputs(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The output, and the log-sum-exp where it is asked for. Raises KernelRaised."""
        try:
            return read(self(q, k, v, options), bool(options.get("return_lse")))
        except TypeError as error:
            raise KernelRaised(str(error)) from error


def read(result: Any, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The output and, where asked for, the log-sum-exp behind it; what else came is let go. Raises TypeError."""
    parts = result if isinstance(result, tuple | list) else (result,)
    if not parts or not isinstance(parts[0], Tensor):
        raise TypeError(f"expected a tensor, or a tuple that begins with one; {type(result).__name__} came back")
    if return_lse and (len(parts) < 2 or not isinstance(parts[1], Tensor)):
        raise TypeError("return_lse: no log-sum-exp came back")
    return parts[0], parts[1] if return_lse else None


def gradients_of(
    outputs: list[Tensor], leaves: list[Tensor], grads: list[Tensor], retain_graph: bool = False
) -> list[Tensor | None]:
    """torch.autograd.grad; None for a leaf that the outputs are cut off from. Raises KernelRaised."""
    try:
        found = torch.autograd.grad(outputs, leaves, grads, retain_graph=retain_graph, allow_unused=True)
    except Exception as error:
        raise KernelRaised(f"backward: {type(error).__name__}: {str(error).strip()[:300]}") from error
    return [torch.zeros_like(x) if g is None and not x.numel() else g for x, g in zip(leaves, found)]


def segment_ends(ids: Tensor) -> Tensor:
    """Cumulative lengths of the runs of equal ids in (b, s), the batch entries one after another."""
    b, keys = ids.shape
    starts = torch.ones(b, keys, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([b * keys])])


def attention_kernel(
    *features: str,
    head_dims: Container[int] | None = None,
    length_multiple: int = 1,
    layout: Layout = "BHLD",
    causal_align: str = "top_left",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: declares what a kernel claims. Raises ValueError for an unknown feature.

    @attention_kernel("fp32", "bf16", "backward", "causal", head_dims=range(16, 129, 8))
    def mine(q, k, v, is_causal=False, scale=None): ...
    """
    claims = Claims(read_features(features), head_dims, length_multiple)

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        function.attention_claims = (claims, layout, causal_align)
        return function

    return declare


def read_features(names: Iterable[str]) -> frozenset[str]:
    """Raises ValueError naming the first unknown feature and all that there are."""
    for name in names:
        if name not in FEATURES:
            raise ValueError(f"feature: expected some of {', '.join(FEATURES)}; got {name!r}")
    return frozenset(names)


_ALL = frozenset(FEATURES)
OURS = {
    "reference": Claims(_ALL - {"linear_memory"}),
    "tiled": Claims(_ALL - {"dropout"}),
    "torch": Claims(_ALL - {"softcap", "lse", "lse_grad", "linear_memory"}),
    "flex": Claims(
        _ALL - {"dropout", "linear_memory", "backward", "mask_grad", "lse_grad", "compile", "empty"}
    ),
    "auto": Claims(_ALL - {"linear_memory"}),
}
"""What our own kernels claim on a CPU."""


class Target(NamedTuple):
    """What the command line names, still to be loaded: only a worker process runs foreign code."""

    name: str
    layout: Layout | None = None
    features: tuple[str, ...] | None = None

    def load(self) -> Kernel:
        """Finds it: one of ours, `module:function` or `file.py:function`. Raises ValueError where it is not."""
        if self.name in KERNELS:
            kernel = Kernel(self.name, KERNELS[self.name], OURS[self.name])
        else:
            function = _find(self.name)
            claims, layout, align = getattr(function, "attention_claims", (None, "BHLD", "top_left"))
            kernel = Kernel(self.name, function, claims, layout, align, _keywords(function))
        if self.layout is not None:
            kernel = replace(kernel, layout=self.layout)
        if self.features is not None:
            said = kernel.claims or Claims(frozenset())
            kernel = replace(kernel, claims=replace(said, features=read_features(self.features)))
        return kernel


def _find(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.rpartition(":")
    if not module_name:
        raise ValueError(
            f"{name}: expected one of {', '.join(KERNELS)}, module:function, or file.py:function"
        )
    try:
        is_file = module_name.endswith(".py")
        module = load_file(Path(module_name)) if is_file else importlib.import_module(module_name)
    except (ImportError, SystemExit) as error:
        raise ValueError(f"{module_name}: cannot be imported: {type(error).__name__} {error}") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{name}: {module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{name}: expected a function, got {type(found).__name__}")
    return found


def load_file(path: Path) -> ModuleType:
    """Runs a Python file as a module; its folder can be imported from. Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # Triton looks the source up by the module's name
    spec.loader.exec_module(module)
    return module


def _keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """The names a function takes; None where it does not tell, or takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)
