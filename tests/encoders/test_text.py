"""The text encoder: who sees whom with every kernel, positions, caches, features."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mutants import exec_changed
from selfsup.attention import rules
from selfsup.batch import TextBatch
from selfsup.config import validate
from selfsup.encoders import text
from selfsup.encoders.text import TextConfig, TextEncoder
from selfsup.layers import attention
from selfsup.layers.attention import LayerCache

LEARN = ["reference", "tiled", "torch", "auto"]
KERNELS = [*LEARN, "flex"]  # flex has no backward pass on a CPU
POSITIONS = ["learned", "rope", "alibi", "none"]
PLACED = [
    *((k, p) for k in LEARN for p in POSITIONS),
    ("flex", "rope"),
    ("flex", "alibi"),
]  # flex is slow here
CLOSE = 1e-6  # between float64 states; rotary angles and slopes are float32
SMALL = {"vocab_size": 100, "max_length": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}


def shaken(**options) -> TextEncoder:
    """A float64 encoder none of whose parameters is at a special value."""
    torch.manual_seed(0)
    made = validate(TextConfig, {**SMALL, **options}).build().double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


def unlike(b: int, n: int) -> torch.Tensor:
    """Tokens (b, n), no two alike: the gradient of a token's embedding is that of its place."""
    return torch.randperm(100, generator=torch.Generator().manual_seed(3))[: b * n].view(b, n)


def numbered(*lengths: int, n: int) -> torch.Tensor:
    """(n,) documents of these lengths, numbered from 0, then padding."""
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(ids + [-1] * (n - len(ids)))


def restarted(document: torch.Tensor) -> torch.Tensor:
    """Places counted anew in each document, by a slow loop."""
    out = torch.zeros_like(document)
    for r, row in enumerate(document.tolist()):
        for i in range(1, len(row)):
            out[r, i] = out[r, i - 1] + 1 if row[i] == row[i - 1] and row[i] >= 0 else 0
    return out


def reach(model: TextEncoder, tokens, document, **structure) -> torch.Tensor:
    """(b, n, n): whether token j changes the state at i, from gradients; no two tokens alike."""
    states = model(tokens, document, **structure)
    b, n, _ = states.shape
    found = torch.zeros(b, n, n, dtype=torch.bool)
    weights = torch.randn(states.shape[-1], dtype=states.dtype)
    for i in range(n):
        (gradient,) = torch.autograd.grad(
            (states[:, i] @ weights).sum(), model.token_embed.weight, retain_graph=True
        )
        found[:, i] = (gradient[tokens] != 0).any(-1)
    return found


def moved(model: TextEncoder, tokens, document, **structure) -> torch.Tensor:
    """The same from values: each token in turn is replaced."""
    b, n = tokens.shape
    before, found = model(tokens, document, **structure), torch.zeros(b, n, n, dtype=torch.bool)
    for j in range(n):
        other = tokens.clone()
        other[:, j] = (other[:, j] + 1) % 100
        found[:, :, j] = (model(other, document, **structure) != before).any(-1)
    return found


def may_see(document: torch.Tensor, causal: bool) -> torch.Tensor:
    """The rule, by a slow loop."""
    b, n = document.shape
    out = torch.zeros(b, n, n, dtype=torch.bool)
    for r in range(b):
        for i in range(n):
            for j in range(i + 1 if causal else n):
                out[r, i, j] = document[r, i] == document[r, j]
    return out


@pytest.mark.parametrize("kernel", LEARN)
@settings(deadline=None, max_examples=6)
@given(
    first=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    second=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    causal=st.booleans(), kv_heads=st.sampled_from([1, 2]), positions=st.sampled_from(POSITIONS),
)  # fmt: skip
def test_a_token_sees_its_own_document_and_nothing_else(kernel, first, second, causal, kv_heads, positions):
    """In values, exactly, and in gradients; padding is seen by no token of a document and sees none."""
    model = shaken(attention=kernel, causal=causal, num_kv_heads=kv_heads, positions=positions)
    document = torch.stack([numbered(*first, n=13), numbered(*second, n=13)])
    tokens, structure = unlike(2, 13), {"positions": restarted(document)}
    expected = may_see(document, causal)
    with torch.no_grad():
        assert torch.equal(moved(model, tokens, document, **structure), expected)
    if kernel != "flex":
        assert torch.equal(reach(model, tokens, document, **structure), expected)


