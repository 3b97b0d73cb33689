"""Our kernels as models use them: equal to each other, refusing by name, under autocast, compile and checkpointing."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from selfsup.attention import tiled
from selfsup.attention.dispatch import KERNELS, TILED_FROM, TORCH_FROM, attention_function, choose
from selfsup.attention.library import flex_attention_adapter, torch_attention
from selfsup.attention.reference import attention_weights, reference_attention
from selfsup.attention.tiled import tiled_attention
from selfsup.config import validate
from selfsup.encoders.vit import ViTConfig
from selfsup.objectives.mae import MAEConfig

EXTRAS = {
    "window": (3, 0),
    "softcap": 5.0,
    "alibi_slopes": torch.tensor([0.5, 0.25]),
    "document_ids": torch.tensor([[0, 0, 1, 1, 1, 2, 2]]),
    "causal_align": "bottom_right",
}


def tensors(length=7, keys=7, dtype=torch.float64, heads=2, grad=True):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, n, 8, dtype=dtype, generator=generator, requires_grad=grad)
        for n in (length, keys, keys)
    ]


@pytest.mark.parametrize("names", list(itertools.combinations(EXTRAS, 2)), ids="+".join)
def test_options_together_mean_the_same_to_every_kernel(names):
    """The suite tries options one by one; here two at a time, in float64, values and gradients."""
    q, k, v = tensors()
    options = {name: EXTRAS[name] for name in names}
    if "causal_align" in names:
        options["is_causal"] = True
        if "document_ids" not in names:
            k, v = (x[:, :, :5].detach().requires_grad_() for x in (k, v))
    expected = reference_attention(q, k, v, **options)
    ours = tiled_attention(q, k, v, **options)
    assert torch.allclose(ours, expected, atol=1e-12)
    go = torch.randn(expected.shape, dtype=torch.float64)
    for x, y in zip(torch.autograd.grad(ours, (q, k, v), go), torch.autograd.grad(expected, (q, k, v), go)):
        assert torch.allclose(x, y, atol=1e-12)
    if "softcap" not in names:
        assert torch.allclose(torch_attention(q, k, v, **options), expected, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(flex_attention_adapter(q, k, v, **options), expected, atol=1e-6)


def test_any_number_of_batch_dimensions():
    q, k, v = (torch.randn(2, 3, 4, 5, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(3, 1, 5, 5) > 0.4
    ids = torch.randint(0, 2, (2, 3, 5))
    for options in ({"attn_mask": mask}, {"document_ids": ids}, {"alibi_slopes": torch.rand(2, 3, 4)}):
        assert torch.allclose(tiled_attention(q, k, v, **options), reference_attention(q, k, v, **options))


def test_weights_explain_the_output():
    q, k, v = tensors()
    options = {**EXTRAS, "is_causal": True}
    assert torch.allclose(attention_weights(q, k, **options) @ v, reference_attention(q, k, v, **options))


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        ("tiled", {"dropout_p": 0.1}, "dropout_p: the attention kernel 'tiled' cannot honour"),
        ("tiled", {"alibi_slopes": torch.rand(2, requires_grad=True)}, "alibi_slopes: .* no gradient"),
        ("torch", {"softcap": 1.0, "return_lse": True}, "softcap, return_lse: the attention kernel 'torch'"),
        ("flex", {"dropout_p": 0.1}, "dropout_p: the attention kernel 'flex'"),
        ("flex", {}, "no backward pass for it on a CPU"),
        *[
            (name, options, message)
            for name in ("reference", "tiled", "torch", "auto")
            for options, message in (
                ({"window": (-2, 0)}, "window: expected"),
                ({"softcap": 0.0} if name != "auto" else {"softcap": -1.0}, "softcap"),
                ({"alibi_slopes": torch.rand(3)}, "alibi_slopes: expected the shape"),
                ({"document_ids": torch.zeros(1, 3, dtype=torch.long)}, "document_ids"),
                ({"causal_align": "middle"}, "causal_align|Literal"),
            )
        ],
    ],
)
def test_refusals_name_the_argument(kernel, options, message):
    with pytest.raises(Exception, match=message):
        attention_function(kernel)(*tensors(), **options)


def test_mixed_dtypes_and_head_counts_are_refused():
    q, k, v = tensors()
    for function in (reference_attention, tiled_attention, torch_attention):
        with pytest.raises(ValueError, match="expected one dtype"):
            function(q, k.float(), v.float())
        with pytest.raises(ValueError, match="enable_gqa"):
            function(q, k[:, :1], v[:, :1])
        with pytest.raises(Exception, match="as many heads and keys|type"):
            function(q, k, v[:, :, :3])


@pytest.mark.parametrize("name", ["reference", "tiled", "torch", "auto"])
def test_masks_that_do_not_fit_are_refused(name):
    """Too large, of more dimensions, or of whole numbers, which would be added to the scores."""
    q, k, v = tensors(length=5)
    for mask in (torch.ones(10, 10, dtype=torch.bool), torch.ones(4, 1, 5, 7, dtype=torch.bool),
                 torch.ones(1, 1, 1, 5, 7, dtype=torch.bool), torch.ones(5, 7, dtype=torch.long)):  # fmt: skip
        with pytest.raises(Exception, match="attn_mask"):
            attention_function(name)(q, k, v, mask)


@pytest.mark.parametrize("name", ["reference", "tiled", "torch"])
def test_the_lowest_number_of_fp32_is_no_minus_infinity(name):
    """transformers' padding masks: a row of nothing but finfo.min is a mean, in bf16 too, not a row without a key."""
    q, k, v = (x.detach().bfloat16() for x in tensors())
    mask = torch.zeros(7, 7)
    mask[2] = torch.finfo(torch.float32).min
    out = attention_function(name)(q, k, v, mask)
    assert torch.allclose(out[0, 0, 2].float(), v[0, 0].float().mean(0), atol=2e-2)
    one = attention_function(name)(q, k, v, torch.tensor([0.0] * 6 + [-torch.inf]))  # a mask of one dimension
    assert torch.allclose(one.float(), reference_attention(q, k[:, :, :6], v[:, :, :6]).float(), atol=2e-2)


