"""Decoding, and the law of batches: the same on any number of processes and workers."""

import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from data.making import encode, picture, write_shards, write_tar
from selfsup.batch import ImageBatch
from selfsup.config import validate
from selfsup.data import decode
from selfsup.data.augment import crop_and_resize, crop_boxes, flips
from selfsup.data.decode import decode_image
from selfsup.data.images import ImageData, eval_batches, train_batches
from selfsup.data.index import build_index, open_shards, save_index
from selfsup.data.order import BatchPlan, sample_order

# ---- decoding -------------------------------------------------------------------------------------


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)]
    return np.stack(planes, -1).astype(np.uint8)


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decodes_as_pillow_does(kind, mode):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "PNG": {}}[kind]
    data = file_of(Image.fromarray(smooth(21, 34)).convert(mode), kind, **options)
    for channels, wanted in ((3, "RGB"), (1, "L")):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert(wanted)).reshape(21, 34, channels)
        ours = decode_image(data, channels, "x")
        assert ours.shape == expected.shape and ours.dtype == np.uint8
        # Two JPEG decoders, and grey taken from the luma channel: a few levels.
        assert np.abs(ours.astype(int) - expected).max() <= (4 if kind == "JPEG" else 0)


def test_odd_images():
    pixels = smooth(16, 20)
    cmyk = file_of(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode_image(cmyk, 3, "x").astype(int) - pixels).mean() < 4
    alpha = Image.fromarray(np.dstack([pixels, np.full((16, 20), 7, np.uint8)]))
    assert np.array_equal(decode_image(file_of(alpha, "PNG"), 3, "x"), pixels)
    palette = Image.fromarray(pixels).convert("P")
    assert np.array_equal(decode_image(file_of(palette, "PNG"), 3, "x"), np.asarray(palette.convert("RGB")))
    deep = Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200)
    assert np.array_equal(decode_image(file_of(deep, "PNG"), 1, "x")[..., 0], np.asarray(deep) >> 8)
    binary = Image.fromarray(pixels[..., 0] > 100)
    assert set(np.unique(decode_image(file_of(binary, "PNG"), 3, "x"))) == {0, 255}


def png_claiming(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encode(picture(0), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_claiming(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sizes


@pytest.mark.parametrize("claiming", [png_claiming, jpeg_claiming, webp_claiming])
def test_image_bombs_are_refused_by_their_header(claiming, monkeypatch):
    for decoder in ("PngImageFile", "WebPImageFile", "JpegImageFile"):
        monkeypatch.setattr(decode, decoder, None)  # not even opened
    with pytest.raises(ValueError, match="its header says 10000 x 5001"):
        decode_image(claiming(5001, 10000), 3, "bomb")


def test_webp_sizes_are_read_right():
    for options in ({"lossless": True}, {"quality": 50}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}):
        data = file_of(Image.fromarray(smooth(37, 300)), "WEBP", **options)
        assert decode._webp_size(data) == (37, 300)


def flip_in(data: bytes, place: float) -> bytes:
    spoilt = bytearray(data)
    spoilt[int(len(data) * place)] ^= 0xFF
    return bytes(spoilt)


JPEG, PNG, WEBP, TIFF = (
    file_of(Image.fromarray(smooth(64, 64)), kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF")
)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"hello", b"<html>", b"GIF89a" + bytes(50), b"BM" + bytes(60), TIFF,
        JPEG[:400], JPEG[:-200], JPEG[:3], PNG[:100], PNG[:20], PNG[:-30], flip_in(PNG, 0.5),
        WEBP[:60], WEBP[:13],
    ],
    ids=lambda data: f"{data[:6]!r}{len(data)}",
)  # fmt: skip
def test_what_cannot_be_decoded_names_the_sample(data):
    for channels in (1, 3):
        with pytest.raises(ValueError, match="^shard: key: cannot decode the image: "):
            decode_image(data, channels, "shard: key")


# ---- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("crop_scale", (0.5, 0.2), "crop_scale: expected low <= high, got 0.5 and 0.2"),
        ("crop_scale", (0.0, 1.0), "crop_scale.0: expected"),
        ("crop_scale", (0.2, 1.5), "crop_scale.1: expected"),
        ("crop_ratio", (2, 1), "crop_ratio: expected low <= high"),
        ("hflip", 1.1, "hflip: expected"),
        ("mean", (0.5, 0.5), "mean: expected 1 or 3 values, one a channel, got 2"),
        ("std", (0.0,), "std.0: expected"),
        ("order", "random", "order: expected one of 'shuffled', 'chunked' or 'sequential'"),
        ("shard", "x", "shard: unknown key; perhaps you meant shards"),
    ],
)
def test_config_faults(key, value, message):
    with pytest.raises(ValueError) as error:
        validate(ImageData, {"shards": "x", key: value})
    assert str(error.value).startswith(message)


