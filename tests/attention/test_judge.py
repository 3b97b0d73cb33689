"""The oracle against float64 autograd, and the rule: what it lets through, and the loopholes that it closes."""

from dataclasses import replace

import pytest
import torch

from selfsup.conformance.cases import ALL, LEVELS, cases
from selfsup.conformance.claims import FEATURES, Claims, Kernel
from selfsup.conformance.inputs import DTYPES, InputRecipe, Shape, normal
from selfsup.conformance.judge import TENSORS, judge, judge_call
from selfsup.conformance.oracle import plain, truth, visible


def faults(inputs, answer):
    return {f.tensor: f.fault for f in judge(inputs, answer) if f.fault}


@pytest.mark.parametrize("case", [c for c in ALL if c.id.endswith("-fp64-grad")], ids=lambda c: c.id)
def test_the_loop_equals_float64_autograd(case):
    inputs = case.make_inputs(0)
    right, other = truth(inputs), plain(inputs)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.allclose(getattr(right, name), getattr(other, name), atol=1e-13), name


@pytest.mark.parametrize(
    "case", [c for c in ALL if c.id.endswith("-fp32-grad") and 0 < c.cost <= 20_000], ids=lambda c: c.id
)
def test_every_case_in_float64(case):
    """The loop against explicit operations with autograd, in float64, for every option of the suite."""
    inputs = replace(case.make_inputs, dtype="fp64")(1)
    right, other = truth(inputs), plain(inputs)
    for name in TENSORS:
        r, o = getattr(right, name), getattr(other, name)
        assert (r is None) == (o is None), name
        if r is not None:
            finite = r.isfinite()
            assert torch.equal(finite, o.isfinite()), name
            scale = max(1.0, float(r[finite].abs().max()))
            assert torch.allclose(r[finite], o[finite].double(), rtol=0, atol=1e-11 * scale), name


def test_the_loop_equals_torch():
    """And against torch's own attention, which shares nothing with either."""
    inputs = InputRecipe(Shape(2, 4, 2, 9, 13, 8, 8), "fp64", options={"scale": 0.3, "is_causal": True})(0)
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    right = truth(inputs)
    assert torch.allclose(right.out, out, atol=1e-14)
    for x, y in zip(torch.autograd.grad(out, (q, k, v), inputs.grad_out), (right.dq, right.dk, right.dv)):
        assert torch.allclose(x, y, atol=1e-13)


def test_the_loop_equals_finite_differences():
    """The gradient of the log-sum-exp, the soft cap and a mask, one nudge at a time."""
    options = {"softcap": 1.5, "return_lse": True, "attn_mask": lambda s, g: torch.randn(s.l, s.s, generator=g).double()}
    inputs = InputRecipe(Shape(1, 1, 1, 3, 4, 2, 2), "fp64", options=options)(0)
    inputs.options["attn_mask"].requires_grad_()
    right = truth(inputs)

    def loss(inputs):
        answer = truth(inputs, gradients=False)
        return float((answer.out * inputs.grad_out).sum() + (answer.lse * inputs.grad_lse).sum())

    for name, at in (("q", (0, 0, 2, 1)), ("k", (0, 0, 3, 0)), ("v", (0, 0, 1, 1)), ("attn_mask", (2, 3))):
        values = []
        for step in (1e-6, -1e-6):
            moved = (inputs.options[name] if name == "attn_mask" else getattr(inputs, name)).detach().clone()
            moved[at] += step
            other = inputs._replace(options={**inputs.options, name: moved}) if name == "attn_mask" else (
                inputs._replace(**{name: moved}))  # fmt: skip
            values.append(loss(other))
        grad = right.dmask if name == "attn_mask" else getattr(right, f"d{name}")
        assert float(grad[at]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_run_and_the_truth_pass(dtype):
    inputs = InputRecipe(Shape(l=33, s=50), dtype)(0)
    assert faults(inputs, plain(inputs)) == {}
    right = truth(inputs)
    rounded = right._replace(**{n: getattr(right, n).to(DTYPES[dtype]) for n in ("out", "dq", "dk", "dv")})
    assert faults(inputs, rounded) == {}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [Shape(l=33, s=50), Shape(2, 4, 4, 128, 128, 64, 64)], ids=["small", "large"])
