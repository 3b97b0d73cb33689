"""Export of text models to transformers: BERT, Megatron-BERT (BERT with the norms in front), ModernBERT, GPT-2,
Llama.

The encoder's form decides which (text_forms.py). The tensors get the names of transformers 4, which version 5
reads too. A tied head is stored once and tied again on loading.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from selfsup.checkpoint import Weights, load_objective
from selfsup.export.card import Usage, model_card
from selfsup.export.huggingface import expect_transformers, reload_in_transformers
from selfsup.export.names import float_weights, rename, split_qkv
from selfsup.export.text_forms import Family, class_name, family_of, refuse_unlike, text_config
from selfsup.export.text_outputs import check_angles, example, our_outputs, their_outputs, with_our_angles
from selfsup.export.tokenizer import check_tokenizer, run_tokenizer, write_tokenizer
from selfsup.export.verify import Check, compare, quiet_transformers
from selfsup.export.write import ExportReport, destination, read_state, staged, write_json, write_weights
from selfsup.objectives.clm import CLM
from selfsup.objectives.mlm import MLM

BERT_HEADS = {
    "token_embed.weight": "bert.embeddings.word_embeddings.weight",
    "pos_embed.weight": "bert.embeddings.position_embeddings.weight",
    "type_embed.weight": "bert.embeddings.token_type_embeddings.weight",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.bias": "cls.predictions.bias",
    "head.decoder": "cls.predictions.decoder",
    "next_sentence.dense": "bert.pooler.dense",
    "next_sentence.score": "cls.seq_relationship",
}
BERT_LAYER = {
    "attn.query": "attention.self.query",
    "attn.key": "attention.self.key",
    "attn.value": "attention.self.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


MAY_LACK_BIASES: tuple[Family, ...] = ("modernbert", "llama")
"""Families whose config says whether there are biases; the others always have them."""


class Names(NamedTuple):
    """A family's names for our tensors, as `rename` takes them."""

    outside: dict[str, str]
    blocks: str
    inside: dict[str, str]


