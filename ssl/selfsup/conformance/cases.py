"""The cases, as data. Each names the bugs of real kernels that it descends from.

Levels: core is the forward pass, train the gradients, full whatever else a kernel is trusted with.
"""

from typing import Any

from selfsup.conformance import expectations as expect
from selfsup.conformance import inputs as draws
from selfsup.conformance import properties
from selfsup.conformance.case import LEVELS, Case, Level, needs
from selfsup.conformance.combinations import pairs
from selfsup.conformance.inputs import InputRecipe, Shape
from selfsup.conformance.masks import (
    as_infinities,
    bool_mask,
    first_keys_hidden,
    float_mask,
    in_fp32,
    laid_out,
    last_keys_hidden,
    lowest,
    padding,
    returning,
    rows_without_keys,
    segments,
    slopes,
)


def cases(level: Level) -> list[Case]:
    """All cases up to a level."""
    kept = LEVELS[: LEVELS.index(level) + 1]
    return [case for case in ALL if case.level in kept]


ALL: list[Case] = []
USUAL = Shape()


def _add(
    id: str,
    cites: str,
    *extra: str,
    shape: Shape = USUAL,
    dtypes: tuple[str, ...] = ("fp32",),
    draw: draws.Draw = draws.normal,
    layout: str = "contiguous",
    grad_layout: str = "contiguous",
    forward: Level | None = "core",
    backward: Level | None = "train",
    **options: Any,
) -> None:
    """A case against the float64 loop, forward, and once more with gradients, for each dtype."""
    for dtype in dtypes:
        recipe = InputRecipe(shape, dtype, draw, options, layout, grad_layout)
        if forward is not None:
            used = frozenset(needs(recipe, False) | set(extra) - {"mask_grad"})
            ALL.append(Case(f"{id}-{dtype}", forward, used, recipe, expect.forward, cites))
        if backward is not None:
            used = frozenset(needs(recipe, True) | set(extra))
            ALL.append(Case(f"{id}-{dtype}-grad", backward, used, recipe, expect.gradients, cites))


def _check(
    id: str,
    cites: str,
    *extra: str,
    expected: expect.Expectation,
    level: Level = "full",
    gradients: bool = False,
    shape: Shape = USUAL,
    dtype: str = "fp32",
    draw: draws.Draw = draws.normal,
    **options: Any,
) -> None:
    """A case with an expectation of its own."""
    recipe = InputRecipe(shape, dtype, draw, options)
    ALL.append(Case(id, level, frozenset(needs(recipe, gradients) | set(extra)), recipe, expected, cites))


def square(n: int, **sizes: int) -> Shape:
    """As many keys as queries."""
    return Shape(l=n, s=n, **sizes)


def width(d: int, **sizes: int) -> Shape:
    """q, k and v of one width."""
    return Shape(d=d, dv=d, **sizes)


HALF = ("fp32", "bf16")
THREE = ("fp32", "bf16", "fp16")

# Tails of tiles
for n in (1, 2, 3, 15, 17, 31, 33, 63, 64, 65, 97, 127, 129, 197):
    _add(f"tail/{n}", "FA#443 (NaN dQ), pytorch#153799, pytorch#159247", shape=square(n))
for n in (33, 65, 129):
    _add(f"tail/{n}", "pytorch#191937", shape=square(n), dtypes=("bf16", "fp16"))
for rows, keys in ((1, 197), (197, 1), (33, 97), (129, 65), (16, 130), (65, 64)):
    _add(f"tail/{rows}x{keys}", "pytorch#153799, pytorch#191937 (s % 32 == 1)", shape=Shape(l=rows, s=keys))
_add("tail/batches", "batch and head strides mixed up", shape=Shape(b=3, h=5, hk=5, l=17, s=35))
_add("tail/long", "rounding that grows with the row", shape=Shape(b=1, h=1, hk=1, l=70, s=1103), dtypes=HALF,
     forward="train", backward="full")  # fmt: skip

# Logits far from zero
for name, draw in (("very-negative", draws.very_negative), ("very-positive", draws.very_positive),
                   ("rising", draws.rising), ("falling", draws.falling), ("cliff", draws.cliff),
                   ("constant", draws.constant)):  # fmt: skip
    cites = "pytorch#196678 (cuDNN NaN dQ), cudnn-frontend#1072" if name == "very-negative" else "pytorch#119320"
    _add(f"logits/{name}", cites, shape=Shape(l=67, s=75), draw=draw, dtypes=HALF)
    _add(f"logits/{name}-tiles", cites, shape=Shape(b=1, l=17, s=192 + 64), draw=draw)
