"""Blanks filled by a masked model: a person's own, or those of documents that it can be graded on."""

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup.batch import TextBatch
from selfsup.data.index import local_folder
from selfsup.data.mask_tokens import Masking
from selfsup.data.order import sample_order
from selfsup.data.rows import TextData, open_rows
from selfsup.data.source import Texts, wrapped
from selfsup.data.text import TrainText
from selfsup.data.tokenizer import TOKENIZER_NAME
from selfsup.data.tokens import is_token_folder
from selfsup.objectives.blanks import blanks_table
from selfsup.objectives.mlm import MLM
from selfsup.text.load import TextRun, batch_of, load_text_run, open_documents, print_notes

MASK_RATIO = 0.15
"""Share of a row's tokens that are blanked where a model is graded; all of them become [MASK]."""
TARGETS = 2000
MOST_GUESSES = 50
SHOWN = 12
_ROWS = 32
"""Rows of a forward pass."""


class Blanks(NamedTuple):
    """How a model filled the blanks of documents."""

    targets: int
    top1: float
    """Share of the blanks whose likeliest token is the right one."""
    top5: float
    nll: float
    """Mean of -log p of the right token, nats."""
    rows: int
    packed: str
    """How the documents lie in rows, one line."""
    cut: int | None
    """Documents graded that were longer than a row; None for token shards, of which `packed` says it."""
    table: str


def main_fill(
    run: Annotated[str, tyro.conf.arg(metavar="RUN")],
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[TEXT ...]")] = (),
    /,
    *,
    best: int = 5,
    shards: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    targets: int | None = None,
    seed: int | None = None,
    weights: Literal["trained", "ema"] = "trained",
) -> None:
    """Fill the blanks of a text with a masked model (objective mlm), or grade it on documents.

    TEXT has a [MASK] for each blank. Without TEXT: rows of documents, 15 % of their tokens
    blanked, the same ones for every run on the same rows; twelve of them are shown. Token shards are packed as in
    training; text shards are read one document a row, and what is longer is cut. --shards, --targets and --seed
    are for documents only.

    Args:
        run: run or checkpoint folder.
        text: one or more texts with [MASK] in them.
        best: guesses shown for a blank, 1 to 50.
        shards: documents to grade on, token or text shards; default: those that the run trained on.
        targets: blanks graded, at least, if there are so many; default: 2000.
        seed: another one takes other rows and blanks; default: 0.
        weights: those of the last step, or their average over steps (optim.ema).
    """
    alone = "no TEXT beside it: documents are graded, texts are filled"
    for holds, option, expected, got in (
        (1 <= best <= MOST_GUESSES, "--best", f"1 to {MOST_GUESSES}", best),
        (targets is None or targets >= 1, "--targets", ">= 1", targets),
        (seed is None or 0 <= seed < 2**32, "--seed", "0 <= seed < 2**32", seed),
        (not text or shards is None, "--shards", alone, shards),
        (not text or targets is None, "--targets", alone, targets),
        (not text or seed is None, "--seed", alone, seed),
    ):
        if not holds:
            raise ValueError(f"{option}: expected {expected}, got {got}")
    loaded = load_text_run(run, weights)
    print_notes(loaded)
    model = masked_model(loaded)
    loaded.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if text:
        print("\n\n".join(fill(loaded, model, each, best) for each in text))
        return
    assert isinstance(loaded.recipe.data, TextData)
    if shards is None:
        print(f"{loaded.recipe.data.shards}: what the run trained on; held-out documents with --shards\n")
    targets = TARGETS if targets is None else targets
    found = grade(loaded, model, shards or loaded.recipe.data.shards, targets, best, seed or 0)
    cut = "" if found.cut is None else f"; {found.cut:,} of the {found.rows:,} graded are cut"
    print(f"{found.packed}{cut}\n\n{found.table}")
    print(
        f"\n{found.targets:,} blanks in {found.rows:,} rows: right at first guess {found.top1:.1%}, among five "
        f"{found.top5:.1%}; mean nll {found.nll:.3f} nats"
    )
    if found.targets < targets:
        print(f"fewer than --targets {targets}: these are all rows there are")


def masked_model(run: TextRun) -> MLM:
    """The objective. Raises ValueError for one that is not mlm."""
    if not isinstance(run.objective, MLM):
        raise ValueError(
            f"{run.name}: expected a masked model (objective mlm), got {run.recipe.objective.name}; let it write: "
            f"selfsup generate {run.name} --prompt TEXT"
        )
    return run.objective


