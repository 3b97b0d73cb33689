"""Text to numbers: three kinds of tokenizer, trained or taken from a `tokenizer.json`.

The work is done by Hugging Face's `tokenizers` library. What is ours: five special tokens at fixed places,
no specials in ordinary text (a review that says "[MASK]" is a review that says so), a hash that stays with
the data, and the same file from the same text every time.

What each kind loses: `bpe` (byte-level) and, for characters it has seen, `char` give the text back letter
for letter. `wordpiece` lowers case and strips accents (unless `cased`), drops control characters, and
decodes with its own spaces. Characters and words outside the vocabulary become [UNK], which is counted.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt32
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Kind = Literal["wordpiece", "bpe", "char"]

TOKENIZER_NAME = "tokenizer.json"

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Ids 0 to 4 of every tokenizer trained here."""

_MOST_LETTERS = 1000
"""wordpiece: rarer letters are left to [UNK], as BERT's trainer does; each takes two places, `x` and `##x`."""

_ROLES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>", "<|endoftext|>", "<|end_of_text|>"),
    "mask": ("[MASK]", "<mask>"),
}
"""What other people's tokenizers call them; the first that is there is taken."""


def canonical(text: str) -> str:
    """JSON without what does not matter: the order of keys, spaces and line breaks."""
    return json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def json_sha256(path: Path) -> str:
    """SHA-256 of a JSON file's canonical form. Raises ValueError for a file that is no JSON."""
    try:
        return hashlib.sha256(canonical(path.read_text(encoding="utf-8")).encode()).hexdigest()
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