_add("logits/overflowing", "the scale after the product, in half precision", shape=square(35), draw=draws.overflowing,
     dtypes=("fp16", "bf16"), scale=2.0**-12)  # fmt: skip
_add("logits/peaky", "pytorch#125674", shape=square(75), draw=draws.peaky, dtypes=HALF)
for dtype in ("fp16", "bf16"):
    _check(f"absolute/accumulator-{dtype}", "sums kept in half precision", expected=expect.absolute, level="core",
           dtype=dtype, draw=draws.lost_in_the_sum, shape=Shape(1, 1, 1, 2, 1100, 16, 16))  # fmt: skip

    _check(f"absolute/long-{dtype}", "sums kept in half precision", expected=expect.absolute, level="train",
           dtype=dtype, draw=draws.lost_in_the_sum, shape=Shape(1, 1, 1, 4, 8192, 16, 16))  # fmt: skip

# Widths
for d in (1, 8, 16, 40, 59, 64, 72, 80, 96, 111, 128, 160, 192, 256):
    _add(f"width/{d}", "FA#2541 (d = 256: dV), NSA-triton#27 (unmasked tail of d)", shape=width(d, h=1, hk=1, l=35, s=35))
for d, dv in ((64, 32), (16, 48), (40, 59)):
    _add(f"width/{d}-{dv}", "v takes its width from k", shape=Shape(h=1, hk=1, d=d, dv=dv))
_add("width/scale", "the default scale from the padded width", shape=width(40, l=65, s=65), dtypes=HALF)

# Scale
for scale in (0.37, 0.0, -0.5, 3.0):
    _add(f"scale/{scale:g}", "scale ignored in the backward pass", shape=square(35), scale=scale)
_add("scale/half", "scale ignored in the backward pass", shape=square(65), dtypes=("bf16", "fp16"), scale=0.37)

# Causal
for n in (1, 17, 64, 65, 130):
    _add(f"causal/{n}", "off by one, forward and backward apart", shape=square(n), is_causal=True)
_add("causal/half", "off by one", shape=square(65), dtypes=("bf16", "fp16"), is_causal=True)
for rows, keys in ((33, 97), (97, 33), (1, 40), (64, 80), (33, 41)):
    for align in ("top_left", "bottom_right"):
        extra = ("masked_rows",) if align == "bottom_right" and rows > keys else ()
        _add(f"causal/{rows}x{keys}-{align}", "FA#951, FA#282, FA#1778, pytorch#110144", *extra,
             shape=Shape(l=rows, s=keys), is_causal=True, causal_align=align)  # fmt: skip

# Masks
for dims in (("l", "s"), ("b", "h", "l", "s"), ("1", "1", "1", "s"), ("b", "1", "1", "s"), ("b", "1", "l", "s"),
             ("1", "h", "l", "s")):  # fmt: skip
    name = "".join(dims)
    _add(f"mask/bool-{name}", "the mask's batch or head ignored", "bool_mask", shape=Shape(b=2, l=35, s=67),
         attn_mask=bool_mask(*dims))  # fmt: skip
    _add(f"mask/float-{name}", "the mask's batch or head ignored", "float_mask", shape=Shape(b=2, l=35, s=67),
         attn_mask=float_mask(*dims), backward=None)  # fmt: skip
    _add(f"mask/grad-{name}", "pytorch#148476 (gradient of the mask)", "float_mask", "mask_grad", forward=None,
         shape=Shape(b=2, l=35, s=67), attn_mask=float_mask(*dims, grad=True))  # fmt: skip
_add("mask/half", "mask added in another precision", "float_mask", shape=Shape(b=2, l=35, s=67),
     dtypes=("bf16", "fp16"), attn_mask=float_mask("b", "1", "l", "s"))  # fmt: skip
_add("mask/wide", "a mask of fp32 ignored or read as fp16", "float_mask", "wide_mask", shape=Shape(b=2, l=35, s=67),
     dtypes=("bf16", "fp16"), attn_mask=in_fp32(float_mask("b", "1", "l", "s")))  # fmt: skip
_add("mask/lowest", "a finite lowest number taken for -inf", "float_mask", attn_mask=lowest, shape=Shape(b=2, s=67))

