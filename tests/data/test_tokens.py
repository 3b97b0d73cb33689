"""Token shards: the tokens are the library's own, and every damage is seen and named."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from data.making import write_tar
from data.text_making import TEXTS, make_tokenizer, make_tokens
from selfsup.data import tokenize as tokenize_module
from selfsup.data.check import main_check
from selfsup.data.command import main_tokenize, main_tokenizer
from selfsup.data.documents import open_texts
from selfsup.data.index import ShardIndex, build_index, open_shards, save_index
from selfsup.data.reader import ShardReader
from selfsup.data.tokenize import TokenDocument, tokenize_shards, write_tokens
from selfsup.data.tokenizer import load_tokenizer, train_tokenizer
from selfsup.data.tokens import TokenIndex, check_tokens, header_json, open_tokens, token_dtype

TOKENIZER = make_tokenizer()
DOCUMENTS = [[5, 6, 7], [8] * 150, [9, 10], [11] * 39, [12] * 31, list(range(5, 60))]


def text_shards(folder: Path, texts: list[str]) -> ShardIndex:
    """Two shards of texts, labelled 0 1 2 0 ..., and a third without labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(np.array_split(np.arange(len(texts)), 3)):
        members = [(f"{i:04d}.txt", texts[i].encode()) for i in part]
        members += [(f"{i:04d}.cls", str(i % 3).encode()) for i in part if shard < 2]
        write_tar(folder / f"s{shard}.tar", sorted(members))
    index = build_index(folder, 1)
    save_index(index)
    return index


@pytest.fixture
def texts(tmp_path) -> ShardIndex:
    return text_shards(tmp_path / "text", [f"{text} {i} [MASK] \u65e5" for i, text in enumerate(TEXTS * 5)])


@pytest.fixture
def saved(tmp_path) -> Path:
    """A tokenizer.json."""
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.json)
    return tmp_path / "tokenizer.json"


@pytest.fixture
def tokens(tmp_path) -> TokenIndex:
    return make_tokens(DOCUMENTS, tmp_path / "tokens", TOKENIZER, [0, 1, -1, 2, 0, 1])


# ---- what is written is what was given ------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 3])
def test_tokens_are_the_librarys_own(texts, saved, tmp_path, processes, monkeypatch):
    monkeypatch.setattr("selfsup.data.documents._CHUNK_BYTES", 200)  # several jobs
    index = tokenize_shards(texts, tmp_path / "out", saved, processes, tokens_per_shard=150)
    library, raw = Tokenizer.from_file(str(saved)), ShardReader(texts).read(np.arange(len(texts)))
    library.encode_special_tokens = True
    for i, data in enumerate(raw):
        expected = library.encode(data.decode(), add_special_tokens=False).ids
        assert index.document(i).tolist() == expected and index.bytes[i] == len(data)
    assert len(index.shards) > 2 and index.label.tolist() == texts.label.tolist()
    assert index.unknown == sum((index.document(i) == 1).sum() for i in range(len(index))) > 0
    assert (index.source, index.classes) == (texts.fingerprint, texts.classes)
    assert index.tokenizer.sha256 == index.tokenizer_sha256 == load_tokenizer(saved).sha256
    assert not np.isin(index.read(0, index.tokens), [0, 2, 3, 4]).any()  # [MASK] in a text is text


def test_the_number_of_processes_changes_nothing(texts, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("selfsup.data.documents._CHUNK_BYTES", 200)
    one, two = (tokenize_shards(texts, tmp_path / f"{n}", saved, n, 150) for n in (1, 2))
    assert one.fingerprint == two.fingerprint
    for path in one.folder.iterdir():
        assert path.read_bytes() == (two.folder / path.name).read_bytes()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(5, 144), max_size=12), min_size=1, max_size=12), st.integers(1, 20), st.data())
