"""Documents as tokens: from token shards, or from text shards and tokenised as they are read."""

import numpy as np
from jaxtyping import Int64

from selfsup.data import packing
from selfsup.data.documents import open_texts
from selfsup.data.index import ShardIndex, local_folder
from selfsup.data.packing import Wrap
from selfsup.data.reader import ShardReader
from selfsup.data.tokenizer import TextTokenizer, load_tokenizer
from selfsup.data.tokens import TokenIndex, is_token_folder, open_tokens


class Texts:
    """Documents of text shards, tokenised as they are read."""

    def __init__(self, index: ShardIndex, tokenizer: TextTokenizer) -> None:
        self.index, self.tokenizer = index, tokenizer
        self.reader = ShardReader(index)
        self.fingerprint, self.label = index.fingerprint, index.label

    def __len__(self) -> int:
        return len(self.index)

    def read(self, documents: Int64[np.ndarray, "b"]) -> list[Int64[np.ndarray, "_"]]:
        """All tokens of each document. Raises ValueError as `ShardReader.texts`."""
        texts = self.reader.texts(documents)
        return [ids.astype(np.int64) for ids in self.tokenizer.encode(texts)]


Source = TokenIndex | Texts


def wrapped(
    source: Source, documents: Int64[np.ndarray, "b"], wrap: Wrap, width: int
) -> list[Int64[np.ndarray, "_"]]:
    """Each document with its special tokens around it, int64 (at most width,).

    A longer one is cut. bert: it ends in [SEP] all the same; gpt: it does not, because it does not end there.
    """
    most, before = packing.longest(wrap, width), [source.tokenizer.cls] * packing.head(wrap)
    if isinstance(source, Texts):
        found = source.read(documents)
    else:  # of a long one no more than it takes to see that it is cut
        starts, ends = source.offsets[documents], source.offsets[documents + 1]
        found = [source.read(start, min(end, start + most + 1)) for start, end in zip(starts, ends)]
    out = []
    for ids in found:
        if wrap == "gpt" and len(ids) > most:
            out.append(ids[:width])
        else:
            out.append(np.concatenate([before, ids[:most], [source.tokenizer.sep]]).astype(np.int64))
    return out


def open_source(shards: str, tokenizer: str | None) -> Source:
    """The documents of a folder, checked against its files.

    tokenizer: None for token shards, whose tokenizer lies beside them; a tokenizer.json for text shards.
    Raises ValueError, with the fix, as `open_tokens` or `open_texts`, and where one was given for the other.
    """
    folder = local_folder(shards)
    tokens = is_token_folder(folder)
    if tokenizer is not None and tokens:
        raise ValueError(
            f"data.tokenizer: {folder} holds token shards, and beside them the tokenizer that made them; leave "
            f"data.tokenizer out"
        )
    if tokenizer is not None:
        return Texts(open_texts(shards), load_tokenizer(tokenizer))
    if not tokens and any(folder.glob("*.tar")):
        raise ValueError(
            f"data.shards: expected token shards (tokens-*.npy), got shards of text or images (*.tar) in {folder}; "
            f"from text: selfsup data tokenize {folder} {folder}-tokens --tokenizer TOKENIZER.json, "
            f"or with packing pad set data.tokenizer, to tokenise as they are read"
        )
    return open_tokens(shards)


def check_roles(tokenizer: TextTokenizer, wrap: Wrap, masks: bool) -> None:
    """Raises ValueError where a tokenizer lacks a special token that the rows need."""
    needed = {"[SEP]": tokenizer.sep}
    if wrap == "bert":
        needed["[CLS]"] = tokenizer.cls
    if masks:
        needed["[MASK]"] = tokenizer.mask
    missing = sorted(name for name, i in needed.items() if i is None)
    if missing:
        raise ValueError(
            f"tokenizer: expected {', '.join(needed)} (or what others call them), it has no {', '.join(missing)}; "
            f"tokenise with another, for instance one made with: selfsup data tokenizer"
        )