# Rows without a key
for name, mask in (("rows", rows_without_keys), ("first-keys", first_keys_hidden)):
    extra = ("masked_rows",) if name == "rows" else ()
    cites = "pytorch#131060, pytorch#133882, iree#24175, mlx#2395"
    _add(f"masked/{name}-bool", cites, "bool_mask", *extra, shape=Shape(l=35, s=131), attn_mask=mask)
    _add(f"masked/{name}-float", cites, "float_mask", *extra, shape=Shape(l=35, s=131),
         attn_mask=as_infinities(mask))  # fmt: skip
    _add(f"masked/{name}-grad", cites, "float_mask", "mask_grad", *extra, shape=Shape(l=35, s=131), forward=None,
         attn_mask=as_infinities(mask, grad=True))  # fmt: skip
_add("masked/half", "FA#1778", "bool_mask", "masked_rows", dtypes=("bf16", "fp16"), attn_mask=rows_without_keys)

_add("masked/padding", "FA#1778: whole rows of padding", "bool_mask", "masked_rows", shape=Shape(b=3, l=35, s=35),
     attn_mask=padding)  # fmt: skip

# More than one tile of the largest usual size
_LONG = Shape(1, 1, 1, 300, 410, 16, 16)
_add("tiles/plain", "sums over tiles", shape=_LONG, dtypes=THREE)
for name, draw in (("rising", draws.rising), ("falling", draws.falling), ("cliff", draws.cliff)):
    _add(f"tiles/{name}", "the running maximum and the rescaling", shape=_LONG, draw=draw)
for align in ("top_left", "bottom_right"):
    _add(f"tiles/causal-{align}", "tiles skipped that are needed", shape=_LONG, is_causal=True, causal_align=align)
    for window in ((40, 1), (256, 0), (0, 256), (300, 3)):
        _add(f"tiles/window-{window[0]}.{window[1]}-{align}", "tiles skipped that are needed", shape=_LONG,
             window=window, causal_align=align)  # fmt: skip
for window in ((40, 1), (1, 40)):  # with as many keys as queries the ends fall on the borders of tiles
    _add(f"tiles/window-{window[0]}.{window[1]}", "tiles skipped that are needed", shape=Shape(1, 1, 1, 300, 300, 16, 16),
         window=window)  # fmt: skip
_add("tiles/first-keys", "iree#24175: whole tiles without a key", "bool_mask", shape=_LONG, attn_mask=first_keys_hidden)
_add("tiles/last-keys", "the last tile without a key", "bool_mask", shape=_LONG, attn_mask=last_keys_hidden,
     return_lse=True)  # fmt: skip
_add("tiles/mask-grad", "the mask's gradient summed over tiles", "float_mask", "mask_grad", forward=None,
     shape=_LONG, attn_mask=float_mask("1", "1", "1", "s", grad=True))  # fmt: skip

for align in ("top_left", "bottom_right"):  # few queries, many keys: kernels split the keys there
    _add(f"tiles/split-{align}", "split keys forget causality", shape=Shape(1, 4, 2, 4, 1500, 16, 16), is_causal=True,
         causal_align=align)  # fmt: skip
_add("tiles/split-mask", "split keys forget the mask", "bool_mask", shape=Shape(2, 2, 2, 3, 1500, 16, 16),
     attn_mask=bool_mask("b", "1", "1", "s"))  # fmt: skip

# Two options at a time
for pair in pairs():
    _add(f"pairs/{pair.id}", "two options that forget each other", *pair.extra, shape=pair.shape, forward="train",
         **pair.options)  # fmt: skip

# Memory
for layout in ("blhd", "fused", "padded", "expanded", "columns", "differing"):
    _add(f"strides/{layout}", "FA#2665, FlagGems#5896, xFormers test_nans_in_padding, pytorch#191937",
         shape=Shape(b=2, h=3, hk=3, l=35, s=35), layout=layout)  # fmt: skip
for layout in ("transposed", "expanded", "columns"):
    _add(f"strides/grad-{layout}", "FA#355, FA#2611", shape=Shape(b=2, h=3, hk=3, l=35, s=35),
         grad_layout=layout, forward=None)  # fmt: skip
for layout in ("transposed", "expanded"):
    _add(f"strides/mask-{layout}", "a mask taken for contiguous", "bool_mask", shape=Shape(b=2, h=3, hk=3, l=19, s=35),
         attn_mask=laid_out(bool_mask("b", "1", "l", "s"), layout))  # fmt: skip
