"""The reference kernel against a slow float64 loop and torch's own, masks and empty rows included."""

import math

import pytest
import torch

from selfsup.attention.dispatch import attention_function
from selfsup.attention.reference import attention_weights, reference_attention


def loop_attention(q, k, v, allowed, bias, scale):
    """One query at a time, in Python floats of float64."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = [j for j in range(k.shape[2]) if allowed[i, j]]
                if not keys:
                    continue
                scores = [
                    float(q[b, h, i].double() @ k[b, h, j].double()) * scale + float(bias[i, j]) for j in keys
                ]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                for w, j in zip(weights, keys, strict=True):
                    out[b, h, i] += w / sum(weights) * v[b, h, j].double()
    return out


def tensors(n=5, s=7, d=4, dv=3, h=2, hk=2, dtype=torch.float64):
    torch.manual_seed(0)
    return [
        torch.randn(2, heads, m, e, dtype=dtype, requires_grad=True)
        for heads, m, e in ((h, n, d), (hk, s, d), (hk, s, dv))
    ]


@pytest.mark.parametrize("case", ["plain", "scale", "causal", "bool", "float", "empty_row"])
def test_against_the_loop(case):
    q, k, v = tensors()
    allowed, bias, scale = torch.ones(5, 7, dtype=torch.bool), torch.zeros(5, 7, dtype=torch.float64), 0.5
    options = {}
    if case == "scale":
        options["scale"] = scale = 0.37
    if case == "causal":
        options["is_causal"], allowed = True, allowed.tril()
    if case in ("bool", "empty_row"):
        allowed = torch.rand(5, 7) > 0.5
        allowed[2] = case != "empty_row"
        options["attn_mask"] = allowed
    if case == "float":
        options["attn_mask"] = bias = torch.randn(5, 7, dtype=torch.float64)
    out = reference_attention(q, k, v, **options)
    expected = loop_attention(q, k, v, allowed, bias, scale)
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)
    if case == "empty_row":
        assert (out[:, :, 2] == 0).all()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, 2] == 0).all()


def test_the_loop_catches_planted_bugs():
    q, k, v = tensors()
    ones, zeros = torch.ones(5, 7, dtype=torch.bool), torch.zeros(5, 7, dtype=torch.float64)
    expected = loop_attention(q, k, v, ones, zeros, 0.5)
    for wrong in (
        reference_attention(q, k, v, scale=1.0),
        reference_attention(q, k, v, is_causal=True),
        reference_attention(q, k.flip(2), v),
    ):
        assert not torch.allclose(wrong, expected, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.2}, {"enable_gqa": True}])
def test_values_and_gradients_equal_torch(options):
    q, k, v = tensors(h=4, hk=2 if options.get("enable_gqa") else 4)
    theirs = attention_function("torch")
    g = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    ours, other = reference_attention(q, k, v, **options), theirs(q, k, v, **options)
    assert torch.allclose(ours, other, atol=1e-13)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(other, (q, k, v), g), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_gradcheck():
    q, k, v = tensors(n=3, s=4)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda *x: reference_attention(*x, attn_mask=mask), (q, k, v))


def test_minus_infinity_in_a_float_mask_blocks():
    q, k, v = tensors()
    mask = torch.zeros(5, 7, dtype=torch.float64)
    mask[:, 3:] = -torch.inf
    mask[1] = -torch.inf
    out = reference_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(
        out[:, :, [0, 2, 3, 4]], reference_attention(q[:, :, [0, 2, 3, 4]], k[:, :, :3], v[:, :, :3])
    )
    assert (out[:, :, 1] == 0).all()


def test_weights_sum_to_one_or_zero():
    q, k, _ = tensors()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[4] = False
    sums = attention_weights(q, k, attn_mask=mask).sum(-1)
    assert torch.allclose(sums[..., :4], torch.ones(()).double()) and (sums[..., 4] == 0).all()


def test_dropout_keeps_the_mean():
    q, k, v = tensors(n=64, s=64)
    torch.manual_seed(0)
    kept = sum(reference_attention(q, k, v, dropout_p=0.5) for _ in range(400)) / 400
    assert (kept - reference_attention(q, k, v)).abs().mean() < 0.02


def test_faults():
    q, k, v = tensors(h=4, hk=2)
    with pytest.raises(ValueError, match="enable_gqa"):
        reference_attention(q, k, v)
    with pytest.raises(ValueError, match="attn_mask and is_causal"):
        reference_attention(q, q, q, attn_mask=torch.ones(5, 5, dtype=torch.bool), is_causal=True)
    with pytest.raises(Exception, match="expected reference, tiled|beartype|type"):
        attention_function("flash9")
