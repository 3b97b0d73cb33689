"""Which model of transformers a text encoder's form is, and its config.json.

None of the five has an option for what another does, so that an encoder fits one of them or none.
"""

from typing import Any, Literal

from selfsup.data.tokenizer import TextTokenizer
from selfsup.encoders.text import TextConfig
from selfsup.layers.block import GATED
from selfsup.objectives.clm import CLM
from selfsup.objectives.mlm import MLM

Family = Literal["bert", "megatron-bert", "modernbert", "gpt2", "llama"]

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "quick_gelu": "quick_gelu"}
"""transformers' names for ours."""

_PLAIN: dict[str, tuple[Any, ...]] = {"positions": ("learned",), "norm": ("layer",)}
_BERT_ONLY = {**_PLAIN, "activation": ("gelu", "gelu_tanh")}
FITS: dict[Family, dict[str, tuple[Any, ...]]] = {
    "bert": {"embed_norm": (True,), **_BERT_ONLY},
    "megatron-bert": {"embed_norm": (False,), **_BERT_ONLY},
    "modernbert": {
        "post_norm": (False,),
        "embed_norm": (True,),
        "token_types": (0,),
        "positions": ("rope",),
        "norm": ("layer",),
        "activation": ("geglu",),
    },
    "gpt2": {
        "post_norm": (False,),
        "embed_norm": (False,),
        "token_types": (0,),
        **_PLAIN,
        "activation": tuple(ACTIVATIONS),
    },
    "llama": {
        "post_norm": (False,),
        "embed_norm": (False,),
        "token_types": (0,),
        "positions": ("rope",),
        "norm": ("rms",),
        "activation": ("swiglu",),
    },
}
"""The values of a TextConfig's keys that a family can express; keys that are not here have any."""


def family_of(encoder: TextConfig) -> Family:
    """The family that an encoder belongs to, or is nearest to."""
    modern = encoder.positions == "rope" or encoder.activation in GATED
    if encoder.causal:
        return "llama" if modern or encoder.norm == "rms" else "gpt2"
    if encoder.post_norm:
        return "bert"
    return "modernbert" if modern else "megatron-bert"


def class_name(model: MLM | CLM) -> str:
    """The class of transformers that a model is exported to."""
    if isinstance(model, CLM):
        return {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[family_of(model.encoder.config)]
    family = family_of(model.encoder.config)
    kind = {"bert": "Bert", "megatron-bert": "MegatronBert", "modernbert": "ModernBert"}[family]
    pairs = model.next_sentence is not None and family != "modernbert"  # which has no token types either
    return f"{kind}For{'PreTraining' if pairs else 'MaskedLM'}"


def refuse_unlike(model: MLM | CLM) -> None:
    """Raises ValueError naming the first key that the nearest class of transformers cannot express, and what
    it would have to be."""
    encoder, kind = model.encoder.config, class_name(model)
    family = family_of(encoder)
    for key, values in FITS[family].items():
        got = getattr(encoder, key)
        if got not in values:
            wanted = " or ".join(_yaml(v) for v in values)
            raise ValueError(
                f"--to hf: encoder.{key} is {_yaml(got)}, the nearest model of transformers, {kind}, has {wanted}; "
                f"NOT exported. Only a model trained with encoder.{key}: {wanted} fits"
            )
    if family != "llama" and encoder.kv_heads != encoder.num_heads:
        raise ValueError(
            f"--to hf: encoder.num_kv_heads is {encoder.kv_heads}, {kind} has as many as encoder.num_heads "
            f"{encoder.num_heads}; NOT exported. Only LlamaForCausalLM has fewer"
        )


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def text_config(model: MLM | CLM, tokenizer: TextTokenizer) -> dict[str, Any]:
    """The content of `config.json`; nothing that matters is left to a default."""
    encoder, family = model.encoder.config, family_of(model.encoder.config)
    common = {
        "architectures": [class_name(model)],
        "model_type": family,
        "vocab_size": encoder.vocab_size,
        "initializer_range": encoder.init_std,
        "tie_word_embeddings": model.config.tied,
        "pad_token_id": tokenizer.pad,
    }
    sizes = {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": encoder.mlp_dim,
        "max_position_embeddings": encoder.max_length,
    }
    if family == "modernbert":
        return {
            **common,
            **sizes,
            "hidden_activation": "gelu",
            "classifier_activation": "gelu",
            "norm_eps": encoder.norm_eps,
            "global_attn_every_n_layers": 1,
            **dict.fromkeys(("global_rope_theta", "local_rope_theta"), encoder.rope_base),
            # classifier_bias is the head's dense layer's.
            **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), encoder.bias),
            "decoder_bias": True,
            **dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout"), encoder.dropout),
            "sparse_prediction": False,
            "reference_compile": False,
            **dict.fromkeys(("cls_token_id", "bos_token_id"), tokenizer.cls),
            **dict.fromkeys(("sep_token_id", "eos_token_id"), tokenizer.sep),
        }
    if family == "llama":
        return {
            **common,
            **sizes,
            "num_key_value_heads": encoder.kv_heads,
            "head_dim": encoder.embed_dim // encoder.num_heads,
            "hidden_act": "silu",
            "rms_norm_eps": encoder.norm_eps,
            "rope_theta": encoder.rope_base,
            "attention_bias": encoder.bias,
            "mlp_bias": encoder.bias,
            "attention_dropout": encoder.dropout,
            "bos_token_id": tokenizer.sep,
            "eos_token_id": tokenizer.sep,
        }
    if family == "gpt2":
        return {
            **common,
            "n_embd": encoder.embed_dim,
            "n_layer": encoder.depth,
            "n_head": encoder.num_heads,
            "n_inner": encoder.mlp_dim,
            "n_positions": encoder.max_length,
            "activation_function": ACTIVATIONS[encoder.activation],
            "layer_norm_epsilon": encoder.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), encoder.dropout),
            "bos_token_id": tokenizer.sep,
            "eos_token_id": tokenizer.sep,
        }
    return {
        **common,
        **sizes,
        "type_vocab_size": max(1, encoder.token_types),
        "hidden_act": ACTIVATIONS[encoder.activation],
        "layer_norm_eps": encoder.norm_eps,
        "hidden_dropout_prob": encoder.dropout,
        "attention_probs_dropout_prob": encoder.dropout,
    }
