"""A run's tokenizer as the files that transformers 4 and 5 read.

Written by hand: version 5 names its class `TokenizersBackend` in what it saves, which version 4 refuses.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsup.data.packing import Wrap
from selfsup.data.tokenizer import TOKENIZER_NAME, TextTokenizer, kept_tokenizer
from selfsup.export.verify import Check, check_outputs, quiet_transformers, reload_in
from selfsup.export.write import write_json

EXAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "It isn't over until it's over: 3.14159!",
    "  two  spaces, a\ttab\nand a line break\n\n",
    "Ångström, naïve café, Straße, 東京, здравствуй, 🙂",
    "def f(x): return x ** 2  # (a + b) * c",
    "x",
    "",
)


def run_tokenizer(checkpoint: Path, state: dict[str, Any]) -> TextTokenizer:
    """The tokenizer that lies in the run folder of RUN/checkpoints/step-N.

    state: the content of the checkpoint's state.json. Raises ValueError where it is missing, and where it is
    another than the run was trained with.
    """
    try:
        return kept_tokenizer(checkpoint.absolute().parent.parent, state.get("tokenizer_sha256"))
    except ValueError as error:
        raise ValueError(f"{error}; NOT exported") from None


def write_tokenizer(
    folder: Path, tokenizer: TextTokenizer, wrap: Wrap, max_length: int, token_types: int
) -> None:
    """`tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`."""
    roles = special_tokens(tokenizer, wrap)
    write_json(folder / "tokenizer_config.json", tokenizer_config(roles, wrap, max_length, token_types))
    write_json(folder / "special_tokens_map.json", roles)
    content = tokenizer_content(tokenizer, wrap, token_types)
    (folder / TOKENIZER_NAME).write_text(
        json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def special_tokens(tokenizer: TextTokenizer, wrap: Wrap) -> dict[str, str]:
    """transformers' roles for the special tokens that the run used. A causal model's text ends with [SEP]
    and, as in GPT-2, begins after one."""
    sep = tokenizer.sep
    ours = {"unk_token": tokenizer.unk, "pad_token": tokenizer.pad}
    if wrap == "bert":
        ours |= {"cls_token": tokenizer.cls, "sep_token": sep, "mask_token": tokenizer.mask}
    else:
        ours |= {"bos_token": sep, "eos_token": sep}
    return {role: tokenizer.token(i) for role, i in ours.items() if i is not None}


def tokenizer_config(roles: dict[str, str], wrap: Wrap, max_length: int, token_types: int) -> dict[str, Any]:
    """The content of `tokenizer_config.json`."""
    inputs = ["input_ids", "attention_mask"]
    if wrap == "bert" and token_types > 1:
        # Elsewhere they would do harm: GPT-2 adds the vectors of words 0 and 1 for them, without a word.
        inputs.insert(1, "token_type_ids")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": inputs,
        **roles,
    }


def tokenizer_content(tokenizer: TextTokenizer, wrap: Wrap, token_types: int) -> dict[str, Any]:
    """The run's tokenizer.json, which for `wrap` bert puts [CLS] and [SEP] around texts and pairs of texts."""
    content = json.loads(tokenizer.json)
    content |= {"truncation": None, "padding": None, "post_processor": None}
    if wrap == "gpt":
        return content
    assert tokenizer.cls is not None and tokenizer.sep is not None, "rows of bert were made with them"
    cls, sep = tokenizer.token(tokenizer.cls), tokenizer.token(tokenizer.sep)
    second = 1 if token_types > 1 else 0

    def special(token: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": segment}}

    def text(name: str, segment: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": segment}}

    single = [special(cls, 0), text("A", 0), special(sep, 0)]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", second), special(sep, second)],
        "special_tokens": {
            token: {"id": token, "ids": [i], "tokens": [token]}
            for token, i in ((cls, tokenizer.cls), (sep, tokenizer.sep))
        },
    }
    return content


def check_tokenizer(
    folder: Path, tokenizer: TextTokenizer, wrap: Wrap, max_length: int, token_types: int
) -> Check:
    """Reloads it as transformers' AutoTokenizer: ids of texts, of a pair and of text with [MASK], the roles of
    special tokens, and what ids decode to. Raises ValueError for any difference."""
    import transformers

    library = f"transformers {transformers.__version__} AutoTokenizer"
    with quiet_transformers():
        theirs = reload_in(folder, library, lambda: transformers.AutoTokenizer.from_pretrained(folder))
        got = reload_in(folder, library, lambda: _their_ids(theirs, tokenizer, wrap, token_types))
        names = reload_in(folder, library, lambda: (sorted(theirs("x")), theirs.model_max_length))
        texts = [theirs.decode(ids, skip_special_tokens=True) for ids in _known_ids(tokenizer)]
    expected = [
        "attention_mask",
        "input_ids",
        *(["token_type_ids"] if wrap == "bert" and token_types > 1 else []),
    ]
    if names != (expected, max_length):
        raise ValueError(
            f"{folder}: {library} gives {names}, expected {(expected, max_length)}; NOT exported"
        )
    for text, ids in zip(texts, _known_ids(tokenizer), strict=True):
        if text != tokenizer.decode(ids):
            raise ValueError(
                f"{folder}: {library} decodes to {text!r}, expected {tokenizer.decode(ids)!r}; NOT exported"
            )
    return check_outputs(folder, library, (_our_ids(tokenizer, wrap, token_types),), (got,), 0.0)


def _known_ids(tokenizer: TextTokenizer) -> list[list[int]]:
    """Ids of the examples without [UNK], which the two leave in and out."""
    return [[i for i in ids.tolist() if i != tokenizer.unk] for ids in tokenizer.encode(list(EXAMPLES))]


def _prompt(tokenizer: TextTokenizer) -> str:
    return "A" if tokenizer.mask is None else f"one {tokenizer.token(tokenizer.mask)} two."


def _our_ids(tokenizer: TextTokenizer, wrap: Wrap, token_types: int) -> Tensor:
    """int64 (n,): every example wrapped as in training; then a pair, its segments; then the roles' ids."""
    head, tail = ([tokenizer.cls], [tokenizer.sep]) if wrap == "bert" else ([], [])
    plain = [ids.tolist() for ids in tokenizer.encode(list(EXAMPLES))]
    texts = [*plain, tokenizer.encode_prompt(_prompt(tokenizer)).tolist()]
    found = [i for ids in texts for i in [*head, *ids, *tail]]
    if wrap == "bert":
        first, second = [*head, *plain[0], *tail], [*plain[1], *tail]
        found += [*first, *second]
        if token_types > 1:
            found += [0] * len(first) + [1] * len(second)
        roles = [tokenizer.unk, tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask]
    else:
        roles = [tokenizer.unk, tokenizer.pad, tokenizer.sep, tokenizer.sep]
    return torch.tensor([*found, *(-1 if i is None else i for i in roles)])


def _their_ids(theirs: Any, tokenizer: TextTokenizer, wrap: Wrap, token_types: int) -> Tensor:
    """The same of transformers' tokenizer."""
    found = [i for text in (*EXAMPLES, _prompt(tokenizer)) for i in theirs(text)["input_ids"]]
    if wrap == "bert":
        pair = theirs(EXAMPLES[0], EXAMPLES[1])
        found += pair["input_ids"] + (pair["token_type_ids"] if token_types > 1 else [])
    roles = ("unk", "pad", "cls", "sep", "mask") if wrap == "bert" else ("unk", "pad", "bos", "eos")
    ids = (getattr(theirs, f"{role}_token_id") for role in roles)
    return torch.tensor([*found, *(-1 if i is None else i for i in ids)])
