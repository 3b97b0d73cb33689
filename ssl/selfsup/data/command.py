"""`selfsup data pack`, `tokenizer` and `tokenize`: arguments in, a report out."""

import os
import time
from pathlib import Path
from typing import Literal

from selfsup.data import shard, tokenizer
from selfsup.data.documents import open_texts, sampled_rows
from selfsup.data.pack import find_files, pack
from selfsup.data.python_docs import make_python_docs
from selfsup.data.text_sources import JSON_LINES, TEXT_FILES, Documents, pack_text
from selfsup.data.tokenize import TOKENS_PER_SHARD, check_free, tokenize_shards, train_on_shards
from selfsup.durable import write_atomically

PYTHON_DOCS = "python-docs"
_ABOUT = {"README", "LICENSE", "LICENCE", "NOTICE", "CITATION"}
"""Files that tell of the others."""
SAMPLES_PER_SHARD = 5000


def main_pack(
    source: str,
    dest: Path | None = None,
    /,
    kind: Literal["auto", "images", "text"] = "auto",
    documents: Documents = "file",
    samples_per_shard: int = SAMPLES_PER_SHARD,
    processes: int = os.cpu_count() or 1,
) -> None:
    """Packs images or text into WebDataset shards with an index.

    Every image is decoded once, every text read; what is corrupt, empty or broken is named and left out.
    Interrupted, it goes on when called again.

    Args:
        source: folder of JPEG, PNG and WebP images or of .txt, .md and .rst files (one folder per class, or
            flat), or of .jsonl files ("text", perhaps "label"); one such text file; or the word python-docs:
            the documentation of Python's standard library, tokenised too.
        dest: folder for the shards (python-docs: data/python-docs).
        kind: what to take from the source; auto looks.
        documents: a text file is one document, or several with blank lines between.
        samples_per_shard: images or documents a shard.
        processes: shards written at a time.
    """
    if source == PYTHON_DOCS:
        if (kind, documents, samples_per_shard) != ("auto", "file", SAMPLES_PER_SHARD):
            raise ValueError(
                f"{PYTHON_DOCS}: --kind, --documents and --samples-per-shard mean nothing for it, leave them out; a "
                f"folder of that name is ./{PYTHON_DOCS}"
            )
        print(make_python_docs(dest or Path("data") / PYTHON_DOCS, processes))
        return
    if dest is None:
        raise ValueError(f"expected a folder for the shards: selfsup data pack {source} FOLDER")
    found = detect(Path(source).expanduser()) if kind == "auto" else kind
    if found == "images" and documents != "file":
        raise ValueError(f"documents: {source} holds images, which have no paragraphs; leave it out")
    if found == "images":
        print(pack(source, dest, samples_per_shard, processes))
    else:
        print(pack_text(source, dest, samples_per_shard, processes, documents))


def detect(source: Path) -> shard.Kind:
    """What a file or folder holds; a README or a licence beside images does not count.

    Raises ValueError where there is nothing, or images and texts side by side.
    """
    if source.is_file():
        return "text"
    wanted = (*shard.IMAGE_EXTENSIONS, *TEXT_FILES, JSON_LINES)
    files, _ = find_files(source, wanted)
    texts = [file for file in files if file.suffix[1:].lower() not in shard.IMAGE_EXTENSIONS]
    images = len(files) - len(texts)
    others = sum(file.name.split(".")[0].upper() not in _ABOUT for file in texts)
    if images and others:
        raise ValueError(
            f"{source}: holds {images} images and {others} text files; say which: --kind images, or "
            "--kind text"
        )
    return "images" if images else "text"


def main_tokenizer(
    shards: str,
    out: Path,
    /,
    kind: tokenizer.Kind = "wordpiece",
    vocab_size: int = 8192,
    cased: bool = False,
    sample: int | None = None,
) -> None:
    """Learns a tokenizer from text shards and writes it as a tokenizer.json.

    Args:
        shards: folder of text shards.
        out: the file to write.
        kind: wordpiece (BERT's), bpe (byte-level, GPT-2's: gives every text back), or char (a token a character).
        vocab_size: tokens at most, with [PAD] [UNK] [CLS] [SEP] [MASK].
        cased: wordpiece keeps capitals and accents.
        sample: learn from so many documents, drawn by key; all by default.
    """
    check_free(out)
    if out.is_dir():
        raise ValueError(f"{out}: expected a file to write, got a folder; name {out / tokenizer.TOKENIZER_NAME}")
    index = open_texts(shards, "SHARDS")
    rows = sampled_rows(index, sample)
    trained = train_on_shards(index, kind, vocab_size, cased, sample)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out.absolute(), trained.json.encode())
    if trained.vocab_size == vocab_size and kind == "char":
        print("note: the vocabulary is full; what rarer characters there are become [UNK]")
    if trained.vocab_size < vocab_size and kind != "char":
        print(f"note: the text has no more than {trained.vocab_size} tokens in it, {vocab_size} were allowed")
    size = int(index.length[rows].sum())
    print(f"{kind}, {trained.vocab_size} tokens, from {len(rows)} documents of {size / 1e6:.1f} MB: {out}")


def main_tokenize(
    shards: str,
    dest: Path,
    /,
    tokenizer: Path,
    processes: int = os.cpu_count() or 1,
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> None:
    """Tokenises text shards once, into compact token shards that training reads.

    Args:
        shards: folder of text shards.
        dest: new folder for the token shards; it is there when they are all written.
        tokenizer: a tokenizer.json, made by selfsup data tokenizer or elsewhere.
        processes: documents are tokenised by so many.
        tokens_per_shard: tokens a file, at most (a longer document has one of its own).
    """
    start = time.monotonic()
    index = tokenize_shards(open_texts(shards, "SHARDS"), dest, tokenizer, processes, tokens_per_shard)
    if index.empty:
        print(f"left out: {index.empty} documents without a token")
    share = index.unknown / index.tokens
    print(
        f"{len(index)} documents, {index.tokens} tokens ({index.bytes.sum() / index.tokens:.2f} bytes a token), "
        f"{index.unknown} of them unknown ({share:.2%}), in {len(index.shards)} shards, "
        f"{time.monotonic() - start:.1f} s: {dest}"
    )
