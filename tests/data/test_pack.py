"""Packing: what goes in comes out of anyone's webdataset, whatever interrupts it."""

import json
import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data.making import encode, picture, write_tar
from selfsup.data import pack as pack_module
from selfsup.data.check import damaged_samples, main_check
from selfsup.data.command import main_pack
from selfsup.data.decode import decode_image
from selfsup.data.index import build_index, load_index, open_shards, save_index
from selfsup.data.pack import pack, pack_arrays
from selfsup.data.reader import ShardReader


def write_images(folder: Path, classes: list[str], each: int) -> Path:
    for i in range(len(classes) * each):
        path = folder / classes[i % len(classes)] / f"img{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(i)))
    return folder


def read_by_webdataset(folder: Path) -> dict[str, dict]:
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {sample["__key__"]: sample for sample in wds.WebDataset(paths, shardshuffle=False)}


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@pytest.mark.parametrize("processes", [1, 2])
def test_class_folders(tmp_path, processes):
    source = write_images(tmp_path / "in", ["cat", "ant", "dog"], 7)
    report = pack(source, tmp_path / "out", 5, processes)
    index = open_shards(str(tmp_path / "out"))
    assert index.classes == ("ant", "cat", "dog") and len(index) == 21
    assert [shard.samples for shard in index.shards] == [5, 5, 5, 5, 1]
    theirs = read_by_webdataset(tmp_path / "out")
    for row, blob in enumerate(ShardReader(index).read(np.arange(21))):
        key = index.key(row)
        assert blob == (source / f"{key}.png").read_bytes() == theirs[key]["png"]
        assert index.classes[index.label[row]] == Path(key).parent.name
        assert int(theirs[key]["cls"]) == index.label[row]
    assert str(report).endswith(f"21 images, 3 classes in 5 shards: {tmp_path / 'out'}")


def test_shards_mix_the_classes(tmp_path):
    source = write_images(tmp_path / "in", ["a", "b"], 40)
    index = pack(source, tmp_path / "out", 20, 1).index
    for shard in range(4):
        assert 4 <= index.label[index.shard == shard].sum() <= 16


def test_equal_input_makes_equal_bytes(tmp_path):
    source = write_images(tmp_path / "in", ["a", "b"], 6)
    pack(source, tmp_path / "one", 5, 1)
    pack(source, tmp_path / "two", 5, 2)
    assert tars(tmp_path / "one") == tars(tmp_path / "two")
    assert load_index(tmp_path / "one").fingerprint == load_index(tmp_path / "two").fingerprint
    with tarfile.open(tmp_path / "one" / "shard-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "selfsup")}


def test_flat_folders_names_and_kinds(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    names = ["a.b.png", "a_b.png", "a_b.webp", "UPPER.PNG", "__x__.png", "ünï cödé.webp", "q.jpeg"]
    names.append("n" * 150 + ".jpg")
    kinds = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    for i, name in enumerate(names):
        (source / name).write_bytes(encode(picture(i), kinds[Path(name).suffix.lower()]))
    (source / "notes.txt").write_text("x")
    (source / ".hidden.png").write_text("x")
    report = pack(source, tmp_path / "out", 100, 1)
    index = report.index
    assert index.classes == () and index.label.tolist() == [-1] * len(names)
    assert "1 files" in report.notes[0] and ".hidden" not in str(report)
    keys = {index.key(row) for row in range(len(index))}
    assert {"a_b", "a_b-2", "a_b-3", "UPPER", "ünï cödé", "q", "n" * 150} < keys and len(keys) == len(names)
    assert keys == read_by_webdataset(tmp_path / "out").keys()
    assert build_index(tmp_path / "out", 1).fingerprint == index.fingerprint


def test_images_beside_class_folders_get_no_label_and_it_is_said(tmp_path):
    source = write_images(tmp_path / "in", ["a", "b"], 2)
    (source / "stray.png").write_bytes(encode(picture(50)))
    report = pack(source, tmp_path / "out", 10, 1)
    index = report.index
    assert {index.key(row) for row in np.flatnonzero(index.label == -1)} == {"stray"}
    assert "1 images in" in report.notes[0] and "no label" in report.notes[0]


def test_links_are_followed_once(tmp_path):
    source = write_images(tmp_path / "in", ["a"], 3)
    elsewhere = write_images(tmp_path / "elsewhere", ["x"], 2)
    (source / "b").symlink_to(elsewhere / "x")
    (source / "a" / "loop").symlink_to(source)
    assert len(pack(source, tmp_path / "out", 10, 1).index) == 5


@pytest.mark.parametrize("processes", [1, 2])
def test_corrupt_images_are_named_left_out_and_counted(tmp_path, processes):
    source = write_images(tmp_path / "in", ["a", "b"], 5)
    whole = (source / "a" / "img000.png").read_bytes()
    (source / "a" / "img000.png").write_bytes(whole[:-30])
    (source / "b" / "img003.png").write_bytes(b"")
    report = pack(source, tmp_path / "out", 3, processes)
    assert len(report.index) == 8 and report.index.skipped == {"images that could not be decoded": 2}
    assert sorted(line.split(": ")[0] for line in report.corrupt) == [
        str(source / "a" / "img000.png"), str(source / "b" / "img003.png"),
    ]  # fmt: skip
    assert "2 corrupt left out" in str(report)
    again = pack(source, tmp_path / "out", 3, processes)
    assert len(again.corrupt) == 2 and again.index.skipped == report.index.skipped
    fingerprints = {i.fingerprint for i in (load_index(tmp_path / "out"), report.index, again.index)}
    assert fingerprints == {build_index(tmp_path / "out", 1).fingerprint}  # the data are the same


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    source = write_images(tmp_path / "in", ["a", "b"], 10)
    whole = tars(pack(source, tmp_path / "whole", 4, 1).index.folder)

    def crash_after(count: int):
        calls = iter(range(100))

        def decode(data: bytes, channels: int, name: str) -> np.ndarray:
            if next(calls) == count:
                raise KeyboardInterrupt
            return decode_image(data, channels, name)

        return decode

    for count in (0, 1, 9, 4):
        monkeypatch.setattr(pack_module, "decode_image", crash_after(count))
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out", 4, 1)
    written = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in tars(tmp_path / "out")}
    assert 0 < len(written) < 5
    monkeypatch.setattr(pack_module, "decode_image", decode_image)
    report = pack(source, tmp_path / "out", 4, 1)
    assert report.kept_shards == len(written) and tars(tmp_path / "out") == whole
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in written.items())
    assert [path.name for path in (tmp_path / "out").glob(".*tmp*")] == []