class TextTokenizer:
    """Text to token ids and back; `pad`, `unk`, `cls`, `sep`, `mask` are ids, None where there is none."""

    def __init__(self, json: str, name: str = "tokenizer") -> None:
        """json: the content of a tokenizer.json; name: its file, for messages.

        Raises ValueError for what the library cannot read, and where ordinary text that spells a special
        token would become it.
        """
        # Before a loader forks: the library's threads would deadlock in the child, or warn at every fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.json = json
        try:
            self.sha256 = hashlib.sha256(canonical(json).encode()).hexdigest()
            self._data, self._prompts = Tokenizer.from_str(json), Tokenizer.from_str(json)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{name}: not a tokenizer.json that tokenizers reads: {error}") from None
        for tokenizer in (self._data, self._prompts):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._data.encode_special_tokens = True  # as plain text
        self.vocab_size = 1 + max(self._data.get_vocab(with_added_tokens=True).values())
        self.pad, self.unk, self.cls, self.sep, self.mask = (self._role(names) for names in _ROLES.values())
        added = self._data.get_added_tokens_decoder()
        roles = [role for role in (self.pad, self.unk, self.cls, self.sep, self.mask) if role is not None]
        self.special_ids = frozenset([*roles, *(i for i, token in added.items() if token.special)])
        for i in self.special_ids - {self.unk}:
            if i in self.encode([self.token(i)])[0]:
                raise ValueError(
                    f"{name}: text that spells {self.token(i)} would become that token; take a tokenizer that cannot "
                    "confuse them, such as wordpiece or byte-level bpe"
                )

    def _role(self, names: Sequence[str]) -> int | None:
        found = (self._data.token_to_id(name) for name in names)
        return next((i for i in found if i is not None), None)

    def __reduce__(self):
        return TextTokenizer, (self.json,)

    def encode(self, texts: list[str]) -> list[UInt32[np.ndarray, "_"]]:
        """Ids of each text as it stands: no special tokens, nothing cut off."""
        encodings = self._data.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode_prompt(self, text: str) -> UInt32[np.ndarray, "n"]:
        """As `encode`, but a special token spelt out in the text, such as [MASK], is that token."""
        return np.array(self._prompts.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of some ids. Special tokens are left out, but for [UNK], which shows what was lost."""
        drop = self.special_ids - {self.unk}
        return self._data.decode([int(i) for i in ids if int(i) not in drop], skip_special_tokens=False)

    def token(self, i: int | np.integer) -> str:
        """The token as the vocabulary spells it; `<i>` for a number that it does not use."""
        token = self._data.id_to_token(int(i))
        return f"<{i}>" if token is None else token

    @cached_property
    def kind(self) -> str:
        """wordpiece, bpe (byte-level), char, or what else the file calls its model."""
        content = json.loads(self.json)
        model = str(content["model"].get("type") or "").lower()
        steps = content.get("pre_tokenizer") or {}
        names = {step.get("type") for step in (steps, *steps.get("pretokenizers", ()))}
        if model == "bpe" and "ByteLevel" not in names:
            return "bpe without bytes"
        return "char" if model == "wordlevel" and names == {"Split"} else model

    @cached_property
    def starts_word(self) -> Bool[np.ndarray, "vocab"]:
        """Whether a token begins a word; what does not goes on with the word before it. Specials begin.

        WordPiece: all but ##pieces. Byte-level: whatever begins with a space or another character that is no
        letter or digit: "(word" is one, and so is a space left by itself. Raises ValueError for a tokenizer
        without words.
        """
        tokens = [self._data.id_to_token(i) or "" for i in range(self.vocab_size)]
        if self.kind == "wordpiece":
            prefix = json.loads(self.json)["model"].get("continuing_subword_prefix", "##")
            starts = [not token.startswith(prefix) or token == prefix for token in tokens]
        elif self.kind == "bpe":
            starts = [not _goes_on(token) for token in tokens]
        else:
            raise ValueError(
                f"whole words: expected a wordpiece or byte-level bpe tokenizer, got {self.kind}, which does "
                "not tell where words begin; turn whole-word masking off"
            )
        starts = np.array(starts)
        starts[list(self.special_ids)] = True
        return starts


def _goes_on(token: str) -> bool:
    """A byte-level token that begins with a letter, a digit or a byte of a longer character."""
    byte = _BYTES.get(token[:1], 0)
    return byte >= 128 or chr(byte).isalnum()


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: those that print stand for themselves, the rest are moved above 255."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printing]
    return {chr(b): b for b in printing} | {chr(256 + i): b for i, b in enumerate(moved)}


_BYTES = _byte_letters()


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """A tokenizer.json, trained here or elsewhere. Raises ValueError naming the file."""
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / TOKENIZER_NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer; make one with: selfsup data tokenizer SHARDS {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from None
    return TextTokenizer(text, str(path))


def kept_tokenizer(run_dir: Path, expected: str | None) -> TextTokenizer:
    """The tokenizer that a text run keeps in its folder.

    expected: `tokenizer_sha256` of the checkpoint's state.json. Raises ValueError where it is missing, and where
    it is another than the run was trained with.
    """
    path = run_dir / TOKENIZER_NAME
    if not path.is_file():
        raise ValueError(
            f"{path}: missing; a text run keeps its tokenizer in the run folder, beside checkpoints/: put back the "
            f"one that lies with its token shards"
        )
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != expected:
        raise ValueError(
            f"{path}: not the tokenizer of this run: expected SHA-256 {str(expected)[:12]}..., got "
            f"{tokenizer.sha256[:12]}...; put back the one that lies with its token shards"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], kind: Kind, vocab_size: int, cased: bool = False) -> TextTokenizer:
    """Learns a vocabulary of at most `vocab_size` tokens, the five specials among them.

    texts: read once, or twice for wordpiece: no iterator. The same texts give the same file. Raises ValueError
    for a vocabulary too small for the specials and the letters, and for `cased` where it means nothing.
    """
    least = len(SPECIALS) + {"wordpiece": 1, "bpe": 256, "char": 1}[kind]
    if vocab_size < least:
        raise ValueError(f"vocab-size: expected at least {least} for {kind}, got {vocab_size}")
    if cased and kind != "wordpiece":
        raise ValueError(f"cased: {kind} keeps case as it is; leave it out")
    assert iter(texts) is not texts, "an iterator can be read only once"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if kind == "wordpiece":
        return _train_wordpiece(texts, vocab_size, cased)
    options = {"vocab_size": vocab_size, "special_tokens": list(SPECIALS), "show_progress": False}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), **options)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(**options)
    tokenizer.train_from_iterator(texts, trainer)
    return TextTokenizer(tokenizer.to_str(pretty=True))


def _train_wordpiece(texts: Iterable[str], vocab_size: int, cased: bool) -> TextTokenizer:
    """The library numbers ##letters as it meets them in a hash map, another way each time, and breaks ties by
    those numbers: the vocabulary would not come twice. So they get their numbers here, in the guise of specials."""
    normalizer, split = normalizers.BertNormalizer(lowercase=not cased), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    letters = [letter for letter in counts if not letter.isspace()]
    letters = sorted(sorted(letters, key=lambda letter: (-counts[letter], letter))[:_MOST_LETTERS])
    # Punctuation is always a word of its own: ##, would never be used.
    pieces = [f"##{x}" for x in letters if len(split.pre_tokenize_str(normalizer.normalize_str(f"a{x}"))) == 1]
    least = len(SPECIALS) + len(letters) + len(pieces)
    if vocab_size < least:
        raise ValueError(
            f"vocab-size: expected at least {least} for the {len(letters)} different letters of this text, got "
            f"{vocab_size}"
        )
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, split
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *pieces],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, split
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIALS))
    return TextTokenizer(tokenizer.to_str(pretty=True))