def test_documents_never_span_shards_and_reads_join_them(tmp_path_factory, documents, tokens_per_shard, data):
    full = [d for d in documents if d]
    folder = tmp_path_factory.mktemp("t") / "x"
    if not full:
        with pytest.raises(ValueError, match="no document has a token"):
            make_tokens(documents, folder, TOKENIZER)
        return
    index = make_tokens(documents, folder, TOKENIZER, tokens_per_shard=tokens_per_shard)
    assert len(index) == len(full) and index.empty == len(documents) - len(full)
    flat = [t for d in full for t in d]
    files = [np.load(folder / shard.name) for shard in index.shards]
    assert np.concatenate(files).tolist() == flat and index.tokens == len(flat)
    assert all(len(f) <= tokens_per_shard or len(f) in map(len, full) for f in files)
    assert [index.document(i).tolist() for i in range(len(full))] == full
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert index.read(start, stop).tolist() == flat[start:stop] and index.read(start, stop).dtype == np.int64
    assert {*np.cumsum([len(f) for f in files])} <= {*index.offsets}


@pytest.mark.parametrize(("vocab", "dtype"), [(300, "uint16"), (65536, "uint16"), (65537, "uint32"), (10**6, "uint32")])
def test_the_smallest_type_that_holds_the_vocabulary(vocab, dtype):
    assert token_dtype(vocab) == dtype and np.iinfo(token_dtype(vocab)).max >= vocab - 1


def test_a_vocabulary_beyond_16_bits_comes_back(tmp_path):
    letters = "".join(chr(0x20000 + i) for i in range(65600))  # outside the surrogates
    tokenizer = train_tokenizer([letters], "char", 70000)
    (ids,) = tokenizer.encode([letters])
    index = write_tokens([TokenDocument(ids, -1, 4 * len(letters))], tmp_path / "x", tokenizer)
    assert np.load(tmp_path / "x" / "tokens-000000.npy").dtype == np.uint32 and index.vocab_size == 65605
    assert index.read(0, index.tokens).max() == 65604 and index.tokenizer.decode(index.document(0)) == letters


def test_numpy_and_safetensors_alone_read_the_folder(tokens):
    assert sorted(path.name for path in tokens.folder.iterdir()) == [
        "index.safetensors", "tokenizer.json", *(f"tokens-{i:06d}.npy" for i in range(4)),
    ]  # fmt: skip
    with safe_open(tokens.folder / "index.safetensors", framework="numpy") as file:
        assert file.get_tensor("offsets").tolist() == [0, 3, 153, 155, 194, 225, 280]
        assert json.loads(file.metadata()["selfsup"])["kind"] == "tokens"
    mapped = np.load(tokens.folder / "tokens-000001.npy", mmap_mode="r")
    assert mapped.tolist() == [8] * 150


def read_in_a_child(index: TokenIndex, i: int) -> list[int]:
    return index.document(i).tolist()


def test_other_processes_read_it(tokens):
    tokens.document(1)  # opened here first
    with get_context("fork").Pool(1) as pool:
        assert pool.starmap(read_in_a_child, [(tokens, i) for i in range(3)]) == DOCUMENTS[:3]
    sent = pickle.dumps(tokens)  # as to a process that is spawned
    assert len(sent) < 1000 and pickle.loads(sent).document(1).tolist() == DOCUMENTS[1]


def test_fingerprint_follows_the_tokens_and_the_tokenizer(tmp_path, tokens):
    same = make_tokens(DOCUMENTS, tmp_path / "same", TOKENIZER, [0, 1, -1, 2, 0, 1])
    assert same.fingerprint == tokens.fingerprint
    changed = [[5, 6, 8], *DOCUMENTS[1:]]
    others = [
        make_tokens(changed, tmp_path / "a", TOKENIZER, [0, 1, -1, 2, 0, 1]),
        make_tokens(DOCUMENTS, tmp_path / "b", TOKENIZER, [0, 1, -1, 2, 0, 2]),
        make_tokens(DOCUMENTS, tmp_path / "c", make_tokenizer("bpe"), [0, 1, -1, 2, 0, 1]),
    ]
    assert len({tokens.fingerprint, *(index.fingerprint for index in others)}) == 4


# ---- damage ---------------------------------------------------------------------------------------


