"""Text into shards: what goes in comes out of anyone's webdataset, and what does not is named and counted."""

import codecs
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from data.making import encode, picture, write_tar
from selfsup.data import text_sources
from selfsup.data.check import main_check
from selfsup.data.command import detect, main_pack
from selfsup.data.documents import TextStream, chunks, open_texts, sampled_rows
from selfsup.data.index import build_index, load_index, main_index, open_shards, save_index
from selfsup.data.pack import PackReport
from selfsup.data.python_docs import docstrings, is_test, make_python_docs
from selfsup.data.reader import ShardReader
from selfsup.data.text_sources import as_utf8, pack_text
from selfsup.data.tokens import open_tokens
from selfsup.look.page import main_show


def texts_of(index) -> dict[str, str]:
    """Key -> text."""
    texts = ShardReader(index).texts(np.arange(len(index)))
    return {index.key(row): text for row, text in enumerate(texts)}


def labels_of(index) -> dict[str, int]:
    return {index.key(row): int(index.label[row]) for row in range(len(index))}


def read_by_webdataset(folder: Path) -> dict[str, dict]:
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {sample["__key__"]: sample for sample in wds.WebDataset(paths, shardshuffle=False)}


def write_lines(path: Path, lines: list[dict | str | bytes]) -> Path:
    raw = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def write_texts(folder: Path, texts: dict[str, str | bytes]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


# ---- sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_class_folders(tmp_path, processes):
    texts = {f"{c}/{i}.txt": f"{c} speaks {i}\r\nünï\n" for c in ("pos", "neg") for i in range(5)}
    source = write_texts(tmp_path / "in", {**texts, "neg/deep/x.md": "deep", "stray.rst": "stray"})
    report = pack_text(source, tmp_path / "out", 4, processes)
    index = open_texts(str(tmp_path / "out"))
    assert index.kind == "text" and index.classes == ("neg", "pos") and len(index) == 12
    assert [shard.samples for shard in index.shards] == [4, 4, 4]
    expected = {name.removesuffix(".txt"): text for name, text in texts.items()}
    assert texts_of(index) == {**expected, "neg/deep/x": "deep", "stray": "stray"}
    classes = {key: -1 if key == "stray" else ["neg", "pos"].index(key[:3]) for key in texts_of(index)}
    assert labels_of(index) == classes
    assert "1 files in" in report.notes[0] and "no label" in report.notes[0]
    assert str(report).endswith(f"12 documents, 2 classes in 3 shards: {tmp_path / 'out'}")


def test_anyones_webdataset_reads_the_shards(tmp_path):
    lines = [{"text": f"text {i} é", "label": i % 2} for i in range(9)]
    index = pack_text(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "out", 4).index
    theirs = read_by_webdataset(tmp_path / "out")
    assert {key: sample["txt"].decode() for key, sample in theirs.items()} == texts_of(index)
    assert {key: int(sample["cls"]) for key, sample in theirs.items()} == labels_of(index)
    assert list(theirs) == [index.key(row) for row in range(9)]


def test_a_file_is_a_document_or_its_paragraphs_are(tmp_path):
    content = "\ufeffone\nstill one\n\n \t\ntwo\r\n\r\n\n\u00a0\n\nthree"
    file = write_texts(tmp_path, {"a.txt": content}) / "a.txt"
    assert texts_of(pack_text(file, tmp_path / "whole").index) == {"a": content.removeprefix("\ufeff")}
    report = pack_text(file, tmp_path / "parts", documents="paragraph")
    assert texts_of(report.index) == {
        "a/00000001": "one\nstill one", "a/00000002": "two", "a/00000004": "three",
    }  # fmt: skip
    assert report.index.skipped == {"empty documents": 1}  # the third is a no-break space
    with pytest.raises(ValueError, match="packed from other documents"):
        pack_text(file, tmp_path / "whole", documents="paragraph")


@given(st.lists(st.sampled_from(["a", "b c", "", " ", "é\r"]), max_size=12), st.booleans())
def test_paragraphs_are_what_lies_between_blank_lines(tmp_path_factory, lines, end):
    content = "\n".join(lines) + "\n" * end
    blocks, held = [], []
    for line in [*content.split("\n"), ""]:
        if line.strip():
            held.append(line)
        elif held:
            blocks.append("\n".join(held).rstrip("\r\n"))
            held = []
    file = write_texts(tmp_path_factory.mktemp("p"), {"a.txt": content}) / "a.txt"
    plan = text_sources.plan_text(file, "paragraph")
    assert [sample.content.read_bytes().decode() for sample in plan.samples] == blocks


def test_jsonl_named_labels_numbers_and_none(tmp_path):
    named = [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}, {"text": "c"}, {"text": "d", "label": None}]
    index = pack_text(write_lines(tmp_path / "n.jsonl", named), tmp_path / "named").index
    assert index.classes == ("neg", "pos")
    assert labels_of(index) == {"n/00000001": 1, "n/00000002": 0, "n/00000003": -1, "n/00000004": -1}
    numbered = [{"text": "a", "label": 3}, {"text": "b", "label": -1}, "", {"text": "c", "label": 0, "more": [1]}]
    index = pack_text(write_lines(tmp_path / "m.jsonl", numbered), tmp_path / "numbered").index
    assert index.classes == () and labels_of(index) == {"m/00000001": 3, "m/00000002": -1, "m/00000004": 0}
    both = write_lines(tmp_path / "b.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": "x"}])
    with pytest.raises(ValueError, match=r"a name in .*b.jsonl:2 and a number in .*b.jsonl:1"):
        pack_text(both, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_folder_of_jsonl_has_no_classes(tmp_path):
    for name in ("x/a", "y/a"):
        write_lines(tmp_path / "in" / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(3)])
    write_texts(tmp_path / "in", {"README.md": "about"})
    report = pack_text(tmp_path / "in", tmp_path / "out")
    assert report.index.classes == () and set(report.index.label) == {-1} and len(report.index) == 6
    assert texts_of(report.index)["y/a/00000002"] == "y/a 1"
    assert "1 text files" in report.notes[0] and "left alone" in report.notes[0]


