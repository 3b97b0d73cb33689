"""Tokenizers: the same file twice, text given back, and no special token that was not asked for."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from data.text_making import TEXTS, make_tokenizer
from selfsup.data import tokenizer as tokenizer_module
from selfsup.data.tokenizer import SPECIALS, TextTokenizer, canonical, load_tokenizer, train_tokenizer

KINDS = ("wordpiece", "bpe", "char")
BPE, CHAR, WORDPIECE = (make_tokenizer(kind) for kind in ("bpe", "char", "wordpiece"))
SAMPLE = [f"{text} {word}{i}" for i, text in enumerate(TEXTS * 20) for word in ("zebra", "été", "Ünïcode", "日本")]

TRAIN = """
import sys, json
from selfsup.data.tokenizer import train_tokenizer
print(train_tokenizer(json.loads(sys.argv[1]), sys.argv[2], 400).sha256)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_make_the_same_file(kind):
    """In one process and in others: the library's hash maps are seeded anew in each."""
    here = {train_tokenizer(SAMPLE, kind, 400).json for _ in range(6)}
    assert len(here) == 1
    command = [sys.executable, "-c", TRAIN, json.dumps(SAMPLE), kind]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert there == TextTokenizer(here.pop()).sha256


def test_the_librarys_own_wordpiece_trainer_is_why():
    """What the first assertion above is for: trained as anyone would, the vocabulary does not come twice."""
    seen = set()
    for _ in range(20):
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(SPECIALS), show_progress=False)
        tokenizer.train_from_iterator(SAMPLE, trainer)
        seen.add(canonical(tokenizer.to_str()))
    assert len(seen) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_specials_come_first_and_nothing_exceeds_the_size_asked_for(kind):
    tokenizer = train_tokenizer(SAMPLE, kind, 330)
    roles = (tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask)
    assert roles == (0, 1, 2, 3, 4) and tokenizer.special_ids == {0, 1, 2, 3, 4}
    assert [tokenizer.token(i) for i in range(5)] == list(SPECIALS)
    assert tokenizer.vocab_size <= 330 and tokenizer.kind == kind
    vocabulary = Tokenizer.from_str(tokenizer.json).get_vocab()
    assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["[MASK]", "a [SEP] b", "[CLS]x[PAD]", "[UNK][MASK][MASK]"])
def test_text_that_spells_a_special_is_text(kind, text):
    tokenizer = train_tokenizer([*SAMPLE, "[]ACDEKLMNPSU"], kind, 500)
    (ids,) = tokenizer.encode([text])
    assert not tokenizer.special_ids & {*ids.tolist()}
    prompt = tokenizer.encode_prompt(text)
    wanted = [i for i, special in enumerate(SPECIALS) for _ in range(text.count(special))]
    assert sorted(i for i in prompt.tolist() if i in tokenizer.special_ids) == wanted
    assert tokenizer.encode([text])[0].tolist() == ids.tolist()  # a prompt changes nothing for data


def test_without_our_setting_text_would_become_specials():
    """The planted bug: the library as it comes."""
    tokenizer = make_tokenizer()
    tokenizer._data.encode_special_tokens = False
    assert tokenizer.mask in tokenizer.encode(["a [MASK]"])[0]


def test_a_tokenizer_that_makes_specials_of_text_is_refused():
    model = models.WordLevel({"[UNK]": 0, "[MASK]": 1, "a": 2}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match=r"mine.json: text that spells \[MASK\] would become that token"):
        TextTokenizer(tokenizer.to_str(), "mine.json")
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[MASK]"])
    assert TextTokenizer(tokenizer.to_str()).mask == 1


# ---- what comes back ------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_byte_level_gives_any_text_back(text):
    (ids,) = BPE.encode([text])
    assert BPE.decode(ids) == text
    assert not BPE.special_ids & {*ids.tolist()}


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=sorted(set("".join(TEXTS)))))
def test_char_gives_back_what_it_has_seen(text):
    (ids,) = CHAR.encode([text])
    assert len(ids) == len(text) and CHAR.decode(ids) == text


def test_char_counts_a_token_a_character_line_breaks_too():
    tokenizer = train_tokenizer(["ab\r\nb é"], "char", 100)
    assert {tokenizer.token(i) for i in range(5, tokenizer.vocab_size)} == {"a", "b", "\r", "\n", " ", "é"}
    (ids,) = tokenizer.encode(["b\r\nzé"])
    assert len(ids) == 5 and ids.tolist().count(tokenizer.unk) == 1 and ids[3] == tokenizer.unk
    assert tokenizer.decode(ids) == "b\r\n[UNK]é"  # what was lost shows


