"""The same random weights in transformers' BERT, Megatron-BERT, ModernBERT, GPT-2, Llama and in ours: the same
numbers.

Weights go from theirs to ours here, by names written out once more: exports go the other way.
"""

from contextlib import nullcontext

import pytest
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from selfsup.batch import TextBatch
from selfsup.config import validate
from selfsup.encoders.text import TextConfig
from selfsup.layers.attention import LayerCache
from selfsup.objectives.clm import CLMConfig
from selfsup.objectives.mlm import MLMConfig

VOCAB, LENGTH, WIDTH, DEPTH, HEADS = 100, 24, 32, 3, 4
SIZES = {"vocab_size": VOCAB, "max_length": LENGTH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
BERT = {"post_norm": True, "embed_norm": True, "norm_eps": 1e-12, "token_types": 2}
LLAMA = {
    "causal": True, "norm": "rms", "norm_eps": 1e-6, "positions": "rope", "activation": "swiglu", "bias": False,
    "num_kv_heads": 2, "hidden_dim": 48, "rope_base": 500.0,
}  # fmt: skip
MODERN = {
    "embed_norm": True, "positions": "rope", "activation": "geglu", "bias": False, "hidden_dim": 48,
    "rope_base": 500.0,
}  # fmt: skip
OURS = {
    "bert": ({}, BERT),
    "bert pairs": ({"next_sentence": True}, BERT),
    "bert tanh": ({}, {**BERT, "activation": "gelu_tanh"}),
    "megatron": ({}, {"token_types": 2, "norm_eps": 1e-12}),
    "modernbert": ({}, MODERN),
    "modernbert biases": ({}, {**MODERN, "bias": True}),
    "modernbert untied": ({"tied": False}, MODERN),
    "gpt2": ({}, {"causal": True, "activation": "gelu_tanh"}),
    "llama": ({"tied": False}, LLAMA),
    "llama tied": ({}, LLAMA),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def build_ours(name):
    objective, encoder = OURS[name]
    causal = encoder.get("causal", False)
    return validate(CLMConfig if causal else MLMConfig, objective).build(
        validate(TextConfig, {**SIZES, **encoder})
    )


def build_theirs(name):
    kind, *rest = name.split()
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH, "pad_token_id": 0,
    }  # fmt: skip
    if kind in ("bert", "megatron"):
        options = {**sizes, **no_dropout, "intermediate_size": 4 * WIDTH}
        options["hidden_act"] = "gelu_new" if "tanh" in rest else "gelu"
        if kind == "megatron":
            return transformers.MegatronBertForMaskedLM(transformers.MegatronBertConfig(**options))
        config = transformers.BertConfig(**options)
        return (
            transformers.BertForPreTraining(config)
            if "pairs" in rest
            else transformers.BertForMaskedLM(config)
        )
    if kind == "modernbert":
        biases = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")
        return transformers.ModernBertForMaskedLM(
            transformers.ModernBertConfig(
                **sizes, **dict.fromkeys(biases, "biases" in rest), intermediate_size=48, global_rope_theta=500.0,
                global_attn_every_n_layers=1, tie_word_embeddings="untied" not in rest,
            )
        )  # fmt: skip
    if kind == "gpt2":
        sizes.pop("max_position_embeddings")
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=LENGTH, **sizes, **none))
    options = {
        **sizes,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-6,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=bool(rest), **options))