def test_known_loopholes_are_closed(dtype, shape):
    """What the rules of well-known suites let pass (facts measured on them): each is rejected."""
    inputs = InputRecipe(shape, dtype)(0)
    good = plain(inputs)
    mean = inputs.v.mean(2, keepdim=True).expand_as(good.out)
    wrong = {
        "out": [mean, good.out * 0, -good.out, good.out * 1.1],
        "dq": [good.dq * 0, -good.dq, good.dq * 2],
        "dk": [good.dk * 0, -good.dk, good.dk * 2],
        "dv": [good.dv * 0, -good.dv, good.dv * 1.1],
    }
    for name, values in wrong.items():
        for value in values:
            assert set(faults(inputs, good._replace(**{name: value}))) == {name}


def test_mean_of_v_on_uniform_inputs_is_rejected():
    """The benchmark whose tolerance of 1e-2 lets mean(v) pass: uniform numbers, fp16. (In bf16 such inputs
    give a mean within rounding of the truth: no rule can tell; the suite draws normal ones.)"""

    def uniform(shape, generator):
        return tuple(x.sigmoid() for x in normal(shape, generator))

    inputs = InputRecipe(Shape(1, 2, 2, 256, 256, 64, 64), "fp16", draw=uniform)(0)
    good = plain(inputs, gradients=False)
    mean = inputs.v.mean(2, keepdim=True).expand_as(good.out)
    assert torch.allclose(mean.float(), good.out.float(), rtol=1e-2, atol=1e-2)
    assert "out" in faults(inputs, good._replace(out=mean))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_bad_row_is_seen(dtype):
    inputs = InputRecipe(Shape(2, 2, 2, 64, 64, 16, 16), dtype)(0)
    good = plain(inputs)
    for name in ("out", "dq", "dk", "dv"):
        bad = getattr(good, name).clone()
        bad[1, 1, 63] *= 1.2
        fault = faults(inputs, good._replace(**{name: bad}))
        assert set(fault) == {name} and "1 of 256 rows wrong; row 63 lies in tile 3 of 16, 0 of 64" in fault[name]


def test_structural_zeros_must_be_exact():
    keep = torch.ones(6, 6, dtype=torch.bool)
    keep[2], keep[:, 4] = False, False
    inputs = InputRecipe(Shape(l=6, s=6), options={"attn_mask": keep})(0)
    good = plain(inputs)
    for name, row in (("out", 2), ("dq", 2), ("dk", 4), ("dv", 4)):
        bad = getattr(good, name).clone()
        bad[0, 0, row, 0] = 1e-30
        assert "expected an exact zero" in faults(inputs, good._replace(**{name: bad}))[name]


def test_shapes_dtypes_and_infinities():
    inputs = InputRecipe(options={"return_lse": True})(0)
    good = plain(inputs)
    bad = good.out.clone()
    bad[0, 0, 5, 5] = torch.nan
    for change, message in (
        ({"out": good.out[..., :8]}, "shape"),
        ({"out": good.out.double()}, "dtype"),
        ({"lse": good.lse.half()}, "dtype"),
        ({"dk": None, "dq": good.dq}, "did not come back"),
        ({"out": bad}, "nan at"),
        ({"lse": good.lse * 1.4427}, "error"),
    ):
        (fault,) = faults(inputs, good._replace(**change)).values()
        assert message in fault
    silent = {f.tensor: f.silent for f in judge(inputs, good._replace(out=bad)) if f.fault}
    assert silent == {"out": False}  # a NaN is no quiet lie


def test_windows_and_documents_against_a_list_of_keys():
    """Which keys are seen, written out: the oracle and the plain run share this rule, so it is tested apart."""

    def seen(shape, **options):
        return [row.nonzero().flatten().tolist() for row in visible(InputRecipe(shape, options=options)(0))[0, 0]]

    wide, tall = Shape(h=1, hk=1, l=2, s=4), Shape(h=1, hk=1, l=3, s=2)
    assert seen(wide, is_causal=True) == [[0], [0, 1]]
    assert seen(wide, is_causal=True, causal_align="bottom_right") == [[0, 1, 2], [0, 1, 2, 3]]
    assert seen(tall, is_causal=True, causal_align="bottom_right") == [[], [0], [0, 1]]
    assert seen(wide, window=(1, 1)) == [[0, 1], [0, 1, 2]]
    assert seen(wide, window=(0, -1)) == [[0, 1, 2, 3], [1, 2, 3]]
    assert seen(wide, window=(1, 0), causal_align="bottom_right") == [[1, 2], [2, 3]]
    ids = torch.tensor([[0, 1, 0]])
    assert seen(Shape(h=1, hk=1, l=3, s=3), document_ids=ids) == [[0, 2], [1], [0, 2]]


