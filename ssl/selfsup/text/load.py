"""One doorway to runs of text: the whole objective, its tokenizer, and documents read as the run reads them."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from selfsup.batch import TextBatch
from selfsup.checkpoint import Weights, find_checkpoint, load_objective, read_recipe
from selfsup.data.documents import open_texts
from selfsup.data.index import ShardIndex, local_folder
from selfsup.data.rows import TextData
from selfsup.data.source import Source, Texts
from selfsup.data.tokenizer import TextTokenizer, kept_tokenizer
from selfsup.data.tokens import TokenIndex, is_token_folder, open_tokens
from selfsup.encoders.text import TextEncoder
from selfsup.objectives.clm import CLM
from selfsup.objectives.mlm import MLM
from selfsup.recipe import Recipe

_POOLING = {"mean": "mean over tokens", "cls": "first token", "last": "last token"}


@dataclass(frozen=True)
class TextRun:
    """A pretrained run of text in eval mode, without gradients."""

    name: str
    """As asked for."""
    objective: MLM | CLM
    recipe: Recipe
    checkpoint: Path
    """The folder loaded."""
    tokenizer: TextTokenizer
    notes: tuple[str, ...] = ()
    """Damaged checkpoints that were passed over, a sentence each."""
    weights: Weights = "trained"

    @property
    def encoder(self) -> TextEncoder:
        """The encoder alone."""
        return self.objective.encoder

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return self.encoder.config.max_length

    @property
    def separate(self) -> bool:
        """Whether the run has seen documents one by one: none of its tokens saw another document's."""
        data = self.recipe.data
        assert isinstance(data, TextData)
        return data.document_mask or data.packing == "pad"

    @property
    def describe(self) -> str:
        """Architecture and what a feature is, one sentence."""
        c = self.encoder.config
        return f"text {c.embed_dim}/{c.depth}/{c.num_heads}, {_POOLING[c.pool]}"

    def to(self, device: torch.device) -> "TextRun":
        """Moves the objective in place; returns self."""
        self.objective.to(device)
        return self


def load_text_run(source: str, weights: Weights = "trained") -> TextRun:
    """The run or checkpoint folder `source` with the tokenizer that lies in the run folder.

    Raises ValueError for a run of images, for weights that it does not keep, and for a tokenizer that is
    missing or not the one it was trained with.
    """
    checkpoint, _ = find_checkpoint(Path(source))
    recipe = read_recipe(checkpoint)
    if recipe.encoder.reads != "text":
        raise ValueError(
            f"{source}: expected a run of text (objective mlm or clm), got {recipe.objective.name}, which reads "
            f"images; for those: selfsup probe, look, embed"
        )
    objective, recipe, checkpoint, notes = load_objective(Path(source), weights)
    assert isinstance(objective, (MLM, CLM))
    state = json.loads((checkpoint / "state.json").read_text())
    tokenizer = kept_tokenizer(checkpoint.absolute().parent.parent, state.get("tokenizer_sha256"))
    if tokenizer.vocab_size != objective.encoder.config.vocab_size:
        raise ValueError(
            f"{source}: encoder.vocab_size {objective.encoder.config.vocab_size} is not its tokenizer's "
            f"{tokenizer.vocab_size}"
        )
    return TextRun(
        source, objective.requires_grad_(False), recipe, checkpoint, tokenizer, tuple(notes), weights
    )


def open_documents(run: TextRun, shards: str, option: str) -> Source:
    """Documents as the run's tokenizer has them: of token shards, or of text shards, tokenised as they are read.

    option: names the shards in messages. Raises ValueError for token shards of another tokenizer, and for
    what `open_tokens` and `open_texts` refuse.
    """
    if not is_token_folder(local_folder(shards, option)):
        return Texts(open_texts(shards), run.tokenizer)
    index = open_tokens(shards)
    if index.tokenizer_sha256 != run.tokenizer.sha256:
        raise ValueError(
            f"{option} {shards}: token shards of another tokenizer than the run's: expected SHA-256 "
            f"{run.tokenizer.sha256[:12]}..., got {index.tokenizer_sha256[:12]}...; give the text shards, which are "
            f"tokenised as they are read"
        )
    return index


def index_of(source: Source) -> ShardIndex | TokenIndex:
    """The index with labels, classes and fingerprint."""
    return source.index if isinstance(source, Texts) else source


def byte_lengths(source: Source) -> Int64[np.ndarray, "n"]:
    """UTF-8 bytes of each document."""
    return np.asarray(source.index.length if isinstance(source, Texts) else source.bytes, dtype=np.int64)


def batch_of(
    tokens: Int64[np.ndarray, "b l"] | Tensor,
    document_ids: Tensor | None = None,
    positions: Tensor | None = None,
    where: Tensor | None = None,
) -> TextBatch:
    """Rows to look at, (b, l) int64, without targets; the rest as in TextBatch."""
    tokens = torch.as_tensor(tokens)
    numbers = torch.arange(len(tokens), device=tokens.device)
    return TextBatch(
        tokens=tokens,
        labels=numbers[:0],
        where=where,
        document_ids=document_ids,
        positions=positions,
        token_types=None,
        random_next=None,
        global_batch=len(tokens),
        seed=0,
        epoch=torch.zeros_like(numbers),
        position=numbers,
        index=numbers,
    )


def print_notes(run: TextRun) -> None:
    """Says on stderr which checkpoints were passed over."""
    for note in run.notes:
        print(note, file=sys.stderr)
