"""Predictions as a table that a person can read: the text around a blank, what stood there, the best guesses."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfsup.data.tokenizer import TextTokenizer

CONTEXT = 8
"""Tokens shown before and after a blank."""
BLANK = "____"


def pick_targets(where: Int[Tensor, " t"], length: int, rows: int, each: int) -> Int[Tensor, " k"]:
    """Which targets to show: int64 places in `where`, evenly spread, `each` of the first `rows` rows."""
    chosen = []
    for row in range(rows):
        inside = torch.nonzero(torch.div(where, length, rounding_mode="floor") == row).flatten()
        if len(inside):
            chosen.append(inside[torch.linspace(0, len(inside) - 1, min(each, len(inside))).long()])
    return torch.cat(chosen) if chosen else where[:0]


def blanks_table(
    tokens: Int[Tensor, "b l"],
    where: Int[Tensor, " k"],
    truth: Int[Tensor, " k"] | None,
    logits: Float[Tensor, "k v"],
    tokenizer: TextTokenizer,
    after: bool = True,
    best: int = 3,
) -> str:
    """One line a blank: what stood there, the `best` guesses with their probabilities, the text around it.

    tokens: as the model read them; where: int64 places of the blanks in tokens.flatten(). truth: none where
    nobody knows it. after: show the text after the blank too; a causal model has not seen it.
    """
    lines = []
    probabilities, guesses = logits.float().softmax(dim=-1).topk(min(best, logits.shape[-1]), dim=-1)
    length = tokens.shape[1]
    for k, place in enumerate(where.tolist()):
        row, column = divmod(place, length)
        ids = tokens[row].tolist()
        left = spell(tokenizer, ids[max(0, column - CONTEXT) : column])
        right = spell(tokenizer, ids[column + 1 : column + 1 + CONTEXT]) if after else ""
        pairs = zip(guesses[k].tolist(), probabilities[k].tolist())
        guessed = "  ".join(f"{spell(tokenizer, [i])} {100 * p:.0f}%" for i, p in pairs)
        known = "" if truth is None else spell(tokenizer, [int(truth[k])])
        lines.append((known, guessed, f"{left} {BLANK} {right}".strip()))
    wide = [max((len(line[i]) for line in lines), default=0) for i in range(2)]
    head = ("" if truth is None else "truth", "guesses", "text")
    wide = [max(w, len(title)) for w, title in zip(wide, head)]
    return "\n".join(f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c}".strip() for a, b, c in [head, *lines])


def spell(tokenizer: TextTokenizer, ids: list[int]) -> str:
    """Tokens as text on one line, special ones by their names; a lone blank stays visible."""
    parts, run = [], []
    for i in [*ids, None]:
        if i is not None and i not in tokenizer.special_ids:
            run.append(i)
            continue
        if run:
            parts.append(tokenizer.decode(run))
        if i is not None:
            parts.append(tokenizer.token(i))
        run = []
    text = " ".join(parts)
    return repr(text) if text.isspace() else repr(text)[1:-1] if not text.isprintable() else text