# ---- faults in the source -------------------------------------------------------------------------

BROKEN = ["{", '["text"]', '{"txt": "a"}', '{"text": 5}', '{"text": "a", "label": 1.5}', '{"text": "a", "label": true}',
          '{"text": "a", "label": -2}', "[" * 100_000, b"\xff\xfe\x00"]  # fmt: skip


def test_broken_lines_are_named_counted_and_left_out(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "good"}, *BROKEN, {"text": " \n"}, {"text": "also"}])
    report = pack_text(file, tmp_path / "out")
    assert sorted(texts_of(report.index).values()) == ["also", "good"]
    assert report.index.skipped == {"empty documents": 1, "broken lines of JSON": len(BROKEN)}
    named = [note.split(": ")[1] for note in report.notes if note.startswith("left out: /")]
    assert named == [f"{file}:{number}" for number in range(2, 2 + len(BROKEN))]
    assert load_index(tmp_path / "out").skipped == report.index.skipped
    again = pack_text(file, tmp_path / "out")
    assert again.index.skipped == report.index.skipped and again.notes == report.notes


def test_many_broken_lines_are_counted_and_the_first_named(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "good"}, *["{"] * 50])
    notes = pack_text(file, tmp_path / "out").notes
    assert len(notes) == 21 and notes[-1] == "left out: 30 more broken lines"


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path):
    source = write_texts(tmp_path / "in", {"bad.txt": b"caf\xe9 \xff\xfe ok", "good.txt": "fine \ufffd"})
    report = pack_text(source, tmp_path / "out")
    assert texts_of(report.index) == {"bad": "caf\ufffd \ufffd\ufffd ok", "good": "fine \ufffd"}
    assert report.notes == (f"note: {source / 'bad.txt'}: 3 places are not UTF-8: replaced by U+FFFD",)
    assert report.index.skipped == {}
    lines = [b'{"text": "caf\xe9"}', b'{"text": "half a pair \\ud83d, a pair \\ud83d\\ude00"}']
    report = pack_text(write_lines(tmp_path / "b.jsonl", lines), tmp_path / "lines")
    assert set(texts_of(report.index).values()) == {"caf\ufffd", "half a pair \ufffd, a pair \U0001f600"}
    assert "b.jsonl: 2 places" in report.notes[0]


@given(st.lists(st.binary(max_size=6) | st.text(max_size=3).map(str.encode)))
def test_replacing_is_pythons_and_the_count_is_right(parts):
    data = b"".join(parts)
    fixed, count = as_utf8(data)
    assert fixed.decode() == data.decode(errors="replace")
    seen = []

    def handler(error: UnicodeDecodeError) -> tuple[str, int]:
        seen.append(error.start)
        return "?", error.end

    codecs.register_error("counted", handler)
    data.decode(errors="counted")
    assert count == len(seen)


