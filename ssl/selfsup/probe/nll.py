"""What a model makes of tokens, summed: -log p of each from those before it, or from all others."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from selfsup.batch import TextBatch
from selfsup.data.text import document_positions
from selfsup.layers.cross_entropy import linear_cross_entropy
from selfsup.objectives.clm import CLM
from selfsup.objectives.mlm import MLM
from selfsup.text.load import batch_of


class Summed(NamedTuple):
    """What is known of a model on some tokens."""

    nll: float
    """Sum of -log p, nats."""
    tokens: int
    """How many were predicted."""


class Window(NamedTuple):
    """A row of the stream: tokens begin .. end - 1 are read, the token after each is predicted."""

    begin: int
    end: int
    counted: int
    """Predictions of tokens below this were counted in an earlier row."""


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Rows of at most `length` tokens, one every `stride`, that predict tokens 1 .. tokens - 1, each counted once.

    With stride = length they are training's rows of packing concat, unshifted, the last one shorter.
    """
    begin, counted = 0, 1
    while counted < tokens:
        end = min(begin + length, tokens - 1)
        yield Window(begin, end, counted)
        begin, counted = begin + stride, end + 1


@torch.inference_mode()
def causal_nll(
    model: CLM,
    documents: list[Int64[np.ndarray, "_"]],
    sep: int,
    stride: int | None = None,
    separate: bool = False,
    batch_size: int = 32,
) -> Summed:
    """-log p of the tokens of all documents end to end, `sep` behind each.

    stride: see `windows`; none: encoder.max_length. separate: a token sees its own document only, at positions
    that begin anew in each document of a row, as with data.document_mask; first tokens are not predicted then.
    """
    device, length = model.word_weights.device, model.encoder.config.max_length
    stream = np.concatenate([np.append(ids, sep) for ids in documents])
    owner = np.repeat(np.arange(len(documents)), [len(ids) + 1 for ids in documents])
    rows = list(windows(len(stream), length, stride or length))
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    bar = tqdm(range(0, len(rows), batch_size), desc="perplexity", unit="batch", disable=None)
    for first in bar:
        batch, labels = _causal_batch(rows[first : first + batch_size], stream, owner, separate)
        batch, labels = batch.to(device), labels.to(device)
        states = model.encoder.encode(batch).flatten(0, 1)[batch.where]
        total += token_nll(states, model.word_weights, None, labels)
        count += len(labels)
    return Summed(float(total), count)


def _causal_batch(
    rows: list[Window], stream: np.ndarray, owner: np.ndarray, separate: bool
) -> tuple[TextBatch, Tensor]:
    """The rows, and the tokens to predict at the batch's `where`."""
    width = max(row.end - row.begin for row in rows)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    document = np.full((len(rows), width), -1, dtype=np.int64)
    labels = np.full((len(rows), width), -1, dtype=np.int64)
    for i, (begin, end, counted) in enumerate(rows):
        n = end - begin
        tokens[i, :n] = stream[begin:end]
        document[i, :n] = owner[begin:end] if separate else 0
        wanted = np.arange(begin + 1, end + 1) >= counted
        if separate:
            wanted &= owner[begin + 1 : end + 1] == owner[begin:end]
        labels[i, :n][wanted] = stream[begin + 1 : end + 1][wanted]
    where = np.flatnonzero(labels.reshape(-1) >= 0)
    hides = separate or bool((document < 0).any())
    batch = batch_of(
        tokens,
        document_ids=torch.from_numpy(document) if hides else None,
        positions=torch.from_numpy(document_positions(document)) if separate else None,
        where=torch.from_numpy(where),
    )
    return batch, torch.from_numpy(labels.reshape(-1)[where])


@torch.inference_mode()
def pseudo_nll(
    model: MLM,
    documents: list[Int64[np.ndarray, "_"]],
    special: tuple[int, int, int],
    batch_size: int = 32,
) -> Summed:
    """-log p of each token of each document, masked alone (Salazar et al. 2020, eq. 2).

    documents: without special tokens, at most max_length - 2 tokens; special: ids of [CLS], [SEP], [MASK].
    """
    device, (cls, sep, mask) = model.head.bias.device, special
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for ids in tqdm(documents, desc="pseudo-perplexity", unit="doc", disable=None):
        row = torch.from_numpy(np.concatenate([[cls], ids, [sep]])).to(device)
        for places in torch.arange(1, len(ids) + 1, device=device).split(batch_size):
            rows = row.repeat(len(places), 1)
            copies = torch.arange(len(places), device=device)
            rows[copies, places] = mask
            states = model.encoder.encode(batch_of(rows))[copies, places]
            total += token_nll(model.head(states), model.word_weights, model.head.bias, row[places])
        count += len(ids)
    return Summed(float(total), count)


def token_nll(
    states: Float[Tensor, "t d"],
    weights: Float[Tensor, "v d"],
    bias: Tensor | None,
    labels: Int64[Tensor, " t"],
) -> Float[Tensor, ""]:
    """Sum of -log p of the labels, float64."""
    return linear_cross_entropy(states, weights, bias, labels, None)[0].double()