# ---- batches --------------------------------------------------------------------------------------


@pytest.fixture
def index(shards):
    save_index(build_index(shards, 1))
    return open_shards(str(shards))


def batches_of(
    index, plan: BatchPlan, count: int, start: int = 0, workers: int = 0, **config
) -> list[ImageBatch]:
    settings = ImageData(shards=str(index.folder), **config)
    stream = train_batches(settings, index, 5, 8, 3, plan, start, workers)
    taken = list(islice(stream, count))
    stream.close()
    return taken


def merged(streams: list[list[ImageBatch]], accumulation: int) -> list[tuple]:
    """Global batches from all ranks' micro-batches: (rows, epochs, positions, pixels)."""
    out = []
    for first in range(0, len(streams[0]), accumulation):
        parts = [stream[micro] for micro in range(first, first + accumulation) for stream in streams]
        out.append(tuple(
            torch.cat([getattr(part, name) for part in parts]).numpy()
            for name in ("index", "epoch", "position", "images")
        ))  # fmt: skip
    return out


def global_batches(index, world: int, micro: int, workers: int, batches: int = 50, **config) -> list[tuple]:
    plans = [BatchPlan(8, micro, rank, world) for rank in range(world)]
    accumulation = plans[0].accumulation
    streams = [batches_of(index, plan, batches * accumulation, workers=workers, **config) for plan in plans]
    return merged(streams, accumulation)


def assert_equal(ours: list[tuple], theirs: list[tuple]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("layout", ["shuffled", "chunked", "sequential"])
def test_batches_against_a_slow_loop(index, layout):
    """The law read out loud: cursor -> epoch, position -> row -> file -> pixels."""
    order = {e: sample_order(5, e, np.arange(40), 40, layout) for e in range(11)}
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "hflip": 0.0}  # 8x8 stays 8x8
    plan = BatchPlan(12, 6, 0, 1)  # 40 samples: micro-batches straddle epochs
    batches = merged([batches_of(index, plan, 70, order=layout, **whole)], 2)
    cursor = 0
    for rows, epochs, positions, pixels in batches:
        for row, epoch, position, image in zip(rows, epochs, positions, pixels):
            assert (epoch, position) == divmod(cursor, 40)
            assert row == order[epoch][position]
            assert np.array_equal(image, picture(int(index.key(row))).transpose(2, 0, 1))
            cursor += 1
    seen = np.concatenate([rows for rows, *_ in batches])
    for epoch in range(10):
        assert sorted(seen[epoch * 40 : epoch * 40 + 40]) == list(range(40))


def test_crops_and_flips_are_keyed_by_epoch_and_position(index):
    """The views of one sample in two epochs, drawn again by hand."""
    config = ImageData(shards="x")
    for batch in batches_of(index, BatchPlan(12, 12, 0, 1), 8):
        n, epoch, position = len(batch.index), batch.epoch.numpy(), batch.position.numpy()
        originals = [picture(int(index.key(row))) for row in batch.index.numpy()]
        side = np.full(n, 8)
        boxes = crop_boxes(5, epoch, position, side, side, config.crop_scale, config.crop_ratio)
        expected = crop_and_resize(originals, boxes, flips(5, epoch, position, config.hflip), 8)
        assert np.array_equal(batch.images.numpy(), expected)


@pytest.mark.parametrize(
    ("world", "micro", "workers"), [(1, 4, 1), (1, 8, 2), (2, 4, 0), (2, 2, 2), (4, 2, 0), (4, 1, 1)]
)
def test_the_first_50_global_batches_are_the_same(index, world, micro, workers):
    """Ids, crops and flips (hence pixels), whatever the number of processes and workers."""
    assert_equal(global_batches(index, world, micro, workers), global_batches(index, 1, 8, 0))


def test_a_key_with_the_rank_is_caught(index, monkeypatch):
    """The planted bug: each rank seeds its own augmentation."""
    right = global_batches(index, 1, 8, 0, batches=3)
    plans = [BatchPlan(8, 4, rank, 2) for rank in range(2)]
    settings = ImageData(shards=str(index.folder))
    streams = [list(islice(train_batches(settings, index, 5 + p.rank, 8, 3, p, 0, 0), 3)) for p in plans]
    with pytest.raises(AssertionError):
        assert_equal(merged(streams, 1), right)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_goes_on_where_it_stopped(index, workers):
    plan = BatchPlan(8, 4, 0, 1)
    through = batches_of(index, plan, 30)
    resumed = batches_of(index, plan, 20, start=5 * 8, workers=workers)
    assert_equal(merged([through[10:]], 2), merged([resumed], 2))