def test_nothing_to_pack(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        pack_text(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .txt, .md, .rst or .jsonl files found"):
        pack_text(tmp_path / "empty", tmp_path / "out")
    write_texts(tmp_path / "empty", {"a.txt": " \n"})
    with pytest.raises(ValueError, match="1 empty documents\nnothing to pack: no documents"):
        pack_text(tmp_path / "empty", tmp_path / "out")
    packed = write_texts(tmp_path, {"a.jsonl.xz": "x"}) / "a.jsonl.xz"
    with pytest.raises(ValueError, match=r"expected a .txt, .md, .rst or .jsonl file \(unpacked\)"):
        pack_text(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_document_too_large_is_refused_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "LARGEST_SAMPLE", 100)
    file = write_texts(tmp_path, {"a.txt": "x" * 99 + "\n\n" + "y" * 99}) / "a.txt"
    with pytest.raises(ValueError, match="--documents paragraph"):
        pack_text(file, tmp_path / "out")
    assert len(pack_text(file, tmp_path / "out", documents="paragraph").index) == 2


def test_paragraphs_of_jsonl_are_refused(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "one\n\ntwo"}])
    with pytest.raises(ValueError, match="documents: .*a.jsonl holds JSONL, a document a line; leave it out"):
        pack_text(file, tmp_path / "out", documents="paragraph")


# ---- interrupted, repeated, changed ---------------------------------------------------------------


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    lines = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    file = write_lines(tmp_path / "a.jsonl", lines)
    whole = tars(pack_text(file, tmp_path / "whole", 4).index.folder)
    read = text_sources.Line.read_bytes
    for count in (0, 1, 9, 4):
        calls = iter(range(100))

        def crash(self, calls=calls, count=count):
            if next(calls) == count:
                raise KeyboardInterrupt
            return read(self)

        monkeypatch.setattr(text_sources.Line, "read_bytes", crash)
        with pytest.raises(KeyboardInterrupt):
            pack_text(file, tmp_path / "out", 4)
    monkeypatch.setattr(text_sources.Line, "read_bytes", read)
    with pytest.raises(ValueError, match="no index.safetensors; if packing was interrupted, call selfsup data pack"):
        open_texts(str(tmp_path / "out"))
    kept = len(tars(tmp_path / "out"))
    report = pack_text(file, tmp_path / "out", 4)
    assert 0 < kept < 5 and report.kept_shards == kept and tars(tmp_path / "out") == whole
    assert report.index.fingerprint == load_index(tmp_path / "whole").fingerprint
    before = (tmp_path / "out" / "index.safetensors").stat().st_mtime_ns
    assert pack_text(file, tmp_path / "out", 4).kept_shards == 5
    assert (tmp_path / "out" / "index.safetensors").stat().st_mtime_ns == before
    os.utime(file, (1, 1))
    with pytest.raises(ValueError, match="packed from other documents or with another shard size"):
        pack_text(file, tmp_path / "out", 4)


def test_a_source_that_changes_while_it_is_packed_is_seen(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "first"}, {"text": "second"}])
    plan_text = text_sources.plan_text

    def plan_then_change(*arguments):
        plan = plan_text(*arguments)
        write_lines(file, [{"text": "a longer first"}, {"text": "x"}])
        return plan

    monkeypatch.setattr(text_sources, "plan_text", plan_then_change)
    with pytest.raises(ValueError, match="none of 2 documents could be decoded, such as .*a.jsonl|not valid JSON"):
        pack_text(file, tmp_path / "out")


def test_documents_are_mixed_before_they_are_cut_into_shards(tmp_path):
    lines = [{"text": f"{i}", "label": int(i >= 40)} for i in range(80)]
    index = pack_text(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "out", 20).index
    for shard in range(4):
        assert 4 <= index.label[index.shard == shard].sum() <= 16


# ---- images or text -------------------------------------------------------------------------------