def fault(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        open_tokens(str(folder))
    return str(error.value)


def test_missing_and_truncated_shards(tokens):
    path = tokens.folder / "tokens-000001.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    assert "tokens-000001.npy: truncated or altered: expected 428 bytes as indexed, got 426" in fault(tokens.folder)
    path.unlink()
    assert "tokens-000001.npy: shard missing" in fault(tokens.folder)
    with pytest.raises(ValueError, match="tokens-000001.npy: cannot open the token shard"):
        tokens.document(1)  # opened before it went


def test_a_shard_of_another_type_is_seen_when_it_is_read(tokens):
    path = tokens.folder / "tokens-000001.npy"
    np.save(path, np.full(75, 8, np.uint32))  # as many bytes
    index = open_tokens(str(tokens.folder))
    with pytest.raises(ValueError, match=r"tokens-000001.npy: altered: expected 150 uint16 .* got \(75,\) uint32"):
        index.document(1)
    assert index.document(0).tolist() == DOCUMENTS[0]
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ValueError, match="tokens-000001.npy: cannot open the token shard"):
        open_tokens(str(tokens.folder)).document(1)


def test_a_flipped_bit_is_found_by_check(tokens, capsys):
    folder = str(tokens.folder)
    main_check(folder)
    assert "6 documents, 280 tokens in 4 shards: all as indexed" in capsys.readouterr().out
    path = tokens.folder / "tokens-000002.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    later = (tokens.folder / "index.safetensors").stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    for everything in (False, True):
        with pytest.raises(ValueError, match="altered since written: tokens-000002.npy"):
            check_tokens(open_tokens(folder), all=everything)
    with pytest.raises(ValueError, match="tokens-000002.npy"):
        main_check(folder)
    with pytest.raises(ValueError, match="nothing can be left out"):
        main_check(folder, drop=True)


def test_a_replaced_tokenizer_is_refused(tokens):
    path = tokens.folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(TOKENIZER.json), indent=1))  # the same, laid out otherwise
    assert open_tokens(str(tokens.folder)).tokenizer.encode(["fox"])[0].tolist() == [TOKENIZER.encode(["fox"])[0][0]]
    path.write_text(make_tokenizer("bpe").json)
    assert "not the tokenizer that made these tokens: expected SHA-256" in fault(tokens.folder)
    with pytest.raises(ValueError, match="not the tokenizer that made these tokens"):
        _ = tokens.tokenizer  # opened before it was replaced
    path.unlink()
    assert "tokenizer.json: missing" in fault(tokens.folder)


def test_a_broken_index_is_refused(tokens, texts):
    path = tokens.folder / "index.safetensors"
    whole = path.read_bytes()
    other = (texts.folder / "index.safetensors").read_bytes()
    for broken in (b"", b"junk" * 100, whole[:-50], whole.replace(b'\\"version', b'\\"versiom'), other):
        path.write_bytes(broken)
        assert "not a usable index of tokens" in fault(tokens.folder)
    path.unlink()
    assert "no index.safetensors" in fault(tokens.folder)


def test_an_index_that_contradicts_itself_is_refused(tokens):
    """Shifted by one: documents would begin and end with their neighbours' tokens."""
    for offsets in (tokens.offsets + 1, tokens.offsets - np.eye(7, dtype=np.int64)[1], tokens.offsets * 0):
        wrong = replace(tokens, offsets=offsets)
        save_file(wrong.tensors(), tokens.folder / "index.safetensors", metadata={"selfsup": header_json(tokens)})
        assert "not a usable index of tokens" in fault(tokens.folder)


def test_one_kind_of_folder_is_not_taken_for_the_other(tokens, texts):
    assert "expected token shards (tokens-*.npy), got shards of text or images" in fault(texts.folder)
    with pytest.raises(ValueError, match="expected shards of text .* got token shards"):
        open_texts(str(tokens.folder))
    with pytest.raises(ValueError, match="got token shards"):
        open_shards(str(tokens.folder))
    assert "no such folder" in fault(tokens.folder / "nowhere")


# ---- writing --------------------------------------------------------------------------------------


