"""Text from rows to batches: the data set, the loader."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from selfsup.batch import TextBatch
from selfsup.data.loader import load
from selfsup.data.mask_tokens import Masking, mask_tokens
from selfsup.data.order import BatchPlan, micro_batches, sample_order
from selfsup.data.rows import Row, Rows, TextData


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
