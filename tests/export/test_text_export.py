"""Text models in transformers: what our folder gives there is what our model gives, and what cannot be is refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from selfsup import cli
from selfsup.checkpoint import load_objective
from selfsup.data.tokenizer import load_tokenizer
from selfsup.export import huggingface_text, tokenizer
from selfsup.export.command import main_export
from selfsup.export.facebook import export_mae
from selfsup.export.huggingface import export_hf
from selfsup.export.huggingface_mae import export_hf_mae
from selfsup.export.huggingface_text import export_hf_text
from selfsup.export.timm import export_timm
from selfsup.export.torchvision import export_torchvision
from selfsup.text.load import batch_of

FILES = {
    "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json",
}  # fmt: skip
PAIRS = {"objective": {"next_sentence": True}, "data": {"packing": "pairs"}}
UNTIED = {"objective": {"tied": False}}
VARIANTS = {
    "bert": ("bert", {}, "BertForMaskedLM"),
    "bert pairs": ("bert", PAIRS, "BertForPreTraining"),
    "bert untied, tanh": ("bert", {**UNTIED, "encoder": {"activation": "gelu_tanh"}}, "BertForMaskedLM"),
    "bert bare": ("bert", {"encoder": {"token_types": 0, "bias": False, "dropout": 0.2}}, "BertForMaskedLM"),
    "megatron": ("megatron", {}, "MegatronBertForMaskedLM"),
    "megatron pairs": ("megatron", {**PAIRS, "encoder": {"hidden_dim": 48}}, "MegatronBertForPreTraining"),
    "megatron untied, bare": (
        "megatron", {**UNTIED, "encoder": {"token_types": 0, "bias": False}}, "MegatronBertForMaskedLM"
    ),
    "modernbert": ("modernbert", {}, "ModernBertForMaskedLM"),
    "modernbert untied, biases": ("modernbert", {**UNTIED, "encoder": {"bias": True}}, "ModernBertForMaskedLM"),
    "modernbert other": (
        "modernbert", {"encoder": {"rope_base": 5e5, "norm_eps": 1e-6, "hidden_dim": 40}}, "ModernBertForMaskedLM"
    ),
    "gpt2": ("gpt2", {}, "GPT2LMHeadModel"),
    "gpt2 untied, no bias": ("gpt2", {**UNTIED, "encoder": {"bias": False, "norm_eps": 1e-6}}, "GPT2LMHeadModel"),
    "gpt2 other": ("gpt2", {"encoder": {"activation": "quick_gelu", "hidden_dim": 40}}, "GPT2LMHeadModel"),
    "llama": ("llama", {}, "LlamaForCausalLM"),
    "llama untied, biases": ("llama", {**UNTIED, "encoder": {"bias": True}}, "LlamaForCausalLM"),
    "llama other": (
        "llama",
        {"objective": {"z_loss": 0.1}, "encoder": {"rope_base": 5e5, "num_kv_heads": None}},
        "LlamaForCausalLM",
    ),
}  # fmt: skip
every_form = pytest.mark.parametrize("form", ["bert", "megatron", "modernbert", "gpt2", "llama"])


def loaded(folder, kind):
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval().requires_grad_(False)


def our_logits(model, tokens):
    batch = batch_of(tokens)
    if hasattr(model, "head"):
        return model.logits(batch).unflatten(0, tokens.shape)
    return model.logits(model.encoder.encode(batch))


@pytest.mark.parametrize(("form", "changes", "kind"), VARIANTS.values(), ids=VARIANTS)
def test_transformers_gives_our_outputs(make_text_run, run_card, form, changes, kind):
    run = make_text_run(form, changes)
    report = export_hf_text(run)
    assert report.folder == run / "export" / "hf-step-7"
    assert {p.name for p in report.folder.iterdir()} == FILES
    model, recipe, *_ = load_objective(run)
    library = f"transformers {transformers.__version__}"
    assert [(c.library, c.dtype) for c in report.checks] == [
        (f"{library} {kind}", "float32"),
        (f"{library} {kind}", "float64"),
        *([(f"{library} {kind} rotary angles", "float32")] if form in ("modernbert", "llama") else []),
        (f"{library} AutoTokenizer", "int64"),
    ]
    theirs = loaded(report.folder, kind)
    tokens = torch.randint(recipe.encoder.vocab_size, (2, 40))
    with torch.no_grad():
        output, ours = theirs(tokens), our_logits(model, tokens)
    logits = output.prediction_logits if "next_sentence" in changes.get("objective", {}) else output.logits
    assert (logits - ours).abs().max() <= 1e-5 * ours.abs().max()  # nothing of the library patched here
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied == model.config.tied == theirs.config.tie_word_embeddings
    rows = len(theirs.get_input_embeddings().weight)
    assert rows == recipe.encoder.vocab_size < len(model.encoder.token_embed.weight)
    (variables,) = run_card(report.folder, torch.zeros(1))
    card = (report.folder / "README.md").read_text()
    if form in ("bert", "megatron", "modernbert"):
        assert len(variables["guesses"]) == 5 and "pipeline_tag: fill-mask" in card
    else:
        assert 2 <= variables["tokens"].shape[1] <= 40 and "pipeline_tag: text-generation" in card
    assert all(check.sentence in card for check in report.checks) and all(
        note in card for note in report.notes
    )
    assert bool(report.notes) == (name_of(changes) != "")


def name_of(changes):
    """What transformers has beyond the model: said."""
    encoder = changes.get("encoder", {})
    extra = [key for key in ("token_types", "bias") if encoder.get(key, True) in (0, False)]
    return " ".join([*extra, *(["z_loss"] if "z_loss" in changes.get("objective", {}) else [])])


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_greedy_generation_is_ours(make_text_run, form):
    run = make_text_run(form)
    model, *_ = load_objective(run)
    theirs = loaded(export_hf_text(run).folder, type_of(form))
    sep = load_tokenizer(run).sep
    assert theirs.generation_config.eos_token_id == theirs.generation_config.bos_token_id == sep
    row = prompt = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        while row.shape[1] < 40:
            row = torch.cat([row, our_logits(model, row)[:, -1:].argmax(dim=-1)], dim=1)
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 37}
        assert torch.equal(theirs.generate(prompt, eos_token_id=None, pad_token_id=0, **options), row)


def type_of(form):
    return {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[form]


KEPT_ONCE = {
    "bert": "decoder", "megatron": "decoder", "modernbert": "decoder.weight", "gpt2": "lm_head", "llama": "lm_head"
}  # fmt: skip


@every_form
def test_a_tied_head_is_stored_once_and_an_untied_one_on_its_own(make_text_run, form):
    tied = load_file(export_hf_text(make_text_run(form, name="tied")).folder / "model.safetensors")
    untied = load_file(
        export_hf_text(make_text_run(form, UNTIED, name="untied")).folder / "model.safetensors"
    )
    assert not [name for name in tied if KEPT_ONCE[form] in name]
    assert any(KEPT_ONCE[form] in name for name in untied)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "char"])
@pytest.mark.parametrize("form", ["bert", "gpt2"])
def test_the_tokenizer_is_the_runs(make_text_run, form, kind):
    run = make_text_run(form, kind=kind)
    ours = load_tokenizer(run)
    theirs = transformers.AutoTokenizer.from_pretrained(export_hf_text(run).folder)
    head, tail = ([ours.cls], [ours.sep]) if form == "bert" else ([], [])
    for text in ("The fox, twice!", "no\n  such  é thing", ""):
        ids = ours.encode([text])[0].tolist()
        assert theirs(text)["input_ids"] == [*head, *ids, *tail]
        known = [i for i in ids if i != ours.unk]
        assert theirs.decode(known, skip_special_tokens=True) == ours.decode(known)
    assert (
        theirs("a [MASK] b", add_special_tokens=False)["input_ids"]
        == ours.encode_prompt("a [MASK] b").tolist()
    )
    assert theirs.pad_token_id == ours.pad and theirs.model_max_length == 40
    assert len(theirs("The fox " * 40, truncation=True)["input_ids"]) == 40
    if form == "bert":
        pair = theirs("The fox", "box")
        a, b = (ours.encode([text])[0].tolist() for text in ("The fox", "box"))
        assert pair["input_ids"] == [ours.cls, *a, ours.sep, *b, ours.sep]
        assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert theirs.mask_token_id == ours.mask
    else:
        assert theirs.eos_token_id == theirs.bos_token_id == ours.sep and "token_type_ids" not in theirs("x")


def test_without_token_types_there_are_no_segments(make_text_run):
    folder = export_hf_text(make_text_run("bert", {"encoder": {"token_types": 0}})).folder
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    pair = theirs("The fox", "box", return_tensors="pt")
    assert sorted(pair) == ["attention_mask", "input_ids"]
    assert loaded(folder, "BertForMaskedLM")(**pair).logits.isfinite().all()


def refused(run, match, export=export_hf_text):
    with pytest.raises(ValueError, match=match):
        export(run)
    assert not (run / "export").exists() or list((run / "export").iterdir()) == []


REFUSED = [
    ("bert", {"embed_norm": False}, "encoder.embed_norm is false, .*BertForMaskedLM, has true"),
    ("bert", {"positions": "alibi"}, "encoder.positions is alibi, .* learned"),
    ("bert", {"norm": "rms"}, "encoder.norm is rms, .*BertForMaskedLM, has layer"),
    ("bert", {"activation": "quick_gelu"}, "encoder.activation is quick_gelu, .*has gelu or gelu_tanh"),
    ("bert", {"num_kv_heads": 2}, "encoder.num_kv_heads is 2, BertForMaskedLM has as many as encoder.num_heads 4"),
    ("megatron", {"embed_norm": True}, "encoder.embed_norm is true, .*MegatronBertForMaskedLM, has false"),
    ("megatron", {"positions": "alibi"}, "encoder.positions is alibi, .*MegatronBertForMaskedLM, has learned"),
    ("megatron", {"positions": "rope"}, "encoder.embed_norm is false, .*ModernBertForMaskedLM, has true"),
    ("megatron", {"activation": "geglu"}, "encoder.embed_norm is false, .*ModernBertForMaskedLM, has true"),
    ("modernbert", {"positions": "learned"}, "encoder.positions is learned, .*ModernBertForMaskedLM, has rope"),
    ("modernbert", {"token_types": 2}, "encoder.token_types is 2, .*ModernBertForMaskedLM, has 0"),
    ("modernbert", {"norm": "rms"}, "encoder.norm is rms, .*ModernBertForMaskedLM, has layer"),
    ("modernbert", {"activation": "swiglu"}, "encoder.activation is swiglu, .*has geglu"),
    ("modernbert", {"activation": "gelu"}, "encoder.activation is gelu, .*has geglu"),
    ("modernbert", {"post_norm": True}, "encoder.positions is rope, .* BertForMaskedLM, has learned"),
    ("modernbert", {"num_kv_heads": 2}, "encoder.num_kv_heads is 2, ModernBertForMaskedLM has as many"),
    ("gpt2", {"positions": "none"}, "encoder.positions is none, .*GPT2LMHeadModel, has learned"),
    ("gpt2", {"positions": "alibi"}, "encoder.positions is alibi, .*GPT2LMHeadModel, has learned"),
    ("gpt2", {"token_types": 2}, "encoder.token_types is 2, .*has 0"),
    ("gpt2", {"post_norm": True}, "encoder.post_norm is true, .*has false"),
    ("gpt2", {"positions": "rope"}, "encoder.norm is layer, .*LlamaForCausalLM, has rms"),
    ("gpt2", {"num_kv_heads": 1}, "encoder.num_kv_heads is 1, GPT2LMHeadModel .*Only LlamaForCausalLM has fewer"),
    ("llama", {"activation": "geglu"}, "encoder.activation is geglu, .*LlamaForCausalLM, has swiglu"),
    ("llama", {"activation": "gelu"}, "encoder.activation is gelu, .*has swiglu"),
    ("llama", {"positions": "alibi"}, "encoder.positions is alibi, .*has rope"),
    ("llama", {"embed_norm": True}, "encoder.embed_norm is true, .*has false"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "encoder", "match"), REFUSED)
def test_what_no_model_of_transformers_is_is_refused_by_name(make_text_run, form, encoder, match):
    run = make_text_run(form, {"encoder": encoder})
    refused(run, f"--to hf: {match}")
    refused(run, "NOT exported")


@pytest.mark.parametrize(
    ("export", "to"),
    [(export_timm, "timm"), (export_torchvision, "torchvision"), (export_hf, "hf")],
)
def test_exports_of_images_refuse_text_by_name(make_text_run, export, to):
    match = f"--to {to}: encoder.name is text, expected an encoder of images; NOT exported, use --to hf"
    refused(make_text_run("bert"), match, export)


@pytest.mark.parametrize("export", [export_mae, export_hf_mae])
def test_exports_of_autoencoders_refuse_text_by_name(make_text_run, export):
    refused(make_text_run("gpt2"), "expected objective.name mae, got clm; NOT exported.*--to hf$", export)


def test_images_are_refused_here(make_run):
    refused(make_run(), "expected objective.name mlm or clm, got mae")


def test_the_command_takes_both(make_run, make_text_run, capsys, monkeypatch):
    main_export(make_run(name="images"), to="hf")
    main_export(make_text_run("llama", name="text"), to="hf")
    out = capsys.readouterr().out
    assert "ViTModel, float64" in out and "LlamaForCausalLM, float64" in out and "AutoTokenizer" in out
    monkeypatch.setattr("sys.argv", ["selfsup", "export", str(make_text_run("bert", name="other"))])
    assert cli.main() == 2
    assert "--to timm: encoder.name is text" in capsys.readouterr().err


def test_a_missing_or_another_tokenizer_is_named(make_text_run, tokenizers, tmp_path):
    run = make_text_run("bert")
    (run / "tokenizer.json").write_text(tokenizers["char"].json)
    refused(
        run, "tokenizer.json: not the tokenizer of this run: expected SHA-256 .*; put back .*NOT exported"
    )
    (run / "tokenizer.json").unlink()
    refused(run, "tokenizer.json: missing; .*NOT exported")
    away = shutil.copytree(run / "checkpoints" / "step-00000007", tmp_path / "away")
    with pytest.raises(ValueError, match="tokenizer.json: missing"):
        export_hf_text(away, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_has_no_private_path(make_text_run):
    data = {
        "shards": "/home/someone/docs/texts",
        "tokenizer": "/home/someone/docs/tokenizer.json",
        "packing": "pad",
    }
    text = (export_hf_text(make_text_run("bert", {"data": data})).folder / "README.md").read_text()
    assert "someone" not in text and "docs/texts" in text and "docs/tokenizer.json" in text


def test_averaged_weights_are_asked_for_by_name(make_text_run):
    run = make_text_run("gpt2", {"optim": {"ema": 0.9}})
    plain, averaged = export_hf_text(run), export_hf_text(run, weights="ema")
    assert averaged.folder.name == "hf-step-7-ema"
    files = [(report.folder / "model.safetensors").read_bytes() for report in (plain, averaged)]
    assert files[0] != files[1]
    with pytest.raises(ValueError, match="keeps no averaged weights"):
        export_hf_text(make_text_run("gpt2", name="without"), weights="ema")


def swapped(weights, a, b):
    return {**weights, a: weights[b], b: weights[a]}


def transposed(weights, name):
    return {**weights, name: weights[name].T.contiguous()}


def without(weights, name):
    return {k: v for k, v in weights.items() if k != name}


def rolled(weights, name, rows):
    return {**weights, name: weights[name].roll(rows, dims=-1 if "c_attn" in name else 0).contiguous()}


def own_decoder(weights, name):
    """A head of its own, where the trained one is tied."""
    embedding = next(v for k, v in weights.items() if k.endswith(("word_embeddings.weight", "wte.weight")))
    return {**weights, name: embedding.flip(0).contiguous()}


BERT = "bert.encoder.layer.1."
GPT2 = "transformer.h.1."
LLAMA = MODERN = "model.layers.1."
WEIGHTS = [
    ("bert", swapped, f"{BERT}attention.self.query.weight", f"{BERT}attention.self.key.weight"),
    ("bert", swapped, f"{BERT}attention.output.LayerNorm.bias", f"{BERT}output.LayerNorm.bias"),
    ("bert", transposed, f"{BERT}attention.output.dense.weight"),
    ("bert", rolled, "bert.embeddings.position_embeddings.weight", 1),
    ("bert", rolled, "bert.embeddings.token_type_embeddings.weight", 1),
    ("bert", rolled, "cls.predictions.bias", 1),
    ("bert", without, "cls.predictions.bias"),
    ("megatron", swapped, f"{BERT}attention.ln.weight", f"{BERT}ln.weight"),
    ("megatron", without, "bert.encoder.ln.weight"),
    ("modernbert", rolled, f"{MODERN}mlp.Wi.weight", 128),  # value first: 2/3 of 4 * 32, in sixty-fours
    ("modernbert", rolled, f"{MODERN}attn.Wqkv.weight", 32),
    ("modernbert", swapped, f"{MODERN}attn_norm.weight", f"{MODERN}mlp_norm.weight"),
    ("modernbert", swapped, "head.norm.weight", "model.final_norm.weight"),
    ("modernbert", rolled, "decoder.bias", 1),
    ("modernbert", without, "decoder.bias"),
    ("gpt2", rolled, f"{GPT2}attn.c_attn.weight", 32),
    ("gpt2", transposed, f"{GPT2}attn.c_proj.weight"),
    ("gpt2", transposed, f"{GPT2}mlp.c_fc.weight"),
    ("llama", swapped, f"{LLAMA}mlp.gate_proj.weight", f"{LLAMA}mlp.up_proj.weight"),
    ("llama", swapped, f"{LLAMA}self_attn.k_proj.weight", f"{LLAMA}self_attn.v_proj.weight"),
    ("llama", without, f"{LLAMA}input_layernorm.weight"),
]


@pytest.mark.parametrize(
    ("form", "fault", "names"), [(form, fault, names) for form, fault, *names in WEIGHTS]
)
def test_fault_in_the_weights_is_caught(make_text_run, monkeypatch, form, fault, names):
    original = huggingface_text.text_weights
    monkeypatch.setattr(huggingface_text, "text_weights", lambda model: fault(original(model), *names))
    refused(make_text_run(form), "NOT exported")


CONFIGS = [
    ("bert", {"layer_norm_eps": 1e-5}),
    ("bert", {"hidden_act": "gelu_new"}),
    ("bert", {"num_attention_heads": 2}),
    ("bert", {"max_position_embeddings": 41}),
    ("bert", {"tie_word_embeddings": False}),
    ("bert", {"vocab_size": 320}),
    ("megatron", {"layer_norm_eps": 1e-12}),
    ("modernbert", {"norm_eps": 1e-12}),
    ("modernbert", {"global_rope_theta": 10001.0}),
    ("modernbert", {"hidden_activation": "gelu_new"}),
    ("modernbert", {"classifier_activation": "silu"}),
    ("modernbert", {"norm_bias": True}),
    ("modernbert", {"classifier_bias": True}),
    ("modernbert", {"global_attn_every_n_layers": 2, "local_attention": 16}),
    ("gpt2", {"layer_norm_epsilon": 1e-6}),
    ("gpt2", {"activation_function": "gelu"}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("llama", {"rms_norm_eps": 1e-6}),
    ("llama", {"rope_theta": 10001.0}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"attention_bias": True}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "fault"), CONFIGS)
def test_fault_in_the_config_is_caught(make_text_run, monkeypatch, form, fault):
    original = huggingface_text.text_config
    monkeypatch.setattr(huggingface_text, "text_config", lambda *a: {**original(*a), **fault})
    refused(make_text_run(form), "NOT exported")


def interleaved(x, rotation):
    """Pairs of neighbouring channels turned, as GPT-J has them, not halves."""
    cos, sin = (part.to(x.dtype).chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for part in rotation)
    return x * cos + torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2) * sin


@pytest.mark.parametrize("form", ["modernbert", "llama"])
def test_another_layout_of_the_rotation_is_caught(make_text_run, monkeypatch, form):
    monkeypatch.setattr("selfsup.layers.attention.rotate", interleaved)
    refused(make_text_run(form), "largest difference")


@pytest.mark.parametrize(
    ("form", "name"), [("bert", "cls.predictions.decoder.weight"), ("gpt2", "lm_head.weight")]
)
def test_an_untied_head_is_no_tied_one(make_text_run, monkeypatch, form, name):
    """Another decoder written, and the config told so: what trained was tied."""
    weights, config = huggingface_text.text_weights, huggingface_text.text_config

    def faulty(model):
        found = own_decoder(weights(model), name)
        bias = found.get("cls.predictions.bias")
        return found if bias is None else {**found, "cls.predictions.decoder.bias": bias.clone()}

    monkeypatch.setattr(huggingface_text, "text_weights", faulty)
    monkeypatch.setattr(
        huggingface_text, "text_config", lambda *a: {**config(*a), "tie_word_embeddings": False}
    )
    refused(make_text_run(form), "largest difference")


TOKENIZERS = [
    ("bert", "tokenizer_content", {"post_processor": None}),
    ("gpt2", "tokenizer_content", {"normalizer": {"type": "Lowercase"}}),
    ("bert", "tokenizer_config", {"mask_token": "[SEP]"}),
    ("bert", "tokenizer_config", {"model_input_names": ["input_ids", "attention_mask"]}),
    ("gpt2", "tokenizer_config", {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}),
    ("gpt2", "tokenizer_config", {"eos_token": "[CLS]"}),
    ("gpt2", "tokenizer_config", {"model_max_length": 512}),
]


@pytest.mark.parametrize(("form", "maker", "fault"), TOKENIZERS)
def test_fault_in_the_tokenizers_files_is_caught(make_text_run, monkeypatch, form, maker, fault):
    original = getattr(tokenizer, maker)
    monkeypatch.setattr(tokenizer, maker, lambda *a: {**original(*a), **fault})
    if maker == "tokenizer_config" and (role := next(iter(fault))).endswith("_token"):
        special = tokenizer.special_tokens
        monkeypatch.setattr(tokenizer, "special_tokens", lambda *a: {**special(*a), role: fault[role]})
    refused(make_text_run(form), "NOT exported")


def test_a_tensor_without_a_place_is_never_dropped(make_text_run, monkeypatch):
    original = huggingface_text.float_weights
    more = {"encoder.blocks.0.attn.sink.weight": torch.zeros(4)}
    monkeypatch.setattr(huggingface_text, "float_weights", lambda model: original(model) | more)
    refused(make_text_run("gpt2"), "sink")


def test_config_names_the_class(make_text_run):
    config = json.loads((export_hf_text(make_text_run("llama")).folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