def test_wordpiece_loses_case_accents_and_spaces_and_cased_does_not():
    text = "Ünïcode  ÉTÉ"
    assert WORDPIECE.decode(train_tokenizer(SAMPLE, "wordpiece", 600).encode([text])[0]) != text
    lower = train_tokenizer([*SAMPLE, text], "wordpiece", 600)
    assert lower.decode(lower.encode([text])[0]) == "unicode ete"
    cased = train_tokenizer([*SAMPLE, text], "wordpiece", 600, cased=True)
    assert cased.decode(cased.encode([text])[0]) == "Ünïcode ÉTÉ"


def test_wordpiece_keeps_no_piece_that_cannot_come():
    tokens = {WORDPIECE.token(i) for i in range(WORDPIECE.vocab_size)}
    assert "." in tokens and "##." not in tokens and "##a" in tokens


def test_rare_letters_are_left_to_unk(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_MOST_LETTERS", 3)
    tokenizer = train_tokenizer(["aaaa bbbb cccc x"], "wordpiece", 20)
    assert tokenizer.encode(["aaaa x"])[0].tolist().count(tokenizer.unk) == 1


# ---- words ----------------------------------------------------------------------------------------


def words_by(tokenizer: TextTokenizer, text: str) -> list[str]:
    """The text's words as `starts_word` tells them."""
    (ids,) = tokenizer.encode([text])
    starts = np.flatnonzero(tokenizer.starts_word[ids])
    words = [tokenizer.decode(part).strip() for part in np.split(ids, starts[starts > 0])]
    return [word for word in words if word]


def test_wordpiece_words_are_the_pre_tokenizers():
    text = "the quick, foxes jumped over lazily unboxing"
    expected = [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)]
    assert words_by(WORDPIECE, text) == expected
    assert WORDPIECE.starts_word.shape == (WORDPIECE.vocab_size,) and WORDPIECE.starts_word[:5].all()


def test_byte_level_words_begin_with_spaces_or_signs():
    words = ["the", "quick", ",", "foxes", "été", "new", "(word"]
    assert words_by(BPE, "the quick, foxes été\nnew (word") == words


def test_byte_letters_are_the_librarys():
    assert sorted(tokenizer_module._BYTES) == sorted(pre_tokenizers.ByteLevel.alphabet())
    for byte in range(128):
        ((letter, _),) = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(chr(byte))
        assert tokenizer_module._BYTES[letter] == byte


def test_characters_have_no_words():
    with pytest.raises(ValueError, match="expected a wordpiece or byte-level bpe tokenizer, got char"):
        _ = CHAR.starts_word


# ---- other people's tokenizers --------------------------------------------------------------------


def gpt2_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({chr(33 + i): i for i in range(90)} | {"<|endoftext|>": 90}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def test_gpt2s_roles_and_what_it_lacks(tmp_path):
    gpt2_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)  # a folder that holds one will do
    assert (tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.mask) == (None, None, None, None)
    assert tokenizer.sep == 90 and tokenizer.special_ids == {90} and tokenizer.vocab_size == 91
    assert tokenizer.kind == "bpe" and 90 not in tokenizer.encode(["<|endoftext|>"])[0]


def test_truncation_padding_and_templates_of_a_file_are_not_applied():
    theirs = Tokenizer.from_str(WORDPIECE.json)
    plain = [theirs.encode(text, add_special_tokens=False).ids for text in TEXTS]
    theirs.enable_truncation(4)
    theirs.enable_padding(length=50)
    theirs.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair=None, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    ours = TextTokenizer(theirs.to_str())
    assert [ids.tolist() for ids in ours.encode(TEXTS)] == plain
    assert ours.encode_prompt(TEXTS[0]).tolist() == plain[0]


def test_the_hash_is_of_the_content_not_of_the_layout():
    content = json.loads(WORDPIECE.json)
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    assert TextTokenizer(json.dumps(content, indent=7)).sha256 == WORDPIECE.sha256
    content["model"]["vocab"]["fox"] = content["model"]["vocab"].pop("the")
    assert TextTokenizer(json.dumps(content)).sha256 != WORDPIECE.sha256


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_files_that_are_no_tokenizer(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="t.json: not a tokenizer.json"):
        load_tokenizer(path)


def test_faults_of_the_user(tmp_path):
    with pytest.raises(ValueError, match="no such tokenizer; make one with: selfsup data tokenizer"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="expected at least 261 for bpe, got 260"):
        train_tokenizer(TEXTS, "bpe", 260)
    with pytest.raises(ValueError, match=r"expected at least \d+ for the \d+ different letters of this text, got 30"):
        train_tokenizer(TEXTS, "wordpiece", 30)
    with pytest.raises(ValueError, match="cased: char keeps case as it is"):
        train_tokenizer(TEXTS, "char", 100, cased=True)