_add("strides/cross", "FA#2665", shape=Shape(b=2, h=4, hk=2, l=19, s=41), layout="padded", grad_layout="columns")
_check("strides/uninitialised", "torch.empty taken for zeros", expected=expect.uninitialised, level="core")
_check("strides/uninitialised-grad", "torch.empty taken for zeros", expected=expect.uninitialised_gradients,
       level="train", gradients=True, shape=square(67))  # fmt: skip

# Grouped heads
for h, hk in ((2, 1), (6, 2), (8, 1), (8, 4)):
    _add(f"gqa/{h}-{hk}", "pytorch#193893 (silent), NSA-triton#27: h % hk, dK of one head only",
         shape=Shape(b=2, h=h, hk=hk, l=19, s=35))  # fmt: skip
_add("gqa/causal", "pytorch#193893", shape=square(65, h=4, hk=2), is_causal=True)
_add("gqa/half", "dK and dV summed in half precision", shape=square(65, h=8, hk=2), dtypes=("bf16", "fp16"))

# Log-sum-exp
_add("lse/plain", "FA#1817 (gradient silently zero)", shape=Shape(l=35, s=67), return_lse=True, dtypes=HALF)
_add("lse/causal", "FA#1817", shape=square(65), return_lse=True, is_causal=True)
_add("lse/scale", "log to the base 2 handed out", shape=square(35), return_lse=True, scale=2.5)
_add("lse/masked", "FA PR#978 (+inf), flashinfer#4452 (finite)", "masked_rows", shape=Shape(l=65, s=33),
     return_lse=True, is_causal=True, causal_align="bottom_right")  # fmt: skip
_add("lse/grad-strides", "a gradient of the log-sum-exp that is not contiguous", forward=None, return_lse=True,
     shape=Shape(b=2, h=3, hk=3, l=19, s=35), grad_layout="columns")  # fmt: skip
_add("lse/gqa", "heads of the log-sum-exp", shape=Shape(h=4, hk=2, l=19, s=35), return_lse=True)

# Windows, soft cap, ALiBi, documents
for left, right in ((8, 0), (0, 8), (0, 0), (16, 16), (5, -1), (-1, 5), (200, 200), (63, 64)):
    _add(f"window/{left}.{right}", "zml#763, TE#3391: ends are inclusive", shape=square(97), window=(left, right))
for align in ("top_left", "bottom_right"):
    _add(f"window/33x97-{align}", "TE#3391", "masked_rows", shape=Shape(l=33, s=97), window=(6, 3), causal_align=align)
    _add(f"window/97x33-{align}", "TE#3391", "masked_rows", shape=Shape(l=97, s=33), window=(6, 3), causal_align=align)
_add("window/causal", "the window opens what causality closes", shape=square(97), window=(20, 20), is_causal=True)
for cap in (0.5, 5.0, 50.0):
    _add(f"softcap/{cap:g}", "FA#2466; derivative of tanh forgotten", shape=square(35), softcap=cap)
_add("softcap/half", "tanh in half precision", shape=square(65), softcap=5.0, dtypes=("bf16",))
_add("softcap/causal", "-inf through tanh is a number", shape=square(65), softcap=5.0, is_causal=True)
_add("softcap/mask-grad", "derivative of tanh in the mask's gradient", "float_mask", "mask_grad", forward=None,
     shape=square(35), softcap=2.0, attn_mask=float_mask("l", "s", grad=True))  # fmt: skip
_add("alibi/heads", "slopes of one head for all", shape=square(65, h=4, hk=4), alibi_slopes=slopes("h"))
_add("alibi/batch", "slopes of one batch entry for all", shape=square(33, b=3), alibi_slopes=slopes("b", "h"))
_add("alibi/causal", "distance from the wrong corner", shape=Shape(l=33, s=65), alibi_slopes=slopes("h"), is_causal=True,
     causal_align="bottom_right")  # fmt: skip
_add("alibi/softcap", "ALiBi inside the tanh", shape=square(65), alibi_slopes=slopes("h"), softcap=2.0)
for name, lengths in (("three", (10, 23)), ("single-tokens", (1, 1, 5, 1)), ("tiles", (64, 1, 63)), ("one", (500,))):
    _add(f"documents/{name}", "FA#2562, tilelang#2461: leaks between segments", shape=square(131, b=2),
         document_ids=segments(*lengths))  # fmt: skip
_add("documents/returning", "documents taken for runs", shape=square(70, b=2), document_ids=returning)
_add("documents/causal", "FA#2562", shape=square(131, h=4, hk=2), document_ids=segments(50, 31), is_causal=True)