NAMES: dict[Family, Names] = {
    "bert": Names(
        {**BERT_HEADS, "embed_norm": "bert.embeddings.LayerNorm"},
        "bert.encoder.layer.",
        {**BERT_LAYER, "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"},
    ),
    "megatron-bert": Names(
        {**BERT_HEADS, "norm": "bert.encoder.ln"},
        "bert.encoder.layer.",
        {**BERT_LAYER, "norm1": "attention.ln", "norm2": "ln"},
    ),
    "modernbert": Names(
        {
            "token_embed": "model.embeddings.tok_embeddings",
            "embed_norm": "model.embeddings.norm",
            "norm": "model.final_norm",
            "head.dense": "head.dense",
            "head.norm": "head.norm",
            "head.bias": "decoder.bias",
            "head.decoder": "decoder",
        },
        "model.layers.",
        {
            "norm1": "attn_norm",
            "attn.qkv": "attn.Wqkv",
            "attn.proj": "attn.Wo",
            "norm2": "mlp_norm",
            "mlp.fc1": "mlp.Wi",
            "mlp.fc2": "mlp.Wo",
        },
    ),
    "gpt2": Names(
        {
            "token_embed": "transformer.wte",
            "pos_embed": "transformer.wpe",
            "norm": "transformer.ln_f",
            "decoder": "lm_head",
        },
        "transformer.h.",
        {
            "norm1": "ln_1",
            "attn.qkv": "attn.c_attn",
            "attn.proj": "attn.c_proj",
            "norm2": "ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        },
    ),
    "llama": Names(
        {"token_embed": "model.embed_tokens", "norm": "model.norm", "decoder": "lm_head"},
        "model.layers.",
        {
            "norm1": "input_layernorm",
            "attn.query": "self_attn.q_proj",
            "attn.key": "self_attn.k_proj",
            "attn.value": "self_attn.v_proj",
            "attn.proj": "self_attn.o_proj",
            "norm2": "post_attention_layernorm",
            "mlp.gate": "mlp.gate_proj",
            "mlp.up": "mlp.up_proj",
            "mlp.fc2": "mlp.down_proj",
        },
    ),
}


def export_hf_text(source: Path, out: Path | None = None, weights: Weights = "trained") -> ExportReport:
    """Writes a folder that transformers loads, versions 4.57 and 5: model with its head, and tokenizer.

    Arguments and the way it appears as in `export_timm`; default RUN/export/hf-step-N. Raises ValueError where
    the source is no run of text, for a form that no class of transformers has, for a tokenizer that is missing
    or another, where anything differs when reloaded, and without transformers.
    """
    model, recipe, checkpoint, passed_over = load_objective(source, weights)
    if not isinstance(model, (MLM, CLM)):
        raise ValueError(
            f"--to hf: expected objective.name mlm or clm, got {recipe.objective.name}; NOT exported, use export_hf"
        )
    refuse_unlike(model)
    expect_transformers("hf")
    state = read_state(checkpoint)
    tokenizer = run_tokenizer(checkpoint, state)
    notes, final = remarks(model), destination("hf", checkpoint, state["step"], out, weights)
    usage = _usage(model, notes)
    layout = (model.config.wrap, model.encoder.config.max_length, model.encoder.config.token_types)
    with staged(final) as tmp:
        write_weights(tmp, text_weights(model))
        write_json(tmp / "config.json", text_config(model, tokenizer))
        write_tokenizer(tmp, tokenizer, *layout)
        checks = (*verify(tmp, model), check_tokenizer(tmp, tokenizer, *layout))
        (tmp / "README.md").write_text(model_card(recipe, state, weights, checks, (), usage))
    return ExportReport(final, checkpoint, state["step"], checks, (*passed_over, *notes), usage.load)


def text_weights(model: MLM | CLM) -> dict[str, Tensor]:
    """All of a model's tensors under the names of transformers 4, the vocabulary without its padded rows."""
    encoder, family = model.encoder.config, family_of(model.encoder.config)
    ours = {name.removeprefix("encoder."): tensor for name, tensor in float_weights(model).items()}
    ours["token_embed.weight"] = ours["token_embed.weight"][: encoder.vocab_size].clone()
    if family not in MAY_LACK_BIASES:
        ours |= zero_biases(model)
    if isinstance(model, MLM) and family != "modernbert":
        ours.setdefault("type_embed.weight", torch.zeros(1, encoder.embed_dim))
        if model.head.decoder is not None:
            ours["head.decoder.bias"] = ours["head.bias"].clone()  # version 4 has one, under two names
    if family == "gpt2":  # its linear layers hold their weights transposed
        linear = tuple(f"{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
        ours = {k: v.T.contiguous() if k.endswith(linear) else v for k, v in ours.items()}
    elif family != "modernbert":  # its layers are fused as ours
        ours = split_qkv(ours, (encoder.num_heads, encoder.kv_heads, encoder.kv_heads))
    if family == "llama":
        ours = split_gate(ours)
    return rename(ours, *NAMES[family])


def zero_biases(model: MLM | CLM) -> dict[str, Tensor]:
    """The same function where transformers always has biases: zeros where linear layers and norms have none."""
    layers = dict(model.encoder.blocks.named_modules(prefix="blocks"))
    layers |= {name: getattr(model.encoder, name) for name in ("embed_norm", "norm")}
    if isinstance(model, MLM):
        layers |= {f"head.{name}": getattr(model.head, name) for name in ("dense", "norm")}
    return {
        f"{name}.bias": torch.zeros(len(layer.weight))
        for name, layer in layers.items()
        if isinstance(layer, (torch.nn.Linear, torch.nn.LayerNorm)) and layer.bias is None
    }


def split_gate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """swiglu's fused `mlp.fc1` as `mlp.gate` and `mlp.up`, half of the rows each."""
    split = {}
    for name, tensor in weights.items():
        if ".mlp.fc1." not in name:
            split[name] = tensor
            continue
        for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
            split[name.replace("fc1", part)] = rows.clone()  # safetensors saves no shared memory
    return split


def verify(folder: Path, model: MLM | CLM) -> tuple[Check, ...]:
    """Reloads the folder as its class and compares it with ours, in float32 and float64: last states over the
    whole length, logits and loss of short rows, scores of the next sentence. Raises ValueError where weights are
    missing or unexpected, or outputs differ (see `compare`)."""
    given, kind = example(model), class_name(model)
    # Megatron-BERT has its own attention only; it computes in the type that it is given. Version 4's ModernBERT
    # takes flash-attn where that is installed, which has no float32.
    attention = {"megatron-bert": "eager", "modernbert": "sdpa"}.get(family_of(model.encoder.config))
    options = {} if attention is None else {"attn_implementation": attention}
    reloaded = reload_in_transformers(folder, kind, options, lambda module, _: their_outputs(module, given))
    angles = ()
    if model.encoder.config.positions == "rope":
        angles = (check_angles(folder, reloaded, model),)
        reloaded = with_our_angles(reloaded, model)
    with quiet_transformers():
        checks = compare(
            folder, model, lambda model, _: our_outputs(model, given), [reloaded], given.rows.tokens
        )
    return (*checks, *angles)


def remarks(model: MLM | CLM) -> tuple[str, ...]:
    """What transformers' model has beyond the trained one, a sentence each."""
    encoder, kind, found = model.encoder.config, class_name(model), []
    family = family_of(encoder)
    if isinstance(model, MLM) and encoder.token_types == 0 and family != "modernbert":
        found.append(f"Trained without token types; {kind} always adds a vector for them: one, of zeros.")
    if not encoder.bias and family not in MAY_LACK_BIASES:
        found.append(f"Trained without biases; {kind} always has them: zeros.")
    if isinstance(model, CLM) and model.config.z_loss:
        found.append(
            f"Trained with z_loss {model.config.z_loss}; the loss of {kind} is the cross-entropy alone."
        )
    return tuple(found)


def _usage(model: MLM | CLM, notes: tuple[str, ...]) -> Usage:
    kind = class_name(model)
    if isinstance(model, MLM):
        contents, auto = "Encoder and head: it predicts masked tokens.", "AutoModelForMaskedLM"
        code = """
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("DIR")
model = AutoModelForMaskedLM.from_pretrained("DIR")
guesses = pipeline("fill-mask", model=model, tokenizer=tokenizer)(f"the {tokenizer.mask_token} is")
"""
        tail = (
            "`AutoModel` gives the encoder alone, without the head"
            + ("." if model.next_sentence else "; the pooler that it then adds is random.")
            + " For a feature take the mean of `last_hidden_state` over the text's tokens.",
        )
    else:
        contents, auto = "It predicts the next token.", "AutoModelForCausalLM"
        new = max(1, min(40, model.encoder.config.max_length // 2))
        code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIR")
model = AutoModelForCausalLM.from_pretrained("DIR").eval()
tokens = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens={new})
text = tokenizer.decode(tokens[0])
"""
        tail = ()
    pairs = ", scores of the next sentence" if getattr(model, "next_sentence", None) is not None else ""
    return Usage(
        tags=("transformers",),
        contents=contents,
        code=(code,),
        load=f'transformers.{auto}.from_pretrained("DIR"), a {kind}, and AutoTokenizer.from_pretrained("DIR")',
        compared="Reloaded from this folder and compared with the trained model: last states, logits, loss"
        f"{pairs}; of the tokenizer the ids of example texts",
        remarks=(*tail, *notes),
    )