def test_what_was_written_to_is_named():
    inputs = InputRecipe(Shape(l=8, s=8), options={"attn_mask": lambda s, g: torch.zeros(s.l, s.s).double()})(0)

    def writes(x):
        def call():
            good = plain(inputs)
            with torch.no_grad():
                x.mul_(1.01)
                x.add_(0.5)
            return good

        return call

    for name, x in (("q", inputs.q), ("grad_out", inputs.grad_out), ("attn_mask", inputs.options["attn_mask"])):
        found = [f for f in judge_call(inputs, writes(x)) if f.fault]
        assert [(f.tensor, f.fault) for f in found] == [(name, "written to")]


def test_a_single_key_has_zero_gradients_up_to_rounding_only():
    """dq is exactly zero in a plain run; a fused kernel may be off by eps of the terms, not by more."""
    inputs = InputRecipe(Shape(l=4, s=1))(0)
    good = plain(inputs)
    assert (good.dq == 0).all() and faults(inputs, good) == {}
    assert faults(inputs, good._replace(dq=good.dq + 1e-7)) == {}
    assert "dq" in faults(inputs, good._replace(dq=good.dq + 1e-4))


def test_cases_are_data():
    assert len({c.id for c in ALL}) == len(ALL) > 400
    for case in ALL:
        assert case.level in LEVELS and case.requires <= set(FEATURES) and case.cites
    sizes = [len(cases(level)) for level in LEVELS]
    assert sizes[0] < sizes[1] < sizes[2] == len(ALL)
    used = {f for case in ALL for f in case.requires}
    assert used == set(FEATURES), set(FEATURES) - used


def test_claims_cover():
    claims = Claims(frozenset({"fp32", "causal"}), head_dims=range(8, 65, 8), length_multiple=32)

    def cover(requires, length, d, dv=None):
        return claims.cover(requires, Shape(l=length, s=64, d=d, dv=d if dv is None else dv))

    assert cover({"fp32"}, 32, 64) and cover({"causal", "fp32"}, 64, 8, 16)
    assert not cover({"bf16"}, 32, 64) and not cover({"fp32"}, 32, 59) and not cover({"fp32"}, 32, 64, 59)
    assert not cover({"fp32"}, 33, 64)


def test_layouts_hold_the_same_numbers():
    plainly = InputRecipe(Shape(2, 3, 3, 5, 5, 4, 4))(0)
    for layout in ("blhd", "fused", "padded", "columns", "differing"):
        other = InputRecipe(Shape(2, 3, 3, 5, 5, 4, 4), layout=layout)(0)
        assert all(torch.equal(x, y) for x, y in zip(plainly[:3], other[:3])), layout
        assert not all(x.is_contiguous() for x in other[:3]), layout
    padded = InputRecipe(layout="padded")(0).q
    assert padded.untyped_storage().nbytes() > padded.numel() * 4 and padded.isfinite().all()
    whole = torch.empty(0).set_(padded.untyped_storage())
    assert whole.isnan().any() and whole.isnan().sum() == whole.numel() - padded.numel()


def test_other_layouts_of_a_kernel():
    """One function told in three ways of laying out heads and tokens gives the same answers."""
    inputs = InputRecipe(Shape(2, 4, 4, 6, 6, 8, 8))(0)

    def blhd(q, k, v):
        assert q.shape == (2, 6, 4, 8)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def packed(q, k, v, cu_seqlens_q, cu_seqlens_k):
        assert q.shape == (12, 4, 8) and cu_seqlens_q.tolist() == [0, 6, 12] == cu_seqlens_k.tolist()
        parts = [slice(a, b) for a, b in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist())]
        attend = torch.nn.functional.scaled_dot_product_attention
        outs = [attend(*(x[p].transpose(0, 1) for x in (q, k, v))) for p in parts]
        return torch.cat([o.transpose(0, 1) for o in outs])

    for layout, function in (("BLHD", blhd), ("THD", packed)):
        assert faults(inputs, Kernel("f", function, None, layout).answer(inputs)) == {}