# Nothing to attend to
for name, shape in (("batch", Shape(b=0)), ("queries", Shape(l=0)), ("keys", Shape(s=0))):
    extra = ("empty", "masked_rows") if name == "keys" else ("empty",)
    _add(f"empty/{name}", "FA#1537, FA#2562, FA PR#2421", *extra, shape=shape)
_add("empty/lse", "FA4: -inf", "empty", "masked_rows", shape=Shape(s=0), return_lse=True)

# Double precision
_add("double/plain", "float64 computed in float32", shape=square(35), dtypes=("fp64",))
_add("double/causal", "float64 computed in float32", shape=Shape(l=33, s=65), dtypes=("fp64",), is_causal=True)

# Large sizes that a 16-bit or 32-bit index breaks
_add("large/heads", "xFormers#719, FA PR#1500: a grid axis ends at 65,535", forward="full", backward="full",
     shape=Shape(8200, 8, 8, 1, 2, 8, 8))  # fmt: skip
_add("large/keys", "pytorch#187227", forward="full", backward="full", shape=Shape(1, 1, 1, 2, 65_600, 8, 8))
_add("large/queries", "pytorch#187227", forward="full", backward="full", shape=Shape(1, 1, 1, 65_600, 2, 8, 8))

# Calls that are no plain call
_check("calls/again", "FA#359: state kept between calls", expected=expect.other_inputs_between, level="core")
_check("calls/backward-twice", "a graph that is used up", expected=expect.backward_twice, level="train", gradients=True)
_check("calls/subsets", "pytorch#148476", expected=expect.gradient_subsets, level="train", gradients=True)
_check("calls/subsets-mask", "pytorch#148476", "float_mask", "mask_grad", expected=expect.gradient_subsets,
       gradients=True, level="train", attn_mask=float_mask("l", "s", grad=True))  # fmt: skip
_check("calls/deterministic", "FA#1897, FA PR#2481", "deterministic", expected=expect.deterministic, gradients=True,
       shape=Shape(b=2, h=4, hk=4, l=130, s=130))  # fmt: skip
_check("calls/mask-and-causal", "one of the two is dropped", "bool_mask", expected=expect.forward_or_refused,
       attn_mask=bool_mask("l", "s"), is_causal=True)  # fmt: skip
_check("calls/mixed-dtypes", "triton#5895: k read as another type", expected=expect.mixed_dtypes)
_check("calls/head-counts", "h % hk on heads that do not divide", expected=expect.head_counts_raise)
_check("calls/second-derivative", "pytorch#116350: silently zero", expected=expect.second_derivative, gradients=True,
       shape=Shape(1, 1, 1, 5, 7, 4, 4))  # fmt: skip
_check("calls/checkpoint", "state outside of autograd's sight", expected=expect.under_checkpoint, gradients=True)
_check("calls/compile", "pytorch#146848, #133671", "compile", expected=expect.under_compile, gradients=True)
_check("calls/compile-dynamic", "shapes baked in", "compile", expected=expect.under_compile_dynamic)
_check("calls/autocast", "triton#8654", "autocast", "bf16", expected=expect.under_autocast, gradients=True)
_check("calls/vmap", "a batch rule that mixes entries", expected=expect.under_vmap)
_check("calls/jvp", "forward mode silently zero", expected=expect.under_jvp)
_check("calls/opcheck", "a fake that lies about shapes or strides", expected=expect.opcheck, gradients=True)
_check("calls/memory", "an (l, s) matrix after all", "linear_memory", expected=expect.linear_memory, gradients=True,
       shape=Shape(1, 1, 1, 8192, 8192, 32, 32))  # fmt: skip

# Dropout
_check("dropout/share", "probability off", "dropout", expected=properties.dropout_share, level="train")
_check("dropout/backward", "pytorch#197563: another mask in the backward pass", "dropout", gradients=True,
       expected=properties.dropout_backward, level="train", shape=square(67))  # fmt: skip
_check("dropout/seeds", "FA#2088: a constant seed", "dropout", expected=properties.dropout_seeds, level="train")

# Properties that need no oracle, over drawn shapes
for name, extra in properties.NEEDS.items():
    _check(f"property/{name}", "holds of attention, whatever the numbers", *extra, gradients="backward" in extra,
           expected=getattr(properties, name.replace("-", "_")))  # fmt: skip