def test_auto_looks_and_refuses_both(tmp_path, capsys):
    text = write_texts(tmp_path / "text", {"a.txt": "words", "notes.pdf": "x"})
    main_pack(str(text), tmp_path / "t", processes=1)
    assert "1 documents in 1 shards" in capsys.readouterr().out
    image = write_texts(tmp_path / "images", {"a.png": encode(picture(0))})
    main_pack(str(image), tmp_path / "i", processes=1)
    assert "1 images in 1 shards" in capsys.readouterr().out
    write_texts(image, {"README.md": "about", "license.txt": "free"})
    main_pack(str(image), tmp_path / "i2", processes=1)
    said = capsys.readouterr().out
    assert "note: 2 files in" in said and "1 images in 1 shards" in said
    alone = write_texts(tmp_path / "alone", {"README.md": "about"})
    assert detect(alone) == "text"
    write_texts(image, {"caption.txt": "a picture"})
    with pytest.raises(ValueError, match="holds 1 images and 1 text files; say which: --kind images, or --kind text"):
        main_pack(str(image), tmp_path / "b", processes=1)
    main_pack(str(image), tmp_path / "b", kind="text", processes=1)
    assert "3 documents in 1 shards" in capsys.readouterr().out
    with pytest.raises(ValueError, match="documents: .* holds images, which have no paragraphs"):
        main_pack(str(image), tmp_path / "c", kind="images", documents="paragraph", processes=1)
    with pytest.raises(ValueError, match="caption.txt: expected a folder of images, got the file"):
        main_pack(str(image / "caption.txt"), tmp_path / "c", kind="images", processes=1)
    for ignored in ({"kind": "text"}, {"documents": "paragraph"}, {"samples_per_shard": 10}):
        with pytest.raises(ValueError, match="python-docs: --kind, --documents and --samples-per-shard mean nothing"):
            main_pack("python-docs", tmp_path / "d", processes=1, **ignored)
    assert not (tmp_path / "d").exists()
    with pytest.raises(ValueError, match="expected a folder for the shards: selfsup data pack"):
        main_pack(str(image))


def test_one_kind_is_not_taken_for_the_other(tmp_path):
    text = str(pack_text(write_texts(tmp_path / "in", {"a.txt": "words"}), tmp_path / "t").index.folder)
    (tmp_path / "i").mkdir()
    write_tar(tmp_path / "i" / "s.tar", [("a.png", encode(picture(0)))])
    save_index(build_index(tmp_path / "i", 1))
    for opened in (open_shards, main_show):
        with pytest.raises(ValueError, match="expected shards of images, got text; name a folder of images"):
            opened(text)
    with pytest.raises(ValueError, match="expected shards of text, got images"):
        open_texts(str(tmp_path / "i"))
    with pytest.raises(ValueError, match="expected token shards .* got shards of text or images"):
        open_tokens(text)
    assert open_shards(text, None).kind == "text" and open_shards(str(tmp_path / "i"), None).kind == "images"


def test_the_index_of_images_does_not_know_of_kinds(shards):
    """As it was written before there was text: older readers, and fingerprints in checkpoints, stay right."""
    save_index(build_index(shards, 1))
    assert b'"kind' not in (shards / "index.safetensors").read_bytes() and load_index(shards).kind == "images"


def test_foreign_text_shards_are_indexed_and_captions_are_not_documents(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "mixed").mkdir()
    write_tar(tmp_path / "text" / "s.tar", [("a.txt", b"one"), ("a.cls", b"1"), ("b.json", b"{}"), ("c.txt", b"two")])
    main_index(tmp_path / "text", 1)
    assert "skipped: 1 samples without a text\n2 documents in 1 shards" in capsys.readouterr().out
    index = open_texts(str(tmp_path / "text"))
    assert texts_of(index) == {"a": "one", "c": "two"} and labels_of(index) == {"a": 1, "c": -1}
    write_tar(tmp_path / "mixed" / "s.tar", [("a.png", encode(picture(0))), ("a.txt", b"caption")])
    write_tar(tmp_path / "mixed" / "t.tar", [("b.txt", b"lost its picture")])
    index = build_index(tmp_path / "mixed", 1)
    assert index.kind == "images" and len(index) == 1 and index.skipped == {"samples without an image": 1}


def test_check_decodes_texts_and_drops_what_is_not_utf8(tmp_path, capsys):
    write_tar(tmp_path / "s.tar", [("a.txt", b"one"), ("b.txt", b"caf\xe9"), ("c.txt", b"two")])
    save_index(build_index(tmp_path, 1))
    with pytest.raises(ValueError, match="s.tar: b: not UTF-8 text .*at byte 3"):
        ShardReader(open_texts(str(tmp_path))).texts(np.arange(3))
    with pytest.raises(ValueError, match="s.tar: b: not UTF-8 text.*\n1 of 3 documents; leave them out"):
        main_check(str(tmp_path), processes=1)
    main_check(str(tmp_path), drop=True, processes=1)
    capsys.readouterr()
    main_check(str(tmp_path), processes=1)
    assert "2 documents in 1 shards: all as indexed, all can be decoded" in capsys.readouterr().out
    index = open_texts(str(tmp_path))
    assert index.kind == "text" and index.skipped == {"documents that could not be decoded": 1}


