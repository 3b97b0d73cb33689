"""tools/cifar10.py, shakespeare.py and imdb.py on small archives of the same make."""

import importlib.util
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.making import encode, picture
from selfsup.data.decode import decode_image
from selfsup.data.index import open_shards
from selfsup.data.reader import ShardReader
from selfsup.data.tokenizer import SPECIALS, train_tokenizer
from selfsup.data.tokens import open_tokens

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)  # for what tools share
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cifar10():
    return load_tool("cifar10")


@pytest.fixture(scope="module")
def shakespeare():
    return load_tool("shakespeare")


@pytest.fixture(scope="module")
def imdb():
    return load_tool("imdb")


def archive_of(path: Path, members: dict[str, bytes]) -> Path:
    mode = {".xz": "w:xz", ".gz": "w:gz", ".tar": "w"}[path.suffix]
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def class_folders() -> dict[str, bytes]:
    members = {}
    for split, count in (("train", 12), ("test", 4)):
        for i in range(count):
            label = ("ship", "frog")[i % 2]
            pixels = picture(i + 100 * (split == "test"), 32, 32)
            members[f"{split}/{label}/{i // 2:04d}.jpg"] = encode(pixels, "JPEG")
    return members


@pytest.mark.parametrize("name", ["c.tar.xz", "c.tar.gz", "c.tar"])
def test_class_folders_are_kept_byte_by_byte(cifar10, tmp_path, name):
    members = class_folders()
    cifar10.convert(archive_of(tmp_path / name, members), tmp_path / "out", 5)
    for split, count in (("train", 12), ("test", 4)):
        index = open_shards(str(tmp_path / "out" / split))
        assert len(index) == count and index.classes == ("frog", "ship")
        for row, blob in enumerate(ShardReader(index).read(np.arange(count))):
            key = index.key(row)
            assert blob == members[f"{split}/{key}.jpg"]
            assert index.classes[index.label[row]] == key.split("/")[0]


def binary_members() -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (14, 32, 32, 3), dtype=np.uint8), rng.integers(0, 3, 14)
    records = [bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels)]
    folder = "cifar-10-batches-bin"
    members = {
        f"{folder}/data_batch_1.bin": b"".join(records[:5]),
        f"{folder}/data_batch_2.bin": b"".join(records[5:10]),
        f"{folder}/test_batch.bin": b"".join(records[10:]),
        f"{folder}/batches.meta.txt": b"airplane\nautomobile\nbird\n\n",
        f"{folder}/readme.html": b"<html>",
    }
    return members, images, labels


def test_the_binary_version_is_kept_without_loss(cifar10, tmp_path):
    members, images, labels = binary_members()
    cifar10.convert(archive_of(tmp_path / "cifar-10-binary.tar.gz", members), tmp_path / "out")
    for split, first, count in (("train", 0, 10), ("test", 10, 4)):
        index = open_shards(str(tmp_path / "out" / split))
        assert len(index) == count and index.classes == ("airplane", "automobile", "bird")
        for row, blob in enumerate(ShardReader(index).read(np.arange(count))):
            original = first + int(index.key(row))
            assert np.array_equal(decode_image(blob, 3, "x"), images[original])
            assert index.label[row] == labels[original]


