"""What the tests of text objectives share: batches made by hand; documents, shards and configs for real runs."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.text_making import make_tokenizer, make_tokens
from selfsup.batch import TextBatch
from selfsup.config import validate
from selfsup.data.tokenizer import TextTokenizer
from selfsup.objectives.base import Objective
from selfsup.recipe import Recipe

SMALL = {"vocab_size": 70, "max_length": 20, "embed_dim": 16, "depth": 2, "num_heads": 2}

CONFIG = """
objective: OBJECTIVE
encoder: {vocab_size: VOCAB, max_length: 24, embed_dim: 32, depth: 4, num_heads: 2ENCODER}
data: {shards: SHARDSDATA}
optim: {steps: 20, batch_size: 8, base_lr: 1.0e-2, lr_scaling: none}
run: {workers: 0, log_every: 1, checkpoint_every: 3, picture_every: 0, monitor_every: 0}
"""


def build(name: str, encoder: dict | None = None, **options) -> Objective:
    """A fresh small objective, by way of the recipe's checks."""
    packing = "pairs" if options.get("next_sentence") else "concat"
    content = {
        "objective": {"name": name, **options}, "encoder": {**SMALL, "causal": name == "clm", **(encoder or {})},
        "data": {"shards": "nowhere", "packing": packing}, "run": {"dir": "nowhere"},
    }  # fmt: skip
    recipe = validate(Recipe, content)
    torch.manual_seed(0)
    return recipe.objective.build(recipe.encoder)


def shaken(name: str, encoder: dict | None = None, **options) -> Objective:
    """The same in float64, none of its parameters at a special value."""
    made = build(name, encoder, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def batch_of(
    tokens: Tensor, labels: Tensor, where: Tensor | None, document: Tensor | None = None, **rest
) -> TextBatch:
    """A batch that is the whole global batch unless `rest` says otherwise."""
    number = torch.arange(len(tokens))
    empty = dict.fromkeys(("positions", "token_types", "random_next"))
    keys = {"global_batch": len(tokens), "seed": 0, "epoch": 0 * number, "position": number, "index": number}
    given = {"tokens": tokens, "labels": labels, "where": where, "document_ids": document}
    return TextBatch(**{**empty, **keys, **given, **rest})


def masked(each: list[int], length: int = 20, vocab: int = 70, **rest) -> TextBatch:
    """Random rows with so many random targets each."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, vocab, (len(each), length), generator=generator)
    chosen = [
        torch.randperm(length, generator=generator)[:n].sort().values + r * length for r, n in enumerate(each)
    ]
    labels = torch.randint(5, vocab, (sum(each),), generator=generator)
    return batch_of(tokens, labels, torch.cat(chosen), **rest)


def tokenizer() -> TextTokenizer:
    """Letters; 49 tokens."""
    return make_tokenizer("char")


def make_token_shards(
    folder: Path, documents: int = 60, letters: TextTokenizer | None = None, seed: int = 0
) -> Path:
    """Documents of 2 to 40 random letters, in several shards; letters: a tokenizer of as many."""
    rng = np.random.default_rng(seed)
    made = [rng.integers(5, tokenizer().vocab_size, n).tolist() for n in rng.integers(2, 41, documents)]
    make_tokens(made, folder, letters or tokenizer())
    return folder


def write_text_config(path: Path, shards: Path, objective: str, encoder: str = "", data: str = "") -> Path:
    """A YAML for `selfsup train`; objective: a whole section; encoder, data: more keys for those sections."""
    more = [", " + keys if keys else "" for keys in (encoder, data)]
    content = CONFIG.replace("OBJECTIVE", objective).replace("VOCAB", str(tokenizer().vocab_size))
    path.write_text(
        content.replace("ENCODER", more[0]).replace("SHARDS", str(shards)).replace("DATA", more[1])
    )
    return path