@pytest.mark.parametrize("causal,positions", [(False, "alibi"), (True, "rope")])
def test_nor_with_flex_in_values(causal, positions):
    check = test_a_token_sees_its_own_document_and_nothing_else.hypothesis.inner_test
    check("flex", [4, 1, 3], [2, 5], causal, 1, positions)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_without_documents_all_of_a_row_is_seen_or_all_before(kernel, causal):
    model = shaken(attention=kernel, causal=causal, post_norm=True, embed_norm=True)
    alone = torch.zeros(1, 9, dtype=torch.long)
    assert torch.equal(moved(model, unlike(1, 9), None), may_see(alone, causal))


@pytest.mark.parametrize(
    "old,new,causal",
    [
        ("parts.append(ids[..., rows, None] == ids[..., None, cols])", "pass", False),
        ("== ids[..., None, cols]", "== (ids[..., None, cols] + (ids[..., None, cols] < 0))", False),
        ("ahead <= self.right", "ahead <= self.right + 1", True),
    ],
)
def test_planted_masks_are_caught(monkeypatch, old, new, causal):
    """No documents, padding taken for the first document, a look at the next token."""
    monkeypatch.setattr(rules.Rules, "allowed", exec_changed(rules, "Rules.allowed", old, new))
    with pytest.raises(AssertionError):
        check = test_a_token_sees_its_own_document_and_nothing_else.hypothesis.inner_test
        check("reference", [3, 2], [4, 1], causal, 2, "rope")


@pytest.mark.parametrize("kernel,positions", PLACED)
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_document_in_a_packed_row_equals_the_document_alone(kernel, positions, causal):
    model = shaken(attention=kernel, causal=causal, positions=positions, num_kv_heads=1)
    document = torch.stack([numbered(4, 5, 3, n=14), numbered(1, 7, 6, n=14)])
    tokens = unlike(2, 14)
    packed = model(tokens, document, restarted(document))
    for row, numbers in enumerate(document):
        for number in range(3):
            own = numbers == number
            alone = model(tokens[row : row + 1, own])
            assert (packed[row, own] - alone[0]).abs().max() < CLOSE, (row, number)


@pytest.mark.parametrize("positions", ["learned", "rope"])
@torch.no_grad()
def test_positions_that_do_not_restart_are_seen(positions):
    model, document, tokens = shaken(positions=positions), numbered(4, 5, n=9)[None], unlike(1, 9)
    learned = (
        positions == "learned"
    )  # rotary positions within one document are relative: they need no restart
    late = (model(tokens, document)[0, 4:] - model(tokens[:, 4:])[0]).abs().max()
    assert (late > 1e-2) if learned else (late < CLOSE)
    skewed = restarted(document) * torch.tensor([1, 1, 1, 1, 2, 2, 2, 2, 2])
    assert (model(tokens, document, skewed)[0, 4:] - model(tokens[:, 4:])[0]).abs().max() > 1e-2


@torch.no_grad()
def test_token_types():
    model, tokens = shaken(token_types=2), unlike(2, 6)
    zeros = torch.zeros_like(tokens)
    assert torch.equal(model(tokens), model(tokens, token_types=zeros))
    second = zeros.index_fill(1, torch.tensor([3, 4]), 1)
    sums = [
        model.token_embed.weight[t] + model.pos_embed.weight[i] + model.type_embed.weight[k]
        for row, kinds in zip(tokens.tolist(), second.tolist()) for i, (t, k) in enumerate(zip(row, kinds))
    ]  # fmt: skip
    assert torch.equal(model.embed(tokens, token_types=second), torch.stack(sums).view(2, 6, -1))


@pytest.mark.parametrize("kernel,positions", PLACED)
@torch.no_grad()
def test_with_caches_token_by_token_equals_all_at_once(kernel, positions):
    model = shaken(attention=kernel, causal=True, positions=positions, num_kv_heads=1)
    tokens = unlike(2, 10)
    caches = [LayerCache() for _ in model.blocks]
    parts = [model(part, caches=caches) for part in tokens.split([3, 1, 1, 4, 1], dim=1)]
    assert (torch.cat(parts, dim=1) - model(tokens)).abs().max() < CLOSE