def test_one_shard_and_more_workers_than_samples(tmp_path):
    save_index(build_index(write_shards(tmp_path, [1]), 1))
    index = open_shards(str(tmp_path))
    assert_equal(global_batches(index, 1, 4, 2, batches=4), global_batches(index, 2, 2, 0, batches=4))


def test_batches_do_not_touch_the_global_generators(index):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches_of(index, BatchPlan(8, 4, 0, 1), 3, workers=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


def test_close_leaves_no_workers(index):
    settings = ImageData(shards=str(index.folder))
    stream = train_batches(settings, index, 0, 8, 3, BatchPlan(4, 4, 0, 1), 0, 2)
    next(stream)
    workers = children()
    assert len(workers) == 2
    stream.close()
    assert children() == []
    assert all(not os.path.exists(f"/proc/{pid}") for pid in workers)


@pytest.mark.parametrize("mutant", [False, True])
def test_a_run_that_dies_with_its_loader_open_ends(index, mutant, tmp_path):
    """Workers ignore SIGTERM, which is how Python ends them at exit: without care it would hang."""
    script = tmp_path / "die.py"
    script.write_text(f"""
import atexit
if {mutant}:
    atexit.register = lambda function: function
from selfsup.data.images import ImageData, train_batches
from selfsup.data.index import open_shards
from selfsup.data.order import BatchPlan
config = ImageData(shards={str(index.folder)!r})
stream = train_batches(config, open_shards(config.shards), 0, 8, 3, BatchPlan(4, 4, 0, 1), 0, 1)
next(stream)
print("running", flush=True)
raise RuntimeError("loss is NaN")
""")
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, script], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "running\n"
    try:
        _, errors = process.communicate(timeout=3 if mutant else 30)
        hung = False
        assert process.returncode == 1 and "loss is NaN" in errors
    except subprocess.TimeoutExpired:
        hung = True
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert hung == mutant


def test_workers_ignore_the_loops_signals(index):
    """torchrun signals the whole process group; the loop wants its workers until the step is done."""
    stream = train_batches(ImageData(shards=str(index.folder)), index, 0, 8, 3, BatchPlan(4, 4, 0, 1), 0, 1)
    next(stream)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(children()[0], number)
    for _ in range(10):
        next(stream)
    stream.close()
    assert children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_stops_training_and_is_named(tmp_path, workers):
    members = [(f"{i}.png", encode(picture(i))) for i in range(4)]
    write_tar(tmp_path / "s.tar", [*members, ("cats/7.png", b"\x89PNG\r\n\x1a\n junk")])
    save_index(build_index(tmp_path, 1))
    index = open_shards(str(tmp_path))
    stream = train_batches(ImageData(shards=str(tmp_path)), index, 0, 8, 3, BatchPlan(5, 5, 0, 1), 0, workers)
    with pytest.raises(ValueError) as error:
        next(stream)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 's.tar'}: cats/7: cannot decode the image")
    assert message.endswith(f"selfsup data check {tmp_path}") and "Traceback" not in message
    assert children() == []


def test_an_altered_shard_stops_training(index):
    path = index.folder / "part-002.tar"  # one sample
    data = bytearray(path.read_bytes())
    data[index.offset[27] + 60] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="part-002.tar: 00027: shard altered or damaged"):
        batches_of(index, BatchPlan(40, 40, 0, 1), 1)


def test_one_channel(index):
    settings = ImageData(shards=str(index.folder), mean=(0.5,), std=(0.5,))
    stream = train_batches(settings, index, 0, 16, 1, BatchPlan(4, 4, 0, 1), 0, 0)
    batch = next(stream)
    assert batch.images.shape == (4, 1, 16, 16) and batch.images.dtype == torch.uint8 and batch.targets == 4


# ---- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_has_every_sample_once_in_order(index, workers):
    images_, labels, rows = (torch.cat(part) for part in zip(*eval_batches(index, 8, 3, 7, workers)))
    assert rows.tolist() == list(range(40))
    assert labels.tolist() == [i % 3 for i in range(40)]
    for row in range(40):  # images of that size are left as they are
        assert np.array_equal(images_[row].numpy(), picture(row).transpose(2, 0, 1))
    assert children() == []


def test_eval_resizes_the_short_side_and_crops_the_centre(tmp_path):
    wide = smooth(40, 90)
    high = np.ascontiguousarray(wide.transpose(1, 0, 2))
    write_tar(tmp_path / "s.tar", [("a.png", encode(wide)), ("b.png", encode(high))])
    index = build_index(tmp_path, 1)
    ((ours, labels, _),) = eval_batches(index, 20, 3, 8)
    expected = np.asarray(Image.fromarray(wide).resize((45, 20), Image.Resampling.BICUBIC))[:, 12:32]
    assert labels.tolist() == [-1, -1]
    assert np.abs(ours[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    assert np.abs(ours[1].permute(2, 1, 0).numpy().astype(int) - expected).max() <= 1
