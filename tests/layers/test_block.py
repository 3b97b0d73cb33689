"""The block's options for text against torch's own layer, closed forms and published code, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mutants import exec_changed
from selfsup.layers import attention, block
from selfsup.layers.attention import Attention, LayerCache, Scope
from selfsup.layers.block import Block, BlockOptions
from selfsup.layers.rope import Rotation, alibi_slopes, rotate, rotation_1d

CLOSE = 1e-12
DIM, HEADS, HIDDEN = 24, 4, 40


def shaken(**options) -> Block:
    """A float64 block none of whose parameters is at a special value."""
    torch.manual_seed(0)
    made = Block(BlockOptions(DIM, HEADS, HIDDEN, **options)).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def rows(n=7, b=2):
    return torch.randn(b, n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def in_torch(ours: Block, eps: float) -> nn.Module:
    """torch.nn.TransformerEncoderLayer with the same weights."""
    options = {"batch_first": True, "norm_first": not ours.post_norm, "bias": ours.mlp.fc1.bias is not None}
    twin = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, "gelu", eps, **options).double()
    names = {
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    state = ours.state_dict()
    for theirs in twin.state_dict():
        start = next(name for name in names if theirs.startswith(name))
        twin.state_dict()[theirs].copy_(state.pop(theirs.replace(start, names[start])))
    assert not state
    return twin


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
def test_equals_torchs_layer(post_norm, bias, causal):
    ours = shaken(post_norm=post_norm, bias=bias, qkv_bias=bias, causal=causal, eps=1e-3)
    x = rows().requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64) if causal else None
    out, right = ours(x), in_torch(ours, 1e-3)(x, mask)
    assert (out - right).abs().max() < CLOSE
    weights = torch.randn_like(out)
    found, expected = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (out, right))
    assert (found - expected).abs().max() < CLOSE


def test_where_the_norm_stands_is_seen(monkeypatch):
    """As is a norm around the branch alone."""
    twins = [(made := shaken(post_norm=post_norm), in_torch(made, 1e-6)) for post_norm in (False, True)]
    old = "self.norm1(x + self.branch(self.ls1(self.attn(x, rotation, scope, cache))))"
    new = "x + self.norm1(self.branch(self.ls1(self.attn(x, rotation, scope, cache))))"
    monkeypatch.setattr(Block, "residuals", exec_changed(block, "Block.residuals", old, new))
    assert (twins[0][0](rows()) - twins[0][1](rows())).abs().max() < CLOSE
    assert (twins[1][0](rows()) - twins[1][1](rows())).abs().max() > 0.1
    monkeypatch.undo()
    twins[0][0].post_norm = True
    assert (twins[0][0](rows()) - twins[0][1](rows())).abs().max() > 0.1


def llama(x, made: Block, rotation: Rotation, kv_heads: int):
    """Llama's layer written out (Touvron et al. 2023), each query head by itself."""
    c, p = DIM // HEADS, made.state_dict()

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + made.norm1.eps).sqrt() * weight

    def turned(x):
        z = torch.complex(x[..., : c // 2], x[..., c // 2 :])
        z = z * torch.complex(rotation.cos, rotation.sin)[:, : c // 2].to(z.dtype)
        return torch.cat([z.real, z.imag], -1)

    q, k, v = (rms(x, p["norm1.weight"]) @ p["attn.qkv.weight"].T).split(
        [DIM, c * kv_heads, c * kv_heads], -1
    )
    heads = []
    for h in range(HEADS):
        g = h // (HEADS // kv_heads)
        own, keys = turned(q[..., h * c : (h + 1) * c]), turned(k[..., g * c : (g + 1) * c])
        scores = own @ keys.transpose(1, 2) / math.sqrt(c)
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[..., g * c : (g + 1) * c])
    x = x + torch.cat(heads, -1) @ p["attn.proj.weight"].T
    wide = rms(x, p["norm2.weight"]) @ p["mlp.fc1.weight"].T
    return x + (F.silu(wide[..., :HIDDEN]) * wide[..., HIDDEN:]) @ p["mlp.fc2.weight"].T


LLAMA = {"norm": "rms", "activation": "swiglu", "bias": False, "qkv_bias": False, "causal": True, "eps": 1e-4}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llamas_form_written_out(kv_heads):
    made, rotation = shaken(num_kv_heads=kv_heads, **LLAMA), rotation_1d(DIM // HEADS, 7)
    assert {name for name, _ in made.named_parameters()} == {
        f"{n}.weight" for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    }
    assert (made(rows(), rotation) - llama(rows(), made, rotation, kv_heads)).abs().max() < CLOSE


def test_planted_differences_from_llama_are_caught(monkeypatch):
    made, rotation = shaken(num_kv_heads=2, **LLAMA), rotation_1d(DIM // HEADS, 7)
    right = llama(rows(), made, rotation, 2)
    bugs = [
        (block.GatedUnit, "forward", block, "self.act(gate) * value", "self.act(value) * gate"),
        (Attention, "heads", attention, "rotate(k, rotation)", "k"),
        (Attention, "heads", attention, "h=self.num_kv_heads)", "h=self.num_kv_heads).flip(1)"),
    ]
    for owner, name, module, old, new in bugs:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, exec_changed(module, f"{owner.__name__}.{name}", old, new))
            assert (made(rows(), rotation) - right).abs().max() > 1e-3, old


@pytest.mark.parametrize("bias", [False, True])
def test_a_geglu_mlp_written_out(bias):
    """GELU by its definition, x P(N(0, 1) <= x), of the first half, times the second (Shazeer 2020, sec. 2)."""
    mlp, x = shaken(activation="geglu", bias=bias).mlp, 3 * rows()
    assert mlp.fc1.weight.shape == (2 * HIDDEN, DIM) and mlp.fc2.weight.shape == (DIM, HIDDEN)

    def affine(x, layer):
        out = torch.einsum("bnd,ed->bne", x, layer.weight)
        return out + layer.bias if bias else out

    wide = affine(x, mlp.fc1)
    gate, value = wide[..., :HIDDEN], wide[..., HIDDEN:]
    right = affine(gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * value, mlp.fc2)
    assert (mlp(x) - right).abs().max() < CLOSE
    for other in (nn.GELU(approximate="tanh"), nn.SiLU(), nn.ReLU()):
        mlp.act.act = other
        assert (mlp(x) - right).abs().max() > 1e-5


@pytest.mark.parametrize("kernel", ["reference", "tiled", "torch", "auto"])
def test_grouped_queries_equal_repeated_heads(kernel):
    """In values; the gradient of a shared head is the sum over its copies."""
    c, kv = DIM // HEADS, 2
    few, many = shaken(num_kv_heads=kv, attention=kernel), shaken()
    many.load_state_dict({k: v for k, v in few.state_dict().items() if "qkv" not in k}, strict=False)
    with torch.no_grad():
        for name in ("weight", "bias"):
            q, k, v = getattr(few.attn.qkv, name).split(few.attn.widths)
            k, v = (t.unflatten(0, (kv, c)).repeat_interleave(HEADS // kv, 0).flatten(0, 1) for t in (k, v))
            getattr(many.attn.qkv, name).copy_(torch.cat([q, k, v]))
    out, right = few(rows()), many(rows())
    assert (out - right).abs().max() < CLOSE
    for y in (out, right):
        y.square().sum().backward()
    whole = many.attn.qkv.weight.grad.unflatten(0, (3, HEADS, c))
    shared = whole[1:].unflatten(1, (kv, HEADS // kv)).sum(2).flatten(0, 2)
    found = few.attn.qkv.weight.grad
    assert (found - torch.cat([whole[0].flatten(0, 1), shared])).abs().max() < 1e-10


@pytest.mark.parametrize("kernel", ["reference", "tiled", "torch", "auto"])
@settings(deadline=None, max_examples=10)
@given(cuts=st.sets(st.integers(1, 8)), kv_heads=st.sampled_from([1, 4]), alibi=st.booleans())
def test_a_cache_changes_nothing(kernel, cuts, kv_heads, alibi):
    made = shaken(num_kv_heads=kv_heads, causal=True, attention=kernel)
    scope = Scope(None, alibi_slopes(HEADS).double()) if alibi else Scope()
    x, cache = rows(9), LayerCache()
    parts = torch.tensor_split(x, sorted(cuts), dim=1)
    out = torch.cat([made(part, scope=scope, cache=cache) for part in parts], dim=1)
    assert len(cache) == 9 and cache.keys.shape[1] == kv_heads
    assert (out - made(x, scope=scope)).abs().max() < CLOSE


def test_causal_masks_aligned_at_the_top_are_caught(monkeypatch):
    broken = exec_changed(attention, "Attention.forward", "bottom_right", "top_left")
    monkeypatch.setattr(Attention, "forward", broken)
    with pytest.raises(AssertionError):
        test_a_cache_changes_nothing.hypothesis.inner_test("reference", {4}, 4, False)


def published_slopes(n: int) -> list[float]:
    """The recipe of the paper's own code (ofirpress/attention_with_linear_biases, get_slopes)."""
    if math.log2(n).is_integer():
        first = 2 ** -(2 ** -(math.log2(n) - 3))
        return [first ** (i + 1) for i in range(n)]
    lower = 2 ** math.floor(math.log2(n))
    return published_slopes(lower) + published_slopes(2 * lower)[0::2][: n - lower]


@pytest.mark.parametrize("n", range(1, 34))
def test_alibi_slopes(n):
    assert alibi_slopes(n).tolist() == pytest.approx(published_slopes(n), rel=1e-6)


def test_alibi_slopes_that_the_paper_prints():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(16)[:3].tolist() == pytest.approx([2**-0.5, 2**-1, 2**-1.5])


@settings(deadline=None, max_examples=50)
@given(
    i=st.integers(0, 40), j=st.integers(0, 40), shift=st.integers(0, 23),
    c=st.sampled_from([2, 6, 16]), base=st.sampled_from([100.0, 10000.0, 500000.0]),
)  # fmt: skip
def test_rotary_scores_depend_on_the_distance_alone(i, j, shift, c, base):
    q, k = (torch.randn(1, 1, 64, c, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    q, k = (t[:, :, :1].expand(-1, -1, 64, -1) for t in (q, k))
    turns = rotation_1d(c, 64, base)
    scores = (rotate(q, turns) @ rotate(k, turns).mT)[0, 0]
    assert (scores[i, j] - scores[i + shift, j + shift]).abs() < 1e-5  # the angles are in float32
    assert torch.allclose(scores.diagonal(), (q[0, 0, 0] * k[0, 0, 0]).sum(), atol=1e-5)


def test_rotary_angles():
    turns = rotation_1d(6, 5, 100.0)
    for position in range(5):
        for pair in range(3):
            angle = position * 100.0 ** (-2 * pair / 6)
            for channel in (pair, pair + 3):
                assert turns.cos[position, channel].item() == pytest.approx(math.cos(angle), abs=1e-6)
                assert turns.sin[position, channel].item() == pytest.approx(math.sin(angle), abs=1e-6)
    with pytest.raises(ValueError, match="even number of channels a head, got 5"):
        rotation_1d(5, 4)


def test_dropout_stands_on_weights_and_both_branches_in_training_only():
    made = shaken(dropout=0.5)
    assert torch.equal(made(rows()), shaken()(rows()))
    made.train()
    torch.manual_seed(0)
    dropped = made(rows())
    seen = []
    made.dropout.register_forward_hook(lambda *call: seen.append(call[2] == 0))
    torch.manual_seed(0)
    assert torch.equal(made(rows()), dropped)
    assert len(seen) == 2 and all(0.4 < zero.double().mean() < 0.6 for zero in seen)
    made.dropout.p = 0.0  # what is left is the attention weights'
    assert not torch.equal(made(rows()), shaken()(rows()))
    made.attn.dropout = 0.0
    assert torch.equal(made(rows()), shaken()(rows()))