def test_run_twice_it_reuses_what_is_there(tmp_path, monkeypatch):
    source = write_images(tmp_path / "in", ["a"], 6)
    pack(source, tmp_path / "out", 3, 1)
    before = (tmp_path / "out" / "index.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(pack_module, "decode_image", None)  # nothing is decoded again
    report = pack(source, tmp_path / "out", 3, 1)
    assert report.kept_shards == 2 and "2 kept" in str(report)
    assert (tmp_path / "out" / "index.safetensors").stat().st_mtime_ns == before


def test_another_plan_is_refused(tmp_path):
    source = write_images(tmp_path / "in", ["a", "b"], 3)
    pack(source, tmp_path / "out", 3, 1)
    with pytest.raises(ValueError, match="another shard size"):
        pack(source, tmp_path / "out", 2, 1)
    (source / "a" / "new.png").write_bytes(encode(picture(9)))
    with pytest.raises(ValueError, match="packed from other images"):
        pack(source, tmp_path / "out", 3, 1)
    (source / "a" / "new.png").unlink()
    os.utime(source / "a" / "img000.png", (1, 1))  # changed since
    with pytest.raises(ValueError, match="packed from other images"):
        pack(source, tmp_path / "out", 3, 1)
    (tmp_path / "out" / "pack.json").unlink()
    with pytest.raises(ValueError, match="not packed here"):
        pack(source, tmp_path / "out", 3, 1)


def test_nothing_to_pack(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        pack(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .jpg, .jpeg, .png or .webp files found"):
        pack(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "a.png").write_text("x")
    with pytest.raises(ValueError, match="none of 1 images could be decoded, such as .*a.png"):
        pack(tmp_path / "empty", tmp_path / "out", 10, 1)
    with pytest.raises(ValueError, match="expected a value >= 1, got 0"):
        pack(tmp_path / "empty", tmp_path / "out", 0, 1)


@pytest.mark.parametrize("shape", [(11, 8, 8), (11, 8, 8, 1), (11, 9, 7, 3)])
def test_arrays_come_back_bit_for_bit(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(11) % 3
    index = pack_arrays(images, labels, ["x", "y", "z"], tmp_path / "out", 4).index
    assert index.classes == ("x", "y", "z")
    channels = 3 if shape[-1] == 3 else 1
    for row, blob in enumerate(ShardReader(index).read(np.arange(11))):
        original = int(index.key(row))
        decoded = decode_image(blob, channels, "x")
        assert np.array_equal(decoded, images[original].reshape(*shape[1:3], channels))
        assert index.label[row] == labels[original]
    again = pack_arrays(images, labels, ["x", "y", "z"], tmp_path / "out", 4)
    assert again.kept_shards == 3
    with pytest.raises(ValueError, match="other images"):
        pack_arrays(255 - images, labels, ["x", "y", "z"], tmp_path / "out", 4)


def test_arrays_of_another_shape(tmp_path):
    with pytest.raises(ValueError, match=r"got \(2, 8, 8, 4\)"):
        pack_arrays(np.zeros((2, 8, 8, 4), np.uint8), np.zeros(2, np.int64), [], tmp_path / "out")


def test_main_prints_the_report(tmp_path, capsys):
    main_pack(str(write_images(tmp_path / "in", ["a"], 2)), tmp_path / "out", processes=1)
    assert "2 images, 1 classes in 1 shards" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["a"]


# ---- check ----------------------------------------------------------------------------------------


def test_check_finds_and_drops_what_cannot_be_decoded(tmp_path, capsys):
    members = [(f"{i}.png", encode(picture(i))) for i in range(6)]
    members[4] = ("4.png", members[4][1][:-40])
    write_tar(tmp_path / "s.tar", members)
    save_index(build_index(tmp_path, 1))
    folder = str(tmp_path)
    assert list(damaged_samples(open_shards(folder), 2)) == [4]
    with pytest.raises(ValueError, match=r"s.tar: 4: cannot decode") as error:
        main_check(folder, processes=1)
    assert "1 of 6 images; leave them out with: selfsup data check" in str(error.value)
    main_check(folder, drop=True, processes=1)
    index = open_shards(folder)
    assert [index.key(row) for row in range(5)] == ["0", "1", "2", "3", "5"]
    assert index.skipped == {"images that could not be decoded": 1} and index.shards[0].samples == 5
    capsys.readouterr()
    main_check(folder, processes=1)
    assert "5 images in 1 shards: all as indexed" in capsys.readouterr().out
