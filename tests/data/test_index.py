"""The shard index, against webdataset reading the same files; and every damage it must see."""

import gzip
import io
import os
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data.making import encode, picture, write_shards, write_tar
from selfsup.data import shard as shard_module
from selfsup.data.index import (
    INDEX_NAME,
    build_index,
    check_shards,
    load_index,
    open_shards,
    save_index,
    write_atomically,
)
from selfsup.data.reader import ShardReader


def read_by_webdataset(paths: list[Path]) -> list[dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(wds.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False))


def read_all(index) -> list[bytes]:
    return ShardReader(index).read(np.arange(len(index)))


def indexed(folder: Path):
    index = build_index(folder, 1)
    save_index(index)
    return index


def test_agrees_with_webdataset(shards):
    index = indexed(shards)
    theirs = read_by_webdataset(sorted(shards.glob("*.tar")))
    assert [index.key(i) for i in range(len(index))] == [sample["__key__"] for sample in theirs]
    assert index.label.tolist() == [int(sample["cls"]) for sample in theirs]
    assert read_all(index) == [sample["png"] for sample in theirs]
    assert index.crc32.tolist() == [zlib.crc32(sample["png"]) for sample in theirs]
    assert [shard.samples for shard in index.shards] == [7, 20, 1, 12]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_names_follow_webdatasets_rule(tmp_path, format):
    image = encode(picture(0))
    long = "d" * 90 + "/" + "e" * 90
    names = [
        "a/b.c.PNG", "a/b.cls", "a.b/x.jpeg", "./y.webp", "__meta__/m.png", "__meta__.png",
        "no_extension", ".hidden.png", "z.JPG", "z.seg.png", f"{long}.png", "only/text.txt",
    ]  # fmt: skip
    with tarfile.open(tmp_path / "s.tar", "w", format=format) as tar:
        tar.addfile(tarfile.TarInfo("a/"))
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
        directory = tarfile.TarInfo("folder")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
    index = build_index(tmp_path, 1)
    theirs = read_by_webdataset([tmp_path / "s.tar"])
    images = {"jpg", "jpeg", "png", "webp"}
    expected = [sample["__key__"] for sample in theirs if images & sample.keys()]
    assert [index.key(i) for i in range(len(index))] == expected == ["a.b/x", "./y", "__meta__", "z", long]
    assert index.skipped == {"members that belong to no sample": 4, "samples without an image": 2}
    assert all(blob == image for blob in read_all(index))


