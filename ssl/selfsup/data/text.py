"""Text from rows to batches: the data set, the loaders."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from selfsup.batch import TextBatch
from selfsup.data.index import ShardIndex
from selfsup.data.loader import load
from selfsup.data.mask_tokens import Masking, mask_tokens
from selfsup.data.order import BatchPlan, micro_batches, sample_order
from selfsup.data.packing import Wrap
from selfsup.data.rows import Row, Rows, TextData
from selfsup.data.source import Source, Texts, check_roles, truncated, wrapped
from selfsup.data.tokenizer import TextTokenizer
from selfsup.data.tokens import TokenIndex


class TrainText(Dataset):
    """Map-style: from global cursors to a finished micro-batch, a pure function."""

    def __init__(
        self, config: TextData, rows: Rows, seed: int, global_batch: int, masking: Masking | None
    ) -> None:
        """masking None: the next token is the target. Raises ValueError where rows and masking do not fit."""
        assert rows.next_token == (masking is None)
        self.config, self.rows, self.seed = config, rows, seed
        self.global_batch, self.masking = global_batch, masking
        self.special = np.zeros(rows.vocab_size, dtype=bool)
        self.special[list(rows.tokenizer.special_ids)] = True
        self.starts_word = rows.tokenizer.starts_word if masking is not None and masking.whole_word else None

    def batch(self, cursors: Int64[np.ndarray, "b"]) -> TextBatch:
        """The micro-batch at int64 (b,) cursors. Raises ValueError naming a file that cannot be read."""
        epoch, position = np.divmod(cursors, len(self.rows))
        numbers = sample_order(self.seed, epoch, position, len(self.rows), self.config.order)
        rows = self.rows.rows(self.seed, epoch, numbers)
        ids, document = np.stack([row.ids for row in rows]), np.stack([row.document for row in rows])
        if self.masking is None:
            tokens, where, labels = self._next(ids, document)
            document = document[:, :-1]
        else:
            ratio = np.array([self.masking.at(step) for step in (cursors // self.global_batch).tolist()])
            real = document >= 0
            tokens, where, labels = mask_tokens(
                ids, real & ~self.special[ids], real, ratio, self.seed, epoch, position,
                self.rows.tokenizer.mask, self.rows.vocab_size, self.masking.mask_share, self.masking.random_share,
                None if self.starts_word is None else self.starts_word[ids],
            )  # fmt: skip
        return TextBatch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            where=None if where is None else torch.from_numpy(where),
            **self._structure(rows, document),
            global_batch=self.global_batch,
            seed=self.seed,
            epoch=torch.from_numpy(epoch),
            position=torch.from_numpy(position),
            index=torch.from_numpy(numbers),
        )

    def __getitems__(self, cursors: Int64[np.ndarray, "b"]) -> TextBatch | ValueError:
        """`batch`, its ValueError returned: the loader would bury the message in two tracebacks."""
        try:
            return self.batch(cursors)
        except ValueError as error:
            return error

    @property
    def _hides(self) -> bool:
        """Whether there is padding, or other documents, that a token must not see."""
        return self.rows.packing != "concat" or self.rows.document_mask

    def _next(
        self, ids: np.ndarray, document: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Tokens and the ones that follow them; none to predict where that is padding or out of sight."""
        tokens, labels = np.ascontiguousarray(ids[:, :-1]), ids[:, 1:]
        if not self._hides:
            return tokens, None, labels.reshape(-1)
        follows = document[:, 1:] >= 0
        if self.rows.document_mask:
            follows &= document[:, 1:] == document[:, :-1]
        return tokens, np.flatnonzero(follows), labels[follows]

    def _structure(self, rows: list[Row], document: np.ndarray) -> dict[str, Tensor | None]:
        """What a batch says of the documents in its rows."""
        paired = self.rows.packing == "pairs"
        mask = self.rows.document_mask
        ids = document if mask else np.where(document < 0, -1, 0)
        return {
            "document_ids": torch.from_numpy(np.ascontiguousarray(ids)) if self._hides else None,
            "positions": torch.from_numpy(document_positions(document)) if mask else None,
            "token_types": torch.from_numpy(np.stack([row.second for row in rows])) if paired else None,
            "random_next": torch.tensor([row.random_next for row in rows]) if paired else None,
        }


