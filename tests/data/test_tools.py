"""tools/cifar10.py on small archives of the same make."""

import importlib.util
import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.making import encode, picture
from selfsup.data.decode import decode_image
from selfsup.data.index import open_shards
from selfsup.data.reader import ShardReader

TOOL = Path(__file__).parents[2] / "tools" / "cifar10.py"


@pytest.fixture(scope="module")
def cifar10():
    spec = importlib.util.spec_from_file_location("cifar10", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