# ---- reading --------------------------------------------------------------------------------------


def packed(folder: Path, texts: list[str]) -> PackReport:
    return pack_text(write_lines(folder / "a.jsonl", [{"text": text} for text in texts]), folder / "out", 4)


def test_streams_hold_some_megabytes_and_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("selfsup.data.documents._CHUNK_BYTES", 10)
    index = packed(tmp_path, [str(i) * (1 + i * i) for i in range(7)]).index
    rows = np.arange(len(index))
    parts = chunks(index, rows)
    assert np.concatenate(parts).tolist() == rows.tolist() and len(parts) > 3
    assert all(len(part) == 1 or index.length[part[1:]].sum() < 10 for part in parts)
    stream = TextStream(index, rows[1:])
    assert list(stream) == list(stream) == ShardReader(index).texts(rows[1:])


def test_a_sample_is_drawn_by_key(tmp_path):
    index = packed(tmp_path, [str(i) for i in range(50)]).index
    drawn = sampled_rows(index, 20)
    assert len(set(drawn)) == 20 and (np.diff(drawn) > 0).all() and drawn.tolist() != list(range(20))
    assert drawn.tolist() == sampled_rows(index, 20).tolist()
    assert sampled_rows(index, None).tolist() == sampled_rows(index, 99).tolist() == list(range(50))
    with pytest.raises(ValueError, match="sample: expected a number of documents >= 1, got 0"):
        sampled_rows(index, 0)


# ---- python-docs ----------------------------------------------------------------------------------

SOURCE = '''
"""The module."""
class A:
    """Class A.

        Indented.

    Not.
    """
    def f(self):
        "first"
    async def g(self):
        """second"""
        def inner(): r"""third \\d"""
def last():
    """   """
'''


def test_docstrings_in_the_order_of_the_source():
    assert docstrings(SOURCE) == ["The module.", "Class A.\n\n    Indented.\n\nNot.", "first", "second", "third \\d"]


def write_library(folder: Path, modules: int) -> Path:
    text = "Words of module {0}, which says this and that about number {0}. " * 6
    names = [f"pack{i % 3}/m{i}.py" for i in range(modules)]
    sources = {name: f'"""{text.format(i)}"""\n' for i, name in enumerate(names)}
    others = {"short.py": '"""Short."""', "test/t.py": sources[names[0]], "bad.py": "def"}
    return write_texts(folder, {**sources, **others, "site-packages/p.py": sources[names[0]]})


def test_python_docs_makes_everything_and_keeps_it(tmp_path, monkeypatch):
    library = write_library(tmp_path / "lib", 60)
    made = make_python_docs(tmp_path / "docs", 1, library)
    modules = {part: {key.replace("/", ".") for key in texts_of(made.packed[part].index)} for part in made.packed}
    assert modules["train"] | modules["test"] == {f"pack{i % 3}.m{i}" for i in range(60)}
    assert all(is_test(name) for name in modules["test"]) and not any(map(is_test, modules["train"]))
    assert 0 < len(modules["test"]) < 15 and (made.left_out, made.unreadable) == (1, 1)
    assert "1 modules with less than 200 characters" in str(made)
    assert "1 modules that this Python cannot parse left out" in str(made)
    for part in ("train", "test"):
        tokens = open_tokens(str(tmp_path / "docs" / f"{part}-tokens"))
        assert len(tokens) == len(modules[part]) and tokens.source == made.packed[part].index.fingerprint
    assert str(made).endswith("next: selfsup train configs/mlm/quickstart.yaml")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "docs").rglob("*.*")}
    make_python_docs(tmp_path / "docs", 1, library)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "docs").rglob("*.*")} == times
    (tmp_path / "docs" / "tokenizer.json").write_text(json.dumps({"other": 1}))
    with pytest.raises(ValueError, match="tokenizer.json"):
        make_python_docs(tmp_path / "docs", 1, library)
    write_texts(library, {"more.py": f'"""{"word " * 50}"""'})
    with pytest.raises(ValueError, match="packed from other documents"):
        make_python_docs(tmp_path / "docs", 1, library)
    with pytest.raises(ValueError, match="no source code of the standard library"):
        make_python_docs(tmp_path / "none", 1, write_texts(tmp_path / "bare", {"a.py": ""}))
