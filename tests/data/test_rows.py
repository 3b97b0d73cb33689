"""Rows of tokens, against slow loops and textbook packing; and everything that must be refused."""

import io
import re
import tarfile
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data.making import write_tar
from data.text_making import TEXTS, make_tokenizer, make_tokens
from mutants import exec_changed
from selfsup.config import validate
from selfsup.data import packing, rows
from selfsup.data.index import build_index, save_index
from selfsup.data.rows import TextData, open_rows
from selfsup.data.tokenizer import TextTokenizer

CLS, SEP = 2, 3
LENGTH = 12


def documents(n: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Different tokens as far as the vocabulary goes; every length from 1 to `longest` is likely."""
    draw = np.random.default_rng(seed)
    return [draw.integers(5, 60, draw.integers(1, longest + 1)).tolist() for _ in range(n)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    docs = documents(60)
    folder = tmp_path_factory.mktemp("rows") / "tokens"
    return docs, make_tokens(docs, folder, make_tokenizer(vocab_size=90), [i % 2 for i in range(60)])


def rows_of(corpus, how, length=LENGTH, wrap="bert", next_token=False, **config):
    return open_rows(TextData(shards=str(corpus[1].folder), packing=how, **config), length, wrap, next_token)


def wrap_all(doc: list[int], wrap: str) -> list[int]:
    return [CLS, *doc, SEP] if wrap == "bert" else [*doc, SEP]


VARIANTS = [(wrap, next_token) for wrap in ("bert", "gpt") for next_token in (False, True)]


# ---- concat ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 12, 64])
@pytest.mark.parametrize(("wrap", "next_token"), VARIANTS)
def test_concat_against_a_naive_loop(corpus, wrap, next_token, length):
    stream = [(t, n) for n, doc in enumerate(corpus[0]) for t in wrap_all(doc, wrap)]
    made, width, shifts = rows_of(corpus, "concat", length, wrap, next_token), length + next_token, set()
    for epoch in range(6):
        start = rows.shift(7, epoch, length)
        shifts.add(start)
        for number in range(len(made)):
            row = made.row(7, epoch, number)
            part = stream[start + number * length :][:width]
            assert row.ids.tolist() == [t for t, _ in part]
            assert row.document.tolist() == [n - part[0][1] for _, n in part]
        behind = len(stream) - (start + (len(made) - 1) * length + width)
        assert 0 <= behind and start + behind < length + width  # less than two rows fall off
    assert len(shifts) > 1 and 0 <= min(shifts) and max(shifts) < length
    left = start + behind
    assert f"{left:,} tokens left off" in made.describe()


@given(st.integers(1, 400), st.integers(1, 50), st.booleans())
def test_a_stream_has_as_many_rows_from_any_shift(tokens, length, next_token):
    width = length + next_token
    if tokens < width:
        with pytest.raises(ValueError, match=f"at least the {width} tokens of one row, got {tokens}"):
            packing.stream_rows(tokens, length, width)
        return
    count, shifts = packing.stream_rows(tokens, length, width)
    assert 1 <= shifts <= length and count >= 1
    for start in range(shifts):
        end = start + (count - 1) * length + width
        assert end <= tokens and start + tokens - end < length + width


def test_every_shift_is_drawn():
    counts = np.bincount([rows.shift(3, epoch, 8) for epoch in range(4000)], minlength=8)
    assert len(counts) == 8 and ((counts - 500) ** 2 / 500).sum() < 30  # chi-square, 7 degrees: p about 1e-4


# ---- best fit -------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 24), min_size=1, max_size=80)


def textbook(sizes: list[int], width: int) -> list[list[int]]:
    """Every item looks at every row."""
    made: list[list[int]] = []
    touched: list[int] = []
    for clock, item in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
        fits = [r for r, row in enumerate(made) if sum(sizes[i] for i in row) + sizes[item] <= width]
        if not fits:
            made.append([])
            touched.append(clock)
            fits = [len(made) - 1]
        room = min(width - sum(sizes[i] for i in made[r]) for r in fits)
        fullest = [r for r in fits if width - sum(sizes[i] for i in made[r]) == room]
        best = max(fullest, key=lambda r: touched[r])
        made[best].append(item)
        touched[best] = clock
    return made


def check_best_fit(best_fit, sizes: list[int], width: int = 24) -> None:
    order, borders = best_fit(np.array(sizes), width)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    ours = [order[a:b].tolist() for a, b in zip(borders, borders[1:])]
    assert all(sum(sizes[i] for i in row) <= width for row in ours)
    assert ours == textbook(sizes, width)


@given(SIZES)
def test_best_fit_is_the_textbook_one(sizes):
    check_best_fit(packing.best_fit, sizes)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rooms >> size", "rooms >> (size + 1) << 1"),  # an exact fit is passed by
        ("(fitting & -fitting).bit_length()", "fitting.bit_length()"),  # worst fit
        ("rooms ^= 1 << room", "pass"),  # a row is taken that is not there
        ("-sizes", "sizes"),  # increasing
    ],
)
def test_other_packings_are_caught(old, new):
    mutant = exec_changed(packing, "best_fit", old, new)
    draw = np.random.default_rng(0)
    with pytest.raises((AssertionError, IndexError)):
        for _ in range(50):
            check_best_fit(mutant, draw.integers(1, 25, 40).tolist())


def test_a_hundred_thousand_documents_take_no_time():
    sizes = np.random.default_rng(0).integers(1, 513, 100_000)
    begin = time.perf_counter()
    _, borders = packing.best_fit(sizes, 512)
    assert time.perf_counter() - begin < 5  # 0.1 s; looking at every row takes minutes
    assert sizes.sum() / ((len(borders) - 1) * 512) > 0.99


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.sampled_from(["bert", "gpt"]),
    st.integers(3, 20),
)
def test_cut_leaves_whole_what_fits(lengths, wrap, width):
    offsets = np.cumsum([0, *lengths])
    pieces = packing.cut(offsets, wrap, width)
    assert packing.sizes(pieces, wrap).max() <= width
    covered = [t for start, length in zip(pieces.start, pieces.length) for t in range(start, start + length)]
    assert covered == list(range(offsets[-1]))
    for i, length in enumerate(lengths):
        own = np.flatnonzero(pieces.document == i)
        around = 2 if wrap == "bert" else 1
        assert (len(own) == 1) >= (length + around <= width)
        assert (packing.sizes(pieces, wrap)[own[:-1]] == width).all()  # full rows first
        if wrap == "gpt":  # [SEP] only where the document ends
            assert not pieces.ends[own[:-1]].any()


def unwrapped(row) -> list[list[int]]:
    """The texts of a row's documents, special tokens taken away."""
    parts = [row.ids[row.document == n].tolist() for n in range(row.document.max() + 1)]
    return [[t for t in part if t not in (CLS, SEP)] for part in parts]


@pytest.mark.parametrize("length", [8, 12, 64])
@pytest.mark.parametrize(("wrap", "next_token"), VARIANTS)
def test_bestfit_has_every_token_once(corpus, wrap, next_token, length):
    docs = corpus[0]
    made = rows_of(corpus, "bestfit", length, wrap, next_token)
    width = length + next_token
    found, padding = [], 0
    for number in range(len(made)):
        row = made.row(0, number % 3, number)
        assert len(row.ids) == len(row.document) == width
        real = row.document >= 0
        assert not real[real.argmin() :].any() or real.all()  # padding stands at the end
        assert set(row.ids[~real]) <= {0}
        padding += (~real).sum()
        found += unwrapped(row)
        for n in range(row.document.max() + 1):
            part = row.ids[row.document == n].tolist()
            assert wrap == "gpt" or (part[0], part[-1]) == (CLS, SEP)
    whole = [doc for doc in docs if len(wrap_all(doc, wrap)) <= width]
    for doc in whole:
        found.remove(doc)
    rest = [doc for doc in docs if len(wrap_all(doc, wrap)) > width]
    assert sorted(t for part in found for t in part) == sorted(t for doc in rest for t in doc)
    for doc in rest:  # each is some of the pieces put end to end
        room = width - 2 if wrap == "bert" else width
        for i in range(0, len(doc), room):
            found.remove(doc[i : i + room])
    assert found == []
    assert f"{padding / (len(made) * width):.1%} padding" in made.describe()


# ---- pad, and tokenised as it is read -------------------------------------------------------------


@pytest.mark.parametrize(("wrap", "next_token"), VARIANTS)
def test_pad_has_a_document_a_row(corpus, wrap, next_token):
    made, width = rows_of(corpus, "pad", LENGTH, wrap, next_token), LENGTH + next_token
    lost = cut = padding = 0
    assert len(made) == len(corpus[0])
    for number, doc in enumerate(corpus[0]):
        whole = wrap_all(doc, wrap)
        short = whole[:width]
        if len(whole) > width:
            short = [*whole[: width - 1], SEP] if wrap == "bert" else short
            cut, lost = cut + 1, lost + len(doc) - sum(t > 4 for t in short)
        row = made.row(0, 0, number)
        padding += width - len(short)
        assert row.ids.tolist() == short + [0] * (width - len(short))
        assert row.document.tolist() == [0] * len(short) + [-1] * (width - len(short))
    assert f"{cut} documents cut off, {lost} of their tokens" in made.describe() and cut
    assert f"{padding / (60 * width):.1%} padding" in made.describe()


def write_texts(folder, texts: list[str]):
    folder.mkdir()
    write_tar(folder / "t.tar", [(f"{i:03d}.txt", text.encode()) for i, text in enumerate(texts)])
    save_index(build_index(folder, 1))
    return folder


def test_on_the_fly_equals_token_shards(tmp_path):
    tokenizer = make_tokenizer(vocab_size=90)
    (tmp_path / "tokenizer.json").write_text(tokenizer.json)
    texts = write_texts(tmp_path / "texts", TEXTS)
    index = make_tokens([ids.tolist() for ids in tokenizer.encode(TEXTS)], tmp_path / "tokens", tokenizer)
    fly = TextData(shards=str(texts), tokenizer=str(tmp_path / "tokenizer.json"), packing="pad")
    for wrap, next_token in VARIANTS:
        ours = open_rows(fly, LENGTH, wrap, next_token)
        theirs = open_rows(TextData(shards=str(index.folder), packing="pad"), LENGTH, wrap, next_token)
        assert len(ours) == 3 and "tokenised as they are read" in ours.describe()
        for number in range(3):
            a, b = ours.row(0, 0, number), theirs.row(0, 0, number)
            assert a.ids.tolist() == b.ids.tolist() and a.document.tolist() == b.document.tolist()
    before = open_rows(fly, LENGTH, "bert", False).fingerprint
    (tmp_path / "tokenizer.json").write_text(make_tokenizer(vocab_size=100).json)
    assert open_rows(fly, LENGTH, "bert", False).fingerprint != before


# ---- pairs ----------------------------------------------------------------------------------------


def contains(doc: list[int], part: list[int]) -> bool:
    return any(doc[i : i + len(part)] == part for i in range(len(doc) - len(part) + 1))


def test_pairs(tmp_path):
    docs = [[5 + i] * n for i, n in enumerate([1, 2, 3, 9, 9, 10, 25, 40])]  # a token tells its document
    docs[6] = [11, *range(20, 44)]
    made = rows_of((docs, make_tokens(docs, tmp_path / "t", make_tokenizer(vocab_size=90))), "pairs")
    pieces = [doc[i : i + 9] for doc in docs for i in range(0, len(doc), 9)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    assert len(made) == len(pieces) and "2 tokens left out" in made.describe()  # one of doc 0, one of doc 5
    seen, splits, random_next = set(), set(), []
    for epoch in range(200):
        for number, piece in enumerate(pieces):
            row = made.row(1, epoch, number)
            ids, second = row.ids.tolist(), row.second.tolist()
            end = int((row.document >= 0).sum())
            middle = ids.index(SEP)
            assert (
                ids[0] == CLS
                and ids[end - 1] == SEP
                and ids[:end].count(SEP) == 2
                and ids[end:] == [0] * (12 - end)
            )
            assert second == [0] * (middle + 1) + [1] * (end - middle - 1) + [0] * (12 - end)
            a, b = ids[1:middle], ids[middle + 1 : end - 1]
            assert a == piece[: len(a)] and a and b
            random_next.append(row.random_next)
            if row.random_next:
                others = [i for i, doc in enumerate(docs) if piece[-1] not in doc and contains(doc, b)]
                assert others and len(b) == min(len(piece) - len(a), len(docs[others[0]]))
                seen.add((number, others[0]))
            else:
                assert a + b == piece
                splits.add((number, len(a)))
    assert abs(np.mean(random_next) - 0.5) < 5 * 0.5 / len(random_next) ** 0.5
    assert len(seen) == len(pieces) * 7  # every other document
    assert splits == {(i, n) for i, piece in enumerate(pieces) for n in range(1, len(piece))}


def test_one_document_has_no_other(tmp_path):
    index = make_tokens([[5] * 50], tmp_path / "t", make_tokenizer(vocab_size=90))
    with pytest.raises(ValueError, match="packing pairs: expected at least two documents"):
        rows_of((None, index), "pairs")


# ---- what a fingerprint follows -------------------------------------------------------------------


def test_fingerprints(corpus, tmp_path):
    def made(length=LENGTH, wrap="bert", next_token=False, **config):
        return open_rows(TextData(**{"shards": str(corpus[1].folder), **config}), length, wrap, next_token)

    other = make_tokens(documents(60, seed=1), tmp_path / "t", make_tokenizer(vocab_size=90))
    variants = [
        made(), made(13), made(wrap="gpt"), made(next_token=True), made(packing="bestfit"),
        made(document_mask=True), made(shards=str(other.folder)),
    ]  # fmt: skip
    assert len({v.fingerprint for v in variants}) == len(variants)
    assert made().fingerprint == made(order="sequential").fingerprint  # not the rows, but which comes when
    assert made().vocab_size == made().tokenizer.vocab_size == corpus[1].vocab_size


def test_the_rows_are_pinned(tmp_path):
    """These change only together with PACKING_VERSION: a checkpoint's cursor means nothing otherwise."""
    assert packing.PACKING_VERSION == 1
    assert [rows.shift(0, epoch, 128) for epoch in range(4)] == [58, 3, 4, 69]
    docs = [[5 + i] * (1 + i * 7 % 20) for i in range(20)]
    corpus = docs, make_tokens(docs, tmp_path / "t", make_tokenizer(vocab_size=90))
    assert rows_of(corpus, "bestfit").row(0, 0, 18).ids.tolist() == [2, *[10] * 6, 3, 2, 18, 18, 3]
    assert rows_of(corpus, "pairs").row(5, 2, 3).ids.tolist() == [2, 8, 3, 16, 3] + [0] * 7


# ---- faults ---------------------------------------------------------------------------------------


def gpt_tokenizer() -> TextTokenizer:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return TextTokenizer(tokenizer.to_str())


def test_a_gpt2_tokenizer_serves_gpt_rows_only(tmp_path):
    index = make_tokens([[5] * 9, [6] * 30], tmp_path / "t", gpt_tokenizer())
    made = rows_of((None, index), "pad", wrap="gpt", next_token=True)
    assert made.row(0, 0, 0).ids.tolist() == [5] * 9 + [256] * 4 and made.row(0, 0, 0).document[
        9:
    ].tolist() == [0, -1, -1, -1]
    made = rows_of((None, index), "concat", wrap="gpt", next_token=True)
    stream = [5] * 9 + [256] + [6] * 30 + [256]
    start = rows.shift(0, 0, LENGTH)
    assert made.row(0, 0, 1).ids.tolist() == stream[start + LENGTH :][: LENGTH + 1]
    made = rows_of((None, index), "bestfit", wrap="gpt", next_token=True)
    assert [made.row(0, 0, n).ids.tolist() for n in range(4)] == [
        [6] * 13, [6] * 13, [5] * 9 + [256] * 4, [6] * 4 + [256] * 9,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=re.escape("it has no [CLS], [MASK]")):
        rows_of((None, index), "pad")
    with pytest.raises(ValueError, match=re.escape("it has no [MASK]")):
        rows_of((None, index), "pad", wrap="gpt")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"tokenizer": "t.json"},
            "packing: concat must know .* selfsup data tokenize x x-tokens --tokenizer t.json",
        ),
        ({"packing": "pairs", "document_mask": True}, "document_mask: packing pairs"),
        ({"packing": "best"}, "packing: expected one of 'concat', 'bestfit', 'pad' or 'pairs'"),
        ({"order": "random"}, "order: expected one of"),
    ],
)
def test_config_faults(config, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        validate(TextData, {"shards": "x", **config})


def test_faults_name_the_fix(corpus, tmp_path):
    (tmp_path / "tokenizer.json").write_text(make_tokenizer().json)
    texts = str(write_texts(tmp_path / "texts", TEXTS))

    def fault(length=LENGTH, wrap="bert", next_token=False, **config) -> str:
        with pytest.raises(ValueError) as error:
            open_rows(TextData(**{"shards": str(corpus[1].folder), **config}), length, wrap, next_token)
        return str(error.value)

    assert "selfsup data tokenize" in fault(shards=texts) and "set data.tokenizer" in fault(shards=texts)
    file = str(tmp_path / "tokenizer.json")
    assert "leave data.tokenizer out" in fault(packing="pad", tokenizer=file)
    assert "no such tokenizer" in fault(shards=texts, packing="pad", tokenizer=file + "x")
    assert "no such folder" in fault(shards=str(tmp_path / "nowhere"))
    assert "data.packing: pairs" in fault(packing="pairs", wrap="gpt")
    assert "data.packing: pairs" in fault(packing="pairs", next_token=True)
    assert "encoder.max_length: expected at least 3" in fault(2)
    assert "encoder.max_length: expected at least 5" in fault(4, packing="pairs")
    tokens = sum(len(doc) + 2 for doc in corpus[0])
    assert f"at least the {tokens + 1} tokens of one row, got {tokens}" in fault(tokens + 1)
    assert len(rows_of(corpus, "concat", tokens)) == 1


def test_text_that_is_not_utf8_is_named(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    with tarfile.open(folder / "t.tar", "w") as tar:
        for name, data in [("a.txt", b"fine"), ("b.txt", b"caf\xe9 au lait")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    save_index(build_index(folder, 1))
    (tmp_path / "tokenizer.json").write_text(make_tokenizer().json)
    config = TextData(shards=str(folder), tokenizer=str(tmp_path / "tokenizer.json"), packing="pad")
    made = open_rows(config, LENGTH, "bert", False)
    made.row(0, 0, 0)
    with pytest.raises(ValueError, match="t.tar: b: not UTF-8 text"):
        made.row(0, 0, 1)