def test_auto_never_picks_a_kernel_that_refuses(monkeypatch):
    monkeypatch.setattr("selfsup.attention.dispatch.TILED_FROM", 1)
    q, k, v = tensors()
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)
    out = attention_function("auto")(q, k, v, softcap=2.0, alibi_slopes=slopes)
    assert torch.autograd.grad(out.sum(), slopes)[0].isfinite().all()
    attention_function("auto")(q, k, v, None, 0.5, softcap=2.0)


def test_the_operator_is_registered_as_it_behaves():
    q, k, v = tensors(dtype=torch.float32)
    mask = torch.randn(1, 1, 7, 7, requires_grad=True)
    for call in ((None, None, None, None, None, 0, None), (mask, torch.rand(2), None, 3, 0, 0, 2.0)):
        results = torch.library.opcheck(tiled._forward, (q, k, v, *call, 0.5))
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("name", ["reference", "tiled", "torch"])
def test_in_a_model_under_autocast_and_checkpointing(name):
    """A ViT's loss and gradients with each kernel: equal to the reference in fp32, close to it in bf16."""
    values = {}
    for kernel, mixed in ((name, False), (name, True), ("reference", False)):
        torch.manual_seed(0)
        config = validate(ViTConfig, {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2,
                                      "attention": kernel})  # fmt: skip
        model, images = config.build(), torch.randn(3, 3, 16, 16)
        for block in model.blocks:
            block.checkpoint = mixed
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = (model(images).float() * torch.linspace(-1, 1, 32)).tanh().sum()
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        values[kernel, mixed] = loss.detach(), grads
    loss, grads = values["reference", False]
    for mixed, limit in ((False, 1e-5), (True, 0.05)):
        other, others = values[name, mixed]
        assert abs(other - loss) <= limit * abs(loss)
        for key, grad in grads.items():
            assert (others[key] - grad).norm() <= limit * grad.norm() + 1e-7, (key, mixed)


def test_activation_checkpointing_repeats_dropout():
    q, k, v = tensors()
    torch.manual_seed(0)
    out = checkpoint(lambda *x: reference_attention(*x, dropout_p=0.5), q, k, v, use_reentrant=False)
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    assert torch.allclose((dv * v).sum(), out.sum())


def test_tiles_shrink_with_the_batch_and_not_below_64():
    assert tiled.tile_side(1) == tiled.MAX_TILE
    assert 64 <= tiled.tile_side(128) < tiled.MAX_TILE
    assert tiled.tile_side(10_000) == 64


def test_tiles_of_any_size_give_the_same(monkeypatch):
    q, k, v = tensors(length=70, keys=90)
    expected = tiled_attention(q, k, v, is_causal=True, causal_align="bottom_right")
    for side in (64, 32, 7, 1):
        monkeypatch.setattr(tiled, "tile_side", lambda heads, side=side: side)
        out = tiled_attention(q, k, v, is_causal=True, causal_align="bottom_right")
        assert torch.allclose(out, expected, atol=1e-13)


def test_auto_takes_what_was_measured():
    for dtype, limit in TORCH_FROM.items():
        assert choose("cpu", dtype, limit, 1, 1, []).kernel == "torch"
        if limit:
            below = choose("cpu", dtype, 1, limit - 1, 1, [])
            assert below.kernel == "reference" and f"{limit:,}" in below.why
    assert choose("cpu", torch.bfloat16, 48, 197, 197, []).kernel == "reference"
    assert choose("cpu", torch.float32, 48, 197, 197, []).kernel == "torch"
    assert choose("cuda", torch.bfloat16, 48, 197, 197, []).kernel == "torch"
    assert choose("cpu", torch.float32, 48, 64, 64, [], causal=True).kernel == "torch"
    assert choose("cpu", torch.bfloat16, 48, 64, 64, [], causal=True).kernel == "reference"
    for device in ("cpu", "cuda"):
        assert choose(device, torch.bfloat16, 48, 197, 197, ["softcap"]).kernel == "reference"
        long = choose(device, torch.bfloat16, TILED_FROM, 1, 1, ["softcap", "return_lse"])
        assert long.kernel == "tiled" and "softcap and no return_lse" in long.why


def test_auto_honours_every_option():
    q, k, v = tensors()
    for options in ({"softcap": 3.0}, {"return_lse": True}, {"window": (2, 2)}, {"enable_gqa": True}):
        ours, expected = KERNELS["auto"](q, k, v, **options), reference_attention(q, k, v, **options)
        for x, y in zip(ours, expected) if options.get("return_lse") else [(ours, expected)]:
            assert torch.allclose(x, y)


def test_mae_takes_every_kernel():
    """The same loss through the objective, one kernel after another."""
    losses = {}
    for name in ("reference", "tiled", "torch", "auto"):
        torch.manual_seed(0)
        encoder = validate(ViTConfig, {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2,
                                       "attention": name})  # fmt: skip
        decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
        objective = validate(MAEConfig, decoder).build(encoder)
        images, noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.rand(2, 16)
        losses[name] = objective.predict(images, noise)[0].square().mean().item()
        kernels = {m.attention for m in objective.modules() if hasattr(m, "attention")}
        assert kernels == {name}
    assert all(abs(x - losses["reference"]) < 1e-5 for x in losses.values()), losses
