"""The text encoder's initial weights tensor by tensor, its sizes, its names on disk."""

import math

import pytest
import torch

from mutants import exec_changed
from selfsup.config import validate
from selfsup.encoders import text
from selfsup.encoders.text import TextConfig, TextEncoder

LARGE = {"vocab_size": 1000, "embed_dim": 128, "depth": 3, "num_heads": 4, "max_length": 64, "token_types": 2,
         "embed_norm": True}  # fmt: skip


@pytest.mark.parametrize("init", ["gpt2", "bert"])
@pytest.mark.parametrize("std", [0.02, 0.1])
def test_initial_weights_tensor_by_tensor(init, std):
    """GPT-2 (sec. 2.3): the residual branches' last layers by 1 / sqrt(2 L); BERT: all alike, none beyond 2 sigma."""
    torch.manual_seed(0)
    model = validate(TextConfig, {**LARGE, "init": init, "init_std": std}).build()
    norms = ("embed_norm", "norm1", "norm2", "norm.")
    for name, p in model.named_parameters():
        if any(norm in name for norm in norms):
            assert torch.equal(p, torch.full_like(p, 1.0 if name.endswith("weight") else 0.0)), name
            continue
        if name.endswith("bias"):
            assert not p.any(), name
            continue
        scaled = (
            std / math.sqrt(2 * 3) if init == "gpt2" and ("attn.proj" in name or "mlp.fc2" in name) else std
        )
        # Cut at 2 sigma a normal variable keeps 0.8796 of its deviation.
        expected = scaled * (0.8796 if init == "bert" else 1.0)
        n = p.numel()
        assert p.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * n)), name
        assert abs(p.mean().item()) < 4 * expected / math.sqrt(n), name
        beyond = (p.abs() > 2 * scaled * 1.000001).double().mean().item()
        if init == "bert":
            assert beyond == 0, name
        else:
            assert beyond == pytest.approx(0.0455, abs=4 * math.sqrt(0.0455 / n)), name


def test_planted_initial_weights_are_caught(monkeypatch):
    for old, new, init in [
        ("(2 * self.config.depth) ** 0.5", "self.config.depth**0.5", "gpt2"),
        ("if branch_end and not bert", "if branch_end", "bert"),
        ("truncated=bert", "truncated=not bert", "bert"),
        ('".mlp.fc2"', '".mlp.fc1"', "gpt2"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(
                TextEncoder, "init_weights", exec_changed(text, "TextEncoder.init_weights", old, new)
            )
            with pytest.raises(AssertionError):
                test_initial_weights_tensor_by_tensor(init, 0.1)


@pytest.mark.parametrize("vocab,padded", [(1, 64), (64, 64), (65, 128), (30522, 30528), (50257, 50304)])
def test_rows_of_the_embedding_come_in_sixty_fours(vocab, padded):
    config = TextConfig(vocab_size=vocab)
    assert config.padded_vocab == padded
    with torch.device("meta"):
        model = config.build()
    assert model.token_embed.weight.shape[0] == padded and model.word_weights.shape[0] == vocab


def names(**options) -> list[str]:
    return list(validate(TextConfig, options).build().state_dict())


def test_gated_widths_and_names_on_disk():
    for gated in ("swiglu", "geglu"):
        assert TextConfig(embed_dim=768, activation=gated, num_heads=12).mlp_dim == 2048
    assert TextConfig(embed_dim=64).mlp_dim == 256 and TextConfig(hidden_dim=7).mlp_dim == 7
    bert = {"post_norm": True, "embed_norm": True, "token_types": 2, "depth": 1}
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    block = [f"blocks.0.{part}.{p}" for part in parts for p in ("weight", "bias")]
    embeddings = [f"{name}_embed.weight" for name in ("token", "pos", "type")]
    assert names(**bert) == [*embeddings, "embed_norm.weight", "embed_norm.bias", *block]
    modern = {"norm": "rms", "positions": "rope", "bias": False, "depth": 1}
    expected = ["token_embed.weight", *(n for n in block if n.endswith("weight")), "norm.weight"]
    assert names(**modern) == expected
    # As in ModernBERT the first block has no norm before its attention where the embeddings are normed.
    both = names(**{**modern, "depth": 2, "embed_norm": True})
    assert both[:3] == ["token_embed.weight", "embed_norm.weight", "blocks.0.attn.qkv.weight"]
    assert "blocks.0.norm1.weight" not in both and "blocks.1.norm1.weight" in both