def document_positions(document: Int64[np.ndarray, "b l"]) -> Int64[np.ndarray, "b l"]:
    """Places counted from the beginning of each document's part of the row; 0 for padding."""
    place = np.arange(document.shape[1])
    begins = np.ones(document.shape, dtype=bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    begin = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return np.where(document < 0, 0, place - begin)


def train_text(
    config: TextData,
    rows: Rows,
    seed: int,
    plan: BatchPlan,
    start_cursor: int,
    workers: int,
    masking: Masking | None,
) -> Iterator[TextBatch]:
    """This rank's micro-batches from `start_cursor` on, without end; `.close()` ends the workers.

    The same batches whatever the number of workers. masking None: rows for a causal model. Raises ValueError for
    whole words of a tokenizer without words; iterating raises it for a file that cannot be read, and names it.
    """
    dataset = TrainText(config, rows, seed, plan.global_batch, masking)
    # Workers hold about the next whole step ready, and at least two micro-batches each.
    prefetch = min(8, max(2, -(-plan.accumulation // max(1, workers)) + 1))
    return load(dataset, micro_batches(plan, start_cursor), workers, prefetch)


class _Documents(Dataset):
    """Map-style: from numbers of documents to documents, padded to the longest."""

    def __init__(self, source: Source, length: int, wrap: Wrap) -> None:
        self.source, self.length, self.wrap = source, length, wrap

    def __getitems__(
        self, documents: Int64[np.ndarray, "b"]
    ) -> tuple[TextBatch, Tensor, Tensor] | ValueError:
        try:
            found = wrapped(self.source, documents, self.wrap, self.length)
        except ValueError as error:
            return error
        b, longest, pad = len(found), max(map(len, found)), self.source.tokenizer.pad
        tokens = np.full((b, longest), self.source.tokenizer.sep if pad is None else pad, dtype=np.int64)
        real = np.full((b, longest), -1, dtype=np.int64)
        for row, ids in enumerate(found):
            tokens[row, : len(ids)], real[row, : len(ids)] = ids, 0
        numbers, none = torch.from_numpy(documents), torch.zeros(0, dtype=torch.int64)
        batch = TextBatch(
            tokens=torch.from_numpy(tokens),
            labels=none,
            where=none,
            document_ids=torch.from_numpy(real),
            positions=None,
            token_types=None,
            random_next=None,
            global_batch=b,
            seed=0,
            epoch=torch.zeros(b, dtype=torch.int64),
            position=numbers,
            index=numbers,
        )
        return batch, torch.from_numpy(self.source.label[documents]), numbers


def document_batches(
    documents: TokenIndex | ShardIndex,
    length: int,
    wrap: Wrap,
    batch_size: int,
    workers: int = 0,
    tokenizer: TextTokenizer | None = None,
) -> Iterator[tuple[TextBatch, Tensor, Tensor]]:
    """Every document once, in index order: batch without targets, labels int64 (b,) with -1 for none, document
    numbers int64 (b,).

    Documents are wrapped, cut after `length` tokens (`count_truncated`) and padded to the longest of their batch;
    nothing is random. tokenizer: for text shards, and only for them. Raises ValueError for a tokenizer without the
    special tokens of `wrap`; iterating raises it for what cannot be read, and names the file.
    """
    source = _source(documents, tokenizer, wrap)
    numbers = np.arange(len(source), dtype=np.int64)
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    return load(_Documents(source, length, wrap), batches, workers, prefetch=2)


def count_truncated(
    documents: TokenIndex | ShardIndex, length: int, wrap: Wrap, tokenizer: TextTokenizer | None = None
) -> int:
    """How many documents `document_batches` cuts. Text shards are tokenised for it."""
    return truncated(_source(documents, tokenizer, wrap), wrap, length)


def _source(documents: TokenIndex | ShardIndex, tokenizer: TextTokenizer | None, wrap: Wrap) -> Source:
    assert isinstance(documents, ShardIndex) == (tokenizer is not None)
    source = documents if tokenizer is None else Texts(documents, tokenizer)
    check_roles(source.tokenizer, wrap, masks=False)
    return source