def ours_from(name: str, theirs: dict[str, Tensor], filler: float) -> dict[str, Tensor]:
    """Their tensors, weights or gradients, under our names; filler: of the rows beyond the vocabulary."""
    kind = name.split()[0]
    found: dict[str, Tensor] = {}

    def take(our: str, *names: str, transposed: bool = False) -> None:
        for leaf in ("weight", "bias"):
            parts = [theirs[f"{their}.{leaf}"] for their in names if f"{their}.{leaf}" in theirs]
            if parts:
                whole = torch.cat(parts)
                found[f"{our}.{leaf}"] = whole.T if transposed and leaf == "weight" else whole

    for i in range(DEPTH):
        block = f"encoder.blocks.{i}."
        if kind == "gpt2":
            for our, their in (("attn.qkv", "attn.c_attn"), ("attn.proj", "attn.c_proj")):
                take(block + our, f"transformer.h.{i}.{their}", transposed=True)
            take(block + "mlp.fc1", f"transformer.h.{i}.mlp.c_fc", transposed=True)
            take(block + "mlp.fc2", f"transformer.h.{i}.mlp.c_proj", transposed=True)
            take(block + "norm1", f"transformer.h.{i}.ln_1")
            take(block + "norm2", f"transformer.h.{i}.ln_2")
        elif kind == "llama":
            layer = f"model.layers.{i}."
            take(block + "attn.qkv", *(f"{layer}self_attn.{part}_proj" for part in "qkv"))
            take(block + "attn.proj", f"{layer}self_attn.o_proj")
            take(block + "mlp.fc1", f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj")
            take(block + "mlp.fc2", f"{layer}mlp.down_proj")
            take(block + "norm1", f"{layer}input_layernorm")
            take(block + "norm2", f"{layer}post_attention_layernorm")
        elif kind == "modernbert":
            names = {
                "attn.qkv": "attn.Wqkv", "attn.proj": "attn.Wo", "mlp.fc1": "mlp.Wi", "mlp.fc2": "mlp.Wo",
                "norm1": "attn_norm", "norm2": "mlp_norm",
            }  # fmt: skip
            for our, their in names.items():
                take(block + our, f"model.layers.{i}.{their}")
        else:
            layer, post = f"bert.encoder.layer.{i}.", kind == "bert"
            take(block + "attn.qkv", *(f"{layer}attention.self.{part}" for part in ("query", "key", "value")))
            take(block + "attn.proj", f"{layer}attention.output.dense")
            take(block + "mlp.fc1", f"{layer}intermediate.dense")
            take(block + "mlp.fc2", f"{layer}output.dense")
            take(block + "norm1", layer + ("attention.output.LayerNorm" if post else "attention.ln"))
            take(block + "norm2", layer + ("output.LayerNorm" if post else "ln"))
    for our, their in {
        "gpt2": (("token_embed", "transformer.wte"), ("pos_embed", "transformer.wpe"), ("norm", "transformer.ln_f")),
        "llama": (("token_embed", "model.embed_tokens"), ("norm", "model.norm")),
        "modernbert": (
            ("token_embed", "model.embeddings.tok_embeddings"), ("embed_norm", "model.embeddings.norm"),
            ("norm", "model.final_norm"),
        ),
    }.get(kind, (
        ("token_embed", "bert.embeddings.word_embeddings"), ("pos_embed", "bert.embeddings.position_embeddings"),
        ("type_embed", "bert.embeddings.token_type_embeddings"), ("embed_norm", "bert.embeddings.LayerNorm"),
        ("norm", "bert.encoder.ln"),
    )):  # fmt: skip
        take(f"encoder.{our}", their)
    for part in ("dense", "norm"):
        take(f"head.{part}", f"head.{part}")
    take("head.dense", "cls.predictions.transform.dense")
    take("head.norm", "cls.predictions.transform.LayerNorm")
    take("next_sentence.dense", "bert.pooler.dense")
    take("next_sentence.score", "cls.seq_relationship")
    take("decoder", "lm_head")
    for their in {"cls.predictions.bias", "decoder.bias"} & theirs.keys():
        found["head.bias"] = theirs[their]
    if kind == "modernbert" and "decoder.weight" in theirs:
        found["head.decoder.weight"] = theirs["decoder.weight"]
    embedding = found["encoder.token_embed.weight"]
    rest = embedding.new_full((128 - VOCAB, WIDTH), filler)
    found["encoder.token_embed.weight"] = torch.cat([embedding, rest])
    return {our: tensor.detach().clone() for our, tensor in found.items()}


class AsWide(TorchFunctionMode):
    """transformers narrows to float32 in Llama's norms and in losses; here those casts widen."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.to and torch.float32 in args[1:]:
            return args[0].double()
        return func(*args, **(kwargs or {}))


def in_width(dtype):
    return AsWide() if dtype == torch.float64 else nullcontext()


def pair_of_models(name: str, dtype: torch.dtype):
    """Theirs with random weights, none at a special value, and ours with the same; padded rows are NaN."""
    torch.manual_seed(0)
    theirs = build_theirs(name).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = build_ours(name).eval()
    ours.load_state_dict(ours_from(name, dict(theirs.named_parameters()), float("nan")))
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    if name.startswith(("llama", "modernbert")):
        kinds = ["full_attention"] if name.startswith("modernbert") else []
        with in_width(dtype):
            places = torch.arange(LENGTH)[None]
            cos, sin = theirs.model.rotary_emb(torch.zeros(1, dtype=dtype), places, *kinds)
        angles = torch.cat([cos, sin])
        # Their frequencies are worked out in float32, ours in float64.
        assert (angles - ours.encoder.rotation).abs().max() <= LENGTH * 2.0**-22
        ours.encoder.rotation.copy_(angles)
    return ours, theirs


def is_causal(name):
    return OURS[name][1].get("causal", False)


def batch_for(name: str, padded: bool) -> TextBatch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (3, LENGTH), generator=generator)
    causal, typeless = is_causal(name), not OURS[name][1].get("token_types")
    documents = torch.zeros(3, LENGTH, dtype=torch.int64) if padded else None
    chosen = torch.rand(3, LENGTH, generator=generator) < 0.3
    labels = torch.randint(VOCAB, (3, LENGTH), generator=generator)
    if documents is not None:
        documents[1, 15:], documents[2, 3:] = -1, -1
        chosen &= documents >= 0
    if causal:
        chosen = torch.arange(LENGTH).expand(3, LENGTH) < LENGTH - 1
        labels = tokens.roll(-1, dims=1)
    place = torch.arange(3)
    return TextBatch(
        tokens=tokens, labels=labels[chosen], where=chosen.flatten().nonzero().flatten(), document_ids=documents,
        positions=None, token_types=None if typeless else torch.randint(2, (3, LENGTH), generator=generator),
        random_next=torch.tensor([1, 0, 1]) if "pairs" in name else None,
        global_batch=3, seed=0, epoch=place * 0, position=place, index=place,
    )  # fmt: skip


def call_theirs(name, theirs, batch):
    labels = torch.full_like(batch.tokens, -100)
    labels.view(-1)[batch.where] = batch.labels
    inputs = {"input_ids": batch.tokens, "labels": labels}
    if is_causal(name):
        inputs["labels"] = batch.tokens
    if batch.token_types is not None:
        inputs["token_type_ids"] = batch.token_types
    if batch.document_ids is not None:
        inputs["attention_mask"] = (batch.document_ids >= 0).long()
    if batch.random_next is not None:
        inputs["next_sentence_label"] = batch.random_next
    out = theirs(**inputs)
    return (out.prediction_logits if batch.random_next is not None else out.logits), out.loss


def call_ours(ours, batch):
    states = ours.encoder.encode(batch).flatten(0, 1)[batch.where]
    logits = ours.logits(batch) if hasattr(ours, "head") else ours.logits(states)
    return logits, ours(batch, float(batch.targets)).loss


def largest_relative(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_logits_loss_and_every_gradient(name, dtype, padded):
    if padded and is_causal(name):
        pytest.skip("causal rows have no padding before a token that counts")
    tolerance = TOLERANCE[dtype]
    ours, theirs = pair_of_models(name, dtype)
    batch = batch_for(name, padded)
    with in_width(dtype):
        (their_logits, their_loss), (our_logits, our_loss) = (
            call_theirs(name, theirs, batch),
            call_ours(ours, batch),
        )
    assert our_logits.dtype == their_logits.dtype == dtype
    assert largest_relative(our_logits, their_logits.flatten(0, 1)[batch.where]) <= tolerance
    assert abs(our_loss.item() - their_loss.item()) <= tolerance * abs(their_loss.item())
    our_loss.backward()
    their_loss.backward()
    expected = ours_from(name, {k: p.grad for k, p in theirs.named_parameters()}, 0.0)
    found = {k: p.grad for k, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert (gradient - expected[key]).norm() <= tolerance * expected[key].norm(), key


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama tied"])
def test_token_by_token_equals_all_at_once_and_their_greedy_generation(name):
    ours, theirs = pair_of_models(name, torch.float64)
    tokens = batch_for(name, False).tokens
    with torch.inference_mode():
        whole = ours.logits(ours.encoder(tokens))
        for cuts in ([1] * LENGTH, [5, 1, 1, 10, LENGTH - 17]):
            caches = [LayerCache() for _ in range(DEPTH)]
            steps = [ours.logits(ours.encoder(part, caches=caches)) for part in tokens.split(cuts, dim=1)]
            assert largest_relative(torch.cat(steps, dim=1), whole) <= 1e-12
        prompt = tokens[:, :4]
        generated = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=LENGTH - 4,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        caches, row, part = [LayerCache() for _ in range(DEPTH)], prompt, prompt
        while row.shape[1] < LENGTH:
            part = ours.logits(ours.encoder(part, caches=caches))[:, -1:].argmax(dim=-1)
            row = torch.cat([row, part], dim=1)
    assert torch.equal(row, generated)


SIZES_PUBLISHED = {
    "BertForMaskedLM": (109_514_298, {"name": "mlm"}, {**BERT, "vocab_size": 30522, "max_length": 512}),
    "BertForPreTraining": (
        110_106_428, {"name": "mlm", "next_sentence": True}, {**BERT, "vocab_size": 30522, "max_length": 512}
    ),
    "GPT2LMHeadModel": (124_439_808, {"name": "clm"}, {"causal": True, "vocab_size": 50257, "max_length": 1024}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIZES_PUBLISHED)
def test_published_sizes(kind):
    """Without the rows that pad the vocabulary to a multiple of 64."""
    published, objective, encoder = SIZES_PUBLISHED[kind]
    config = validate(TextConfig, {"embed_dim": 768, "depth": 12, "num_heads": 12, **encoder})
    with torch.device("meta"):
        ours = validate(MLMConfig if objective["name"] == "mlm" else CLMConfig, objective).build(config)
        defaults = transformers.GPT2Config() if "GPT2" in kind else transformers.BertConfig()
        theirs = getattr(transformers, kind)(defaults)
    padding = (config.padded_vocab - config.vocab_size) * 768
    assert 0 < padding < 64 * 768
    assert sum(p.numel() for p in ours.parameters()) - padding == published
    assert sum(p.numel() for p in theirs.parameters()) == published


def test_planted_bugs_are_caught(monkeypatch):
    """Interleaved rotation, another epsilon, norms on the other side, a swapped gate: none is within 1e-10."""
    ours, theirs = pair_of_models("llama", torch.float64)
    batch = batch_for("llama", False)
    with AsWide(), torch.no_grad():
        expected = call_theirs("llama", theirs, batch)[0].flatten(0, 1)[batch.where]

    def difference():
        with torch.no_grad():
            return largest_relative(call_ours(ours, batch)[0], expected)

    assert difference() <= 1e-10

    def interleaved(x, rotation):
        cos, sin = (part.to(x.dtype).chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for part in rotation)
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        return x * cos + turned * sin

    with monkeypatch.context() as patch:
        patch.setattr("selfsup.layers.attention.rotate", interleaved)
        assert difference() > 1e-6
    ours.encoder.norm.eps = 1e-5
    assert difference() > 1e-10
    ours.encoder.norm.eps = 1e-6
    assert difference() <= 1e-10
    fc1 = ours.encoder.blocks[1].mlp.fc1.weight
    fc1.data = fc1.data.roll(48, dims=0)  # value first
    assert difference() > 1e-6