def test_save_and_load_are_inverse(shards):
    (shards / "classes.json").write_text('["ä", "b", "c"]')
    index = indexed(shards)
    loaded = load_index(shards)
    assert loaded.fingerprint == index.fingerprint
    assert loaded.classes == ("ä", "b", "c") and loaded.shards == index.shards
    for name in ("shard", "offset", "length", "crc32", "label", "key_bytes", "key_offsets"):
        ours, theirs = getattr(loaded, name), getattr(index, name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    assert build_index(shards, 2).fingerprint == index.fingerprint  # whatever the number of processes
    assert build_index(sorted(shards.glob("*.tar")), 1).fingerprint == index.fingerprint


def test_fingerprint_follows_the_bytes(tmp_path):
    one = build_index(write_shards(tmp_path / "one", [3]), 1)
    same = build_index(write_shards(tmp_path / "same", [3]), 1)
    other = build_index(write_shards(tmp_path / "other", [3], start=1), 1)
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_labels_that_are_none_are_counted(tmp_path):
    image = encode(picture(0))
    members = [(f"{i}.{kind}", data) for i, text in enumerate(["5", "cat", "-1", "9" * 30, ""])
               for kind, data in [("cls", text.encode()), ("png", image)]]  # fmt: skip
    write_tar(tmp_path / "s.tar", members)
    index = build_index(tmp_path, 1)
    assert index.label.tolist() == [5, -1, -1, -1, -1]
    assert index.skipped == {"labels (.cls) that are not a whole number": 4}


def test_two_images_in_a_sample(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.png", encode(picture(0))), ("a.jpg", encode(picture(1), "JPEG"))])
    index = build_index(tmp_path, 1)
    assert read_all(index)[0].startswith(b"\xff\xd8") and index.skipped == {"second images of a sample": 1}


# ---- damage ---------------------------------------------------------------------------------------


def truncate_in_a_member(data: bytes) -> bytes:
    return data[: 512 * 5 + 100]


def truncate_at_a_boundary(data: bytes) -> bytes:
    return data[: 512 * 8]  # after two whole samples of two members with one block each


def break_a_header(data: bytes) -> bytes:
    return data[: 512 * 4 + 10] + b"\xff" * 20 + data[512 * 4 + 30 :]


def zero_a_page(data: bytes) -> bytes:
    return data[:4096] + bytes(4096) + data[8192:]


DAMAGE = {
    "truncated in a member": (truncate_in_a_member, "damaged|truncated"),
    "truncated at a boundary": (truncate_at_a_boundary, "truncated: expected at least 1024 zero bytes"),
    "bad header": (break_a_header, "damaged: bad header"),
    "zeroed page": (zero_a_page, "damaged"),
    "HTML": (lambda data: b"<!DOCTYPE html><html>404</html>" + data[31:], "web page"),
    "short HTML": (lambda data: b"\n <html>", "web page"),
    "empty": (lambda data: b"", "empty"),
    "gzip": (gzip.compress, "compressed with gzip"),
    "text": (lambda data: b"hello", "damaged or not a tar"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_the_file_named(shards, damage):
    path = shards / "part-001.tar"
    spoil, message = DAMAGE[damage]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        build_index(shards, 1)
    assert "part-001.tar" in str(error.value)


def members_by_tarfile_alone(path: Path, file) -> list[tarfile.TarInfo]:
    """The planted bug: tarfile's own idea of where a shard ends."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return [member for member in tar if member.isreg()]


@pytest.mark.parametrize("damage", ["truncated at a boundary", "bad header", "zeroed page"])
def test_without_the_tail_check_damage_would_be_silent(shards, damage, monkeypatch):
    """What these tests exist for: tarfile, and webdataset, take a damaged shard for a shorter one."""
    path = shards / "part-001.tar"
    path.write_bytes(DAMAGE[damage][0](path.read_bytes()))
    assert 0 < len(read_by_webdataset([path])) < 20
    monkeypatch.setattr(shard_module, "_walk", members_by_tarfile_alone)
    assert 0 < build_index([path], 1).shards[0].samples < 20  # silent: the mutant is worth catching


def test_a_flipped_bit_in_an_image_is_seen_when_it_is_read(shards):
    index = indexed(shards)
    path = shards / "part-001.tar"
    row = 10
    data = bytearray(path.read_bytes())
    data[index.offset[row] + 50] ^= 1
    path.write_bytes(data)
    reader = ShardReader(open_shards(str(shards)))  # same size: not seen yet
    reader.read(np.array([9, 11]))
    with pytest.raises(ValueError, match="altered or damaged") as error:
        reader.read(np.array([9, row, 11]))
    assert "part-001.tar" in str(error.value) and index.key(row) in str(error.value)


def test_altered_shards_are_named_by_their_hash(shards):
    index = indexed(shards)
    assert check_shards(index, all=False) == []
    assert len(check_shards(index, all=True)) == 4
    path = shards / "part-002.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    later = (shards / INDEX_NAME).stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    for everything in (False, True):
        with pytest.raises(ValueError, match="part-002.tar") as error:
            check_shards(index, all=everything)
        assert "part-001.tar" not in str(error.value)


# ---- members that do not belong in a shard --------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc/passwd.png", "../up.png", "a/../../up.png", "bad\nname.png"])
def test_paths_that_leave_the_shard(tmp_path, name):
    write_tar(tmp_path / "s.tar", [("ok.png", encode(picture(0))), (name, b"x")])
    with pytest.raises(ValueError, match="refused"):
        build_index(tmp_path, 1)


KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]


@pytest.mark.parametrize("kind", KINDS)
def test_links_and_devices(tmp_path, kind):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ValueError, match="links, devices"):
        build_index(tmp_path, 1)


def test_keys_that_come_back(tmp_path):
    image = encode(picture(0))
    write_tar(tmp_path / "s.tar", [("a.png", image), ("b.png", image), ("a.cls", b"1")])
    with pytest.raises(ValueError, match="key 'a' comes back"):
        build_index(tmp_path, 1)
    write_tar(tmp_path / "s.tar", [("a.png", image), ("a.png", image)])
    with pytest.raises(ValueError, match="there twice"):
        build_index(tmp_path, 1)


# ---- folders --------------------------------------------------------------------------------------


def test_open_shards_names_what_is_wrong_and_the_fix(shards, tmp_path):
    def fault(folder) -> str:
        with pytest.raises(ValueError) as error:
            open_shards(str(folder))
        return str(error.value)

    assert "no such folder" in fault(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no shards" in fault(tmp_path / "empty") and "selfsup data pack" in fault(tmp_path / "empty")
    assert f"selfsup data index {shards}" in fault(shards)
    assert "expected the folder" in fault(shards / "part-000.tar")
    indexed(shards)
    assert len(open_shards(str(shards))) == 40

    write_shards(shards.parent / "more", [2], start=100)
    os.rename(shards.parent / "more" / "part-000.tar", shards / "part-004.tar")
    assert "part-004.tar" in fault(shards) and "not in the index" in fault(shards)
    os.remove(shards / "part-004.tar")
    with open(shards / "part-003.tar", "ab") as file:
        file.write(bytes(512))
    assert "part-003.tar: truncated or altered" in fault(shards)
    os.remove(shards / "part-003.tar")
    assert "part-003.tar: shard missing" in fault(shards)


@pytest.mark.parametrize("url", ["pipe:cat x.tar", "http://host/x", "s3://bucket/x", "file:///x", "-"])
def test_only_local_folders(url):
    with pytest.raises(ValueError, match="local folder"):
        open_shards(url)


def test_compressed_and_imageless_folders(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.json", b"x")])
    with pytest.raises(ValueError, match="no images in 1 shards"):
        build_index(tmp_path, 1)
    (tmp_path / "t.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="t.tar.gz"):
        build_index(tmp_path, 1)


def test_class_names_must_fit_the_labels(shards):
    (shards / "classes.json").write_text('["a"]')
    with pytest.raises(ValueError, match="a name for every label up to 2, got 1"):
        build_index(shards, 1)
    (shards / "classes.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        build_index(shards, 1)


def test_a_broken_index_is_refused(shards):
    indexed(shards)
    whole = (shards / INDEX_NAME).read_bytes()
    for broken in (b"", b"junk" * 100, whole[:-50], whole.replace(b'"version', b'"versiom')):
        (shards / INDEX_NAME).write_bytes(broken)
        with pytest.raises(ValueError, match="not a usable index"):
            load_index(shards)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_write_that_fails_leaves_nothing_beside_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    whole = Path.write_bytes

    def full(self, content):
        whole(self, content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"newer")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_many_shards_do_not_exhaust_file_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr("selfsup.data.reader._MOST_OPEN_FILES", 2)
    index = build_index(write_shards(tmp_path, [2] * 6), 1)
    reader = ShardReader(index)
    rows = np.random.default_rng(0).permutation(12)
    images = dict(zip(range(12), read_all(index)))
    for _ in range(2):
        assert reader.read(rows) == [images[row] for row in rows.tolist()]
    assert len(reader._files) == 2
    reader.close()