def test_nothing_half_written_is_left(texts, saved, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    for name in ("save", "fsync_path"):
        with monkeypatch.context() as patch:
            patch.setattr(tokenize_module, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                tokenize_shards(texts, tmp_path / "out", saved)
        assert sorted(tmp_path.iterdir()) == before
    assert len(tokenize_shards(texts, tmp_path / "out", saved)) == 15


def test_what_a_killed_run_left_is_removed(texts, saved, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process in (ended.pid, os.getpid(), os.getppid()):
        (tmp_path / f".o[u]t.tmp-{process}").mkdir()
    (tmp_path / f".out.tmp-{ended.pid}").mkdir()  # of another folder
    assert len(tokenize_shards(texts, tmp_path / "o[u]t", saved)) == 15
    left = {path.name for path in tmp_path.glob(".*.tmp-*")}
    assert left == {f".o[u]t.tmp-{os.getppid()}", f".out.tmp-{ended.pid}"}


def test_what_is_there_is_not_overwritten(tokens, texts, saved, tmp_path):
    with pytest.raises(ValueError, match="exists; remove it"):
        tokenize_shards(texts, tokens.folder, saved)
    with pytest.raises(ValueError, match="exists; remove it"):
        tokenize_shards(texts, saved, saved)
    (tmp_path / "empty").mkdir()
    assert len(tokenize_shards(texts, tmp_path / "empty", saved)) == 15


def test_faults_of_the_caller(tmp_path, texts, saved):
    with pytest.raises(ValueError, match="token 145: expected one below the vocabulary of 145"):
        make_tokens([[5, 145]], tmp_path / "x", TOKENIZER)
    with pytest.raises(ValueError, match="tokens per shard: expected a value >= 1, got 0"):
        make_tokens([[5]], tmp_path / "x", TOKENIZER, tokens_per_shard=0)
    with pytest.raises(ValueError, match="no such tokenizer"):
        tokenize_shards(texts, tmp_path / "x", tmp_path / "nowhere.json")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def test_texts_that_cannot_be_read_are_named(tmp_path, saved):
    write_tar(tmp_path / "s.tar", [("a.txt", b"one"), ("b.txt", b"caf\xe9")])
    save_index(build_index(tmp_path, 1))
    with pytest.raises(ValueError, match="s.tar: b: not UTF-8"):
        tokenize_shards(open_texts(str(tmp_path)), tmp_path / "out", saved)
    assert not (tmp_path / "out").exists()


# ---- commands -------------------------------------------------------------------------------------


def test_the_commands_say_what_they_did(texts, tmp_path, capsys):
    out = tmp_path / "made" / "t.json"
    main_tokenizer(str(texts.folder), out, kind="wordpiece", vocab_size=120)
    assert capsys.readouterr().out.startswith("wordpiece, 120 tokens, from 15 documents of 0.0 MB")
    with pytest.raises(ValueError, match="t.json: exists"):
        main_tokenizer(str(texts.folder), out)
    with pytest.raises(ValueError, match="expected a file to write, got a folder"):
        (tmp_path / "folder").mkdir()
        main_tokenizer(str(texts.folder), tmp_path / "folder")
    for command in (main_tokenizer, partial(main_tokenize, tokenizer=out)):
        with pytest.raises(ValueError, match="^SHARDS: no such folder: nope"):
            command("nope", tmp_path / "x")
    main_tokenizer(str(texts.folder), tmp_path / "char.json", kind="char", vocab_size=20, sample=4)
    assert "note: the vocabulary is full" in capsys.readouterr().out
    main_tokenize(str(texts.folder), tmp_path / "out", tokenizer=out, processes=1)
    index = open_tokens(str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert f"15 documents, {index.tokens} tokens ({index.bytes.sum() / index.tokens:.2f} bytes a token), " in said
    assert f"{index.unknown} of them unknown ({index.unknown / index.tokens:.2%}), in 1 shards" in said


def test_documents_without_a_token_are_counted(tmp_path, saved, capsys):
    write_tar(tmp_path / "s.tar", [("a.txt", b"fox"), ("b.txt", b" \n "), ("c.txt", b"dog")])
    save_index(build_index(tmp_path, 1))
    main_tokenize(str(tmp_path), tmp_path / "out", tokenizer=saved, processes=1)
    assert capsys.readouterr().out.startswith("left out: 1 documents without a token\n2 documents, ")
    assert open_tokens(str(tmp_path / "out")).empty == 1