@pytest.mark.parametrize("kernel,positions", [case for case in PLACED if case[0] in LEARN])
def test_bf16_autocast_is_near_float64_in_values_and_gradients(kernel, positions):
    model = shaken(attention=kernel, positions=positions, num_kv_heads=1, causal=True)
    tokens, document = unlike(2, 14), torch.stack([numbered(4, 5, 3, n=14), numbered(9, n=14)])
    weights = torch.randn(2, 14, 16, dtype=torch.float64) * (document >= 0)[..., None]

    def run(model, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states = model(tokens, document, restarted(document))
        (gradient,) = torch.autograd.grad((states * weights).sum(), model.token_embed.weight)
        return states[document >= 0].double(), gradient.double()

    exact = run(model, False)
    for found, right in zip(run(model.float(), True), exact, strict=True):
        assert 1e-4 < (found - right).norm() / right.norm() < 0.03


@pytest.mark.parametrize("post_norm", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(post_norm):
    """With rotation, documents and dropout: what a block needs beside its input is kept or drawn again."""
    model = shaken(positions="rope", post_norm=post_norm, causal=True, dropout=0.3).train()
    tokens, document = unlike(2, 8), torch.stack([numbered(3, 4, n=8), numbered(8, n=8)])
    found = []
    for checkpointed in (False, True):
        for block in model.blocks:
            block.checkpoint = checkpointed
        torch.manual_seed(5)
        loss = model(tokens, document, restarted(document)).square().sum() + model.token_embed.weight.sum()
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_refusals():
    model, tokens = shaken(causal=True), unlike(1, 16)
    caches = [LayerCache() for _ in model.blocks]
    with torch.no_grad():
        model(tokens[:, :10], caches=caches)
    with pytest.raises(ValueError, match="at most encoder.max_length 16, got 17"):
        model(tokens[:, :7], caches=caches)
    with pytest.raises(ValueError, match="at most encoder.max_length 16, got 17"):
        model(unlike(1, 17))
    with pytest.raises(ValueError, match="caches: an encoder that is not causal"):
        shaken()(tokens[:, :1], caches=caches)
    for options, words in [
        ({"num_heads": 3}, "num_heads: expected a divisor of embed_dim 16, got 3"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads 4, got 3"),
        ({"num_heads": 16, "positions": "rope"}, "positions: rope needs an even number"),
        ({"positions": "alibi", "rope_base": 5e5}, "rope_base: positions alibi have none"),
    ]:
        with pytest.raises(ValueError, match=words):
            validate(TextConfig, {**SMALL, **options})


def batch_of(tokens: torch.Tensor, document: torch.Tensor | None) -> TextBatch:
    """Rows without targets."""
    number, none = torch.arange(len(tokens)), torch.zeros(0, dtype=torch.long)
    return TextBatch(
        tokens, none, none, document, None, None, None, len(tokens), 0, number * 0, number, number
    )


@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
@torch.no_grad()
def test_features_are_of_the_texts_tokens_only(pool):
    model, lengths = shaken(pool=pool), [5, 1, 9]
    document = torch.stack([numbered(length, n=9) for length in lengths])
    tokens = unlike(3, 9)
    found = model.features(batch_of(tokens, document))
    for row, length in enumerate(lengths):
        states = [model(tokens[row : row + 1, :length])[0, i] for i in range(length)]
        right = {"mean": sum(states) / length, "cls": states[0], "last": states[-1]}[pool]
        assert (found[row] - right).abs().max() < CLOSE
        assert (model.features(batch_of(tokens[row : row + 1, :length], None))[0] - right).abs().max() < CLOSE


def test_padding_in_a_feature_is_caught(monkeypatch):
    broken = exec_changed(
        text, "TextEncoder.features", "(batch.document_ids >= 0)", "(batch.document_ids >= -1)"
    )
    monkeypatch.setattr(TextEncoder, "features", broken)
    for pool in ("mean", "last"):
        with pytest.raises(AssertionError):
            test_features_are_of_the_texts_tokens_only(pool)


def test_a_missing_rotation_is_caught(monkeypatch):
    monkeypatch.setattr(attention, "rotate", lambda x, rotation: x)
    with pytest.raises(AssertionError):
        test_positions_that_do_not_restart_are_seen("rope")