def test_the_pickled_version_is_refused_with_the_right_file(cifar10, tmp_path):
    members = {"cifar-10-batches-py/data_batch_1": b"\x80\x04."}
    archive = archive_of(tmp_path / "cifar-10-python.tar.gz", members)
    with pytest.raises(ValueError, match="pickle.*cifar-10-binary.tar.gz"):
        cifar10.convert(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_and_wrong_archives(cifar10, tmp_path):
    whole = archive_of(tmp_path / "c.tar.xz", class_folders()).read_bytes()
    spoilt_files = whole[: len(whole) // 2], whole[:-8], whole[:400] + bytes(40) + whole[440:]
    for place, spoilt in enumerate(spoilt_files):
        path = tmp_path / f"{place}.tar.xz"
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match="damaged archive"):
            cifar10.convert(path, tmp_path / "out")
    plain = tmp_path / "plain.tar"
    plain.write_bytes(lzma.decompress(whole)[:9000])
    with pytest.raises(ValueError, match="damaged archive|expected train/CLASS"):
        cifar10.convert(plain, tmp_path / "out")
    with pytest.raises(ValueError, match="no such file; download https"):
        cifar10.convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="expected train/CLASS"):
        other = archive_of(tmp_path / "other.tar", {"../train/a/1.jpg": b"x", "a.txt": b"x"})
        cifar10.convert(other, tmp_path / "out")
    members, *_ = binary_members()
    members["cifar-10-batches-bin/data_batch_1.bin"] += b"x"
    with pytest.raises(ValueError, match="not a multiple of 3073"):
        cifar10.convert(archive_of(tmp_path / "b.tar.gz", members), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(cifar10, tmp_path, capsys):
    archive = archive_of(tmp_path / "c.tar.xz", class_folders())
    assert cifar10.main(archive, tmp_path / "out") == 0
    assert "12 images, 2 classes in 1 shards" in capsys.readouterr().out
    assert cifar10.main(tmp_path / "nowhere", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "no such file" in captured.err and captured.out == ""


PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpéak, speak.\n" * 7


@pytest.mark.parametrize("name", ["input.txt", "input.txt.xz"])
def test_shakespeare_is_split_as_nanogpt_splits_it(shakespeare, tmp_path, name):
    source, out = tmp_path / name, tmp_path / "out"
    source.write_bytes(lzma.compress(PLAY.encode()) if name.endswith("xz") else PLAY.encode())
    tokens = shakespeare.convert(source, out)
    cut = int(len(PLAY) * 0.9)
    for split, text in (("train", PLAY[:cut]), ("test", PLAY[cut:])):
        index = tokens[split]
        assert len(index) == 1 and index.unknown == 0 and index.tokens == len(text)
        assert index.tokenizer.decode(index.document(0)) == text
        assert ShardReader(open_shards(str(out / split), "text")).texts(np.arange(1)) == [text]
        assert index.bytes.tolist() == [len(text.encode())]
        assert index.vocab_size == len(SPECIALS) + len(set(PLAY))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert shakespeare.main(source, out) == 0  # again: kept
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_other_text_does_not_go_into_the_same_folder(shakespeare, tmp_path, capsys):
    source, out = tmp_path / "input.txt", tmp_path / "out"
    source.write_text(PLAY)
    shakespeare.convert(source, out)
    source.write_text(PLAY.replace("Citizen", "Senator"))
    assert shakespeare.main(source, out) == 2
    assert "holds shards packed from other documents" in capsys.readouterr().err
    assert shakespeare.main(tmp_path / "nowhere", out) == 2
    assert "no such file; download https" in capsys.readouterr().err


def test_damaged_text_is_named_and_nothing_written(shakespeare, tmp_path):
    whole, path, out = lzma.compress(PLAY.encode()), tmp_path / "input.txt.xz", tmp_path / "out"
    for content, message in (
        (whole[:-9], "damaged"),
        (b"caf\xe9 au lait", "not UTF-8"),
        (b"a", "split in two"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name}: .*{message}"):
            shakespeare.convert(path, out)
    assert not out.exists()


def reviews(split: str, count: int) -> list[dict]:
    good, bad = "A wonderful film.<br /><br />I loved it 5 < 6 times.", "A dreadful film.<br/>I [MASK]ed it."
    rows = []
    for i in range(count):
        label, text = ("neg", "pos")[i % 2], (bad, good)[i % 2]
        rows.append({"id": f"{split}/{label}/{i}", "rating": 1, "label": i % 2, "text": f"{i} {text}"})
    return rows


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_imdb(imdb, tmp_path, capsys):
    files = [write_lines(tmp_path / f"{s}.jsonl.xz", reviews(s, n)) for s, n in (("train", 30), ("test", 8))]
    out = tmp_path / "out"
    tokens = imdb.convert(*files, out, vocab_size=90)
    for split, count in (("train", 30), ("test", 8)):
        index = open_shards(str(out / split), "text")
        assert len(index) == count and index.classes == ("neg", "pos")
        wanted = {row["id"]: row for row in reviews(split, count)}
        for row, text in enumerate(ShardReader(index).texts(np.arange(count))):
            original = wanted[index.key(row)]
            assert index.label[row] == original["label"] and "<br" not in text
            assert text == original["text"].replace("<br /><br />", "\n\n").replace("<br/>", "\n")
    assert tokens.vocab_size == 90 and tokens.tokenizer.kind == "wordpiece" and len(tokens) == 30
    assert (
        open_tokens(str(out / "train-tokens")).source == open_shards(str(out / "train"), "text").fingerprint
    )
    assert tokens.tokenizer.mask not in tokens.read(0, tokens.tokens)  # "[MASK]" in a review is a review's
    assert imdb.main(*files, out, 90) == 0  # again: kept
    assert imdb.main(*files, out, 91) == 2
    assert "got wordpiece of 90" in capsys.readouterr().err


def test_a_small_text_has_fewer_tokens_than_were_asked_for(imdb, tmp_path, capsys):
    files = [
        write_lines(tmp_path / f"{split}.jsonl", reviews(split, count))
        for split, count in (("train", 30), ("test", 10))
    ]
    out = tmp_path / "out"
    for _ in range(2):  # the second finds it there
        assert imdb.main(*files, out) == 0
        said = capsys.readouterr().out
        assert "tokens in it, 8192 were allowed" in said
    path = out / "tokenizer.json"
    path.write_text(train_tokenizer(["A wonderful film."], "wordpiece", 8192).json)
    assert imdb.main(*files, out) == 2  # not learnt from these
    assert "expected a wordpiece tokenizer of 8192 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": "a", "label": 2, "text": "x"}', "line 3: expected label 0 or 1"),
        ('{"id": "a", "label": 1, "text": " "}', "line 3: expected label 0 or 1 and a text"),
        ('{"id": "a", "label": 1}', "line 3: expected JSON with label and text"),
        ("[1]", "line 3: expected JSON"),
        ("{", "line 3: expected JSON"),
    ],
)
def test_what_is_no_review_is_named(imdb, tmp_path, line, message):
    good = "".join(json.dumps(row) + "\n" for row in reviews("train", 2))
    (tmp_path / "train.jsonl").write_text(good + line + "\n")
    write_lines(tmp_path / "test.jsonl", reviews("test", 2))
    with pytest.raises(ValueError, match=message):
        imdb.convert(tmp_path / "train.jsonl", tmp_path / "test.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