@torch.inference_mode()
def fill(run: TextRun, model: MLM, text: str, best: int) -> str:
    """A line for each [MASK] of the text: the best guesses and their probabilities.

    Raises ValueError for a text without one, and for one longer than the model's rows.
    """
    ids = blanked_ids(run, text)
    where = torch.from_numpy(np.flatnonzero(ids == run.tokenizer.mask))
    if not len(where):
        raise ValueError(
            f"{text!r}: expected a {run.tokenizer.token(run.tokenizer.mask)} where the blank is, got none"
        )
    if len(ids) > run.max_length:
        raise ValueError(
            f"{text[:40]!r}...: expected at most encoder.max_length {run.max_length} tokens with [CLS] and [SEP], "
            f"got {len(ids)}; shorten it"
        )
    batch = batch_of(ids[None], where=where).to(model.head.bias.device)
    return blanks_table(batch.tokens, batch.where, None, model.logits(batch), run.tokenizer, best=best)


def blanked_ids(run: TextRun, text: str) -> Int64[np.ndarray, " n"]:
    """[CLS] text [SEP] as tokens, [MASK] spelt out in it as that token."""
    tokenizer = run.tokenizer
    if tokenizer.kind == "bpe" and tokenizer.mask is not None:
        # In such a vocabulary the space belongs to the word behind it, here to the blank.
        mask = tokenizer.token(tokenizer.mask)
        text = re.sub(" " + re.escape(mask), lambda _: mask, text)
    ids = tokenizer.encode_prompt(text).astype(np.int64)
    return np.concatenate([[tokenizer.cls], ids, [tokenizer.sep]])


@torch.inference_mode()
def grade(run: TextRun, model: MLM, shards: str, targets: int, best: int, seed: int) -> Blanks:
    """Blanks in rows of `shards`, packed as in training (text shards: a document a row), all of them [MASK].

    Rows are taken in a keyed order until they hold so many targets. Raises ValueError for shards that do not
    fit the run or hold less than a row.
    """
    open_documents(run, shards, "--shards")  # for what it refuses: another tokenizer
    device = model.head.bias.device
    batches: list[TextBatch] = []
    logits: list[Tensor] = []
    data = blanked_rows(run, shards, seed)
    for start in range(0, len(data.rows), _ROWS):
        batch = data.batch(np.arange(start, min(start + _ROWS, len(data.rows))))
        batches.append(batch)
        if sum(each.targets for each in batches) >= targets:
            break
    right, places, seen = [], [], 0
    labels = torch.cat([batch.labels for batch in batches])
    if not len(labels):
        raise ValueError(f"--shards {shards}: its rows hold no token that could be blanked")
    shown = np.sort(sample_order(seed, 0, np.arange(min(SHOWN, len(labels))), len(labels), "shuffled"))
    for number, batch in enumerate(batches):
        assert batch.where is not None
        scores = model.logits(batch.to(device)).float().cpu()  # (t, v)
        right.append(_graded(scores, batch.labels))
        inside = shown[(shown >= seen) & (shown < seen + len(scores))] - seen
        logits.append(scores[inside])
        places.append(batch.where[inside] + number * _ROWS * batch.tokens.shape[1])
        seen += len(scores)
    rank, nll = (torch.cat(column) for column in zip(*right))
    if not nll.isfinite().all():
        raise ValueError(f"{run.name}: scores of {int((~nll.isfinite()).sum())} blanks are NaN or infinite")
    tokens = torch.cat([batch.tokens for batch in batches])
    table = blanks_table(
        tokens, torch.cat(places), labels[shown], torch.cat(logits), run.tokenizer, best=best
    )
    return Blanks(
        len(labels),
        float((rank < 1).double().mean()),
        float((rank < 5).double().mean()),
        float(nll.double().mean()),
        len(tokens),
        data.rows.describe(),
        _cut(data, torch.cat([batch.index for batch in batches]).numpy()),
        table,
    )


def _cut(data: TrainText, documents: Int64[np.ndarray, " n"]) -> int | None:
    """How many documents of text shards, each a row, are longer than one."""
    rows = data.rows
    if not isinstance(rows.source, Texts):
        return None
    return sum(len(ids) > rows.length for ids in wrapped(rows.source, documents, rows.wrap, rows.length + 1))


def _graded(logits: Float[Tensor, "t v"], labels: Int64[Tensor, " t"]) -> tuple[Tensor, Tensor]:
    """How many tokens are likelier than the right one, and its -log p: (t,) each."""
    rank = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    return rank, F.cross_entropy(logits, labels, reduction="none")


def blanked_rows(run: TextRun, shards: str, seed: int) -> TrainText:
    """Rows of `shards` as the run packs them, their blanks keyed by `seed`."""
    config = run.recipe.data
    assert isinstance(config, TextData)
    content = {**config.model_dump(), "shards": shards, "order": "shuffled", "tokenizer": None}
    if not is_token_folder(local_folder(shards)):
        path = Path(run.checkpoint).absolute().parent.parent / TOKENIZER_NAME
        content |= {"tokenizer": str(path), "packing": "pad", "document_mask": False}
    rows = open_rows(TextData(**content), run.max_length, "bert", False)
    masking = Masking(MASK_RATIO, MASK_RATIO, 1, False, mask_share=1.0, random_share=0.0)
    return TrainText(TextData(**content), rows, seed, 1, masking)
