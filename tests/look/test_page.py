"""The page on a folder of shards: what it says is so, and it does no harm."""

import base64
import io
import json
import os
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data.making import encode, picture, write_tar
from look.conftest import CONTENT, HOSTILE_CLASS, HOSTILE_KEY, SAMPLES, size_of
from selfsup import cli
from selfsup.config import merge, validate
from selfsup.data.images import TrainImages
from selfsup.data.index import build_index, open_shards, save_index
from selfsup.data.reader import ShardReader
from selfsup.look import page
from selfsup.look.measure import Tally, channel_statistics, keyed_rows, look_at, moments
from selfsup.look.page import build_page, main_show
from selfsup.recipe import Recipe

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Tags with attributes, the text, and whether every tag is closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def pictures(self, alt: str) -> list[np.ndarray]:
        sources = [a["src"] for tag, a in self.tags if tag == "img" and a["alt"] == alt]
        blobs = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
        return [np.asarray(Image.open(io.BytesIO(blob))) for blob in blobs]


def harmful(reader: Reader) -> list[str]:
    """Scripts, handlers, and anything loaded from elsewhere."""
    found = []
    for tag, attributes in reader.tags:
        if tag in ("script", "iframe", "link", "object", "embed", "base", "form"):
            found.append(tag)
        for name, value in attributes.items():
            if name.startswith("on") or (
                name in ("src", "href") and not value.startswith("data:image/png;base64,")
            ):
                found.append(f"{tag} {name}={value}")
    return found


def recipe_on(shards: Path, **changes) -> Recipe:
    return validate(Recipe, merge(merge(CONTENT, {"data": {"shards": str(shards)}}), changes))


def test_page_is_whole_and_harmless(shards):
    text, _ = build_page(open_shards(str(shards)), recipe_on(shards), SAMPLES, SAMPLES, 0)
    reader = Reader(text)
    assert harmful(reader) == [] and "@import" not in text and "url(" not in text
    policies = [a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and "default-src 'none'" in policies[0] and "script-src" not in policies[0]
    assert HOSTILE_KEY in reader.text  # as text, every character of it
    assert reader.text.count(HOSTILE_CLASS) == 1 + sum(i % 3 == 1 for i in range(SAMPLES - 1))


def test_an_unescaped_name_is_caught(shards, monkeypatch):
    monkeypatch.setattr(page, "escape", lambda text: text)
    text, _ = build_page(open_shards(str(shards)), None, SAMPLES, SAMPLES, 0)
    with pytest.raises(AssertionError):
        assert harmful(Reader(text)) == []


def test_statistics_are_those_of_the_raw_arrays(shards):
    _, measured = build_page(open_shards(str(shards)), None, 3, SAMPLES, 0)
    raw = [picture(i, *size_of(i)).astype(np.float64) / 255 for i in range(SAMPLES)]
    means = [image.mean(axis=(0, 1)) for image in raw]
    mean = np.mean(means, axis=0)
    variance = np.mean([((image - mean) ** 2).mean(axis=(0, 1)) for image in raw], axis=0)
    np.testing.assert_allclose(measured.channels[3].mean, mean, rtol=1e-12)
    np.testing.assert_allclose(measured.channels[3].std, np.sqrt(variance), rtol=1e-12)
    grey = [
        np.asarray(Image.fromarray(picture(i, *size_of(i))).convert("L"), float) / 255 for i in range(SAMPLES)
    ]
    mean = np.mean([image.mean() for image in grey])
    np.testing.assert_allclose(measured.channels[1].mean[0], mean, rtol=1e-12)
    variance = np.mean([((image - mean) ** 2).mean() for image in grey])
    np.testing.assert_allclose(measured.channels[1].std[0] ** 2, variance, rtol=1e-12)
    heights, widths = zip(*(size_of(i) for i in range(SAMPLES)))
    assert measured.heights == (min(heights), np.median(heights), max(heights))
    assert measured.widths == (min(widths), np.median(widths), max(widths))
    assert (measured.images, measured.undecodable) == (SAMPLES, 0)
    assert (measured.kinds, measured.modes) == ({"PNG": SAMPLES}, {"RGB": SAMPLES})


def test_images_of_one_size_have_the_statistics_of_all_their_pixels():
    stack = np.stack([picture(i) for i in range(6)]) / 255
    found = channel_statistics(np.stack([moments(picture(i)) for i in range(6)]))
    np.testing.assert_allclose(found.mean, stack.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, stack.std(axis=(0, 1, 2)), rtol=1e-12)


def test_counts_of_the_index(shards):
    index = open_shards(str(shards))
    text, _ = build_page(index, None, 3, 3, 0)
    words = Reader(text).text
    said = dict(reversed(list(zip(words, words[1:]))))  # what follows a word first
    assert said["samples"] == str(SAMPLES) and said["shards"] == "2"
    assert said["fingerprint"] == index.fingerprint
    on_disk = sum((shards / name).stat().st_size for name in ("a.tar", "b.tar"))
    encoded = sum(len(encode(picture(i, *size_of(i)))) for i in range(SAMPLES))
    assert said["bytes"] == f"{on_disk:,} in shards, of these {encoded:,} encoded images"
    assert (said["cat"], said["a tab\there"], said["none such"]) == ("8", "7", "0")
    assert "4 classes; 1 samples without a label." in words


@pytest.mark.parametrize("order", ["shuffled", "chunked", "sequential"])
@pytest.mark.parametrize("in_chans", [3, 1])
def test_views_are_those_of_training(shards, order, in_chans):
    values = {3: {}, 1: {"mean": [0.4], "std": [0.2]}}[in_chans]
    recipe = recipe_on(shards, data={"order": order, **values}, encoder={"in_chans": in_chans}, seed=5)
    index = open_shards(str(shards))
    text, measured = build_page(index, recipe, 9, SAMPLES, 3)
    reader = Reader(text)
    positions = [int(word.removeprefix("position ")) for word in reader.text if word.startswith("position ")]
    assert len(set(positions)) == 9
    data = TrainImages(recipe.data, index, 5, 16, in_chans)
    batch = data.batch(np.arange(SAMPLES, dtype=np.int64))  # the whole epoch, in another batch
    for position, view in zip(positions, reader.pictures("the training view"), strict=True):
        np.testing.assert_array_equal(view.reshape(16, 16, -1), batch.images[position].permute(1, 2, 0))
    keys = [index.key(int(batch.index[position])) for position in positions]
    assert [word for word in reader.text if word in keys] == keys
    assert f"with encoder.in_chans: {in_chans}" in text and f"in_chans: {4 - in_chans}" not in text


def test_a_damaged_image_is_counted_and_shown(tmp_path):
    good, bad = encode(picture(0)), encode(picture(1))[:60]
    members = [("good.png", good), ("bad.png", bad), ("text.png", b"<b>no image</b>")]
    write_tar(tmp_path / "a.tar", members)
    save_index(build_index(tmp_path, 1))
    text, measured = build_page(open_shards(str(tmp_path)), recipe_on(tmp_path), 3, 3, 0)
    assert (measured.images, measured.undecodable) == (1, 2)
    reader = Reader(text)
    assert len(reader.pictures("the stored image")) == len(reader.pictures("the training view")) == 1
    assert sum("cannot decode the image" in word for word in reader.text) == 2
    np.testing.assert_array_equal(reader.pictures("the stored image")[0], picture(0))


def test_nothing_that_can_be_decoded(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("x.png", b"text")])
    save_index(build_index(tmp_path, 1))
    main_show(str(tmp_path), out=tmp_path / "page.html")
    assert "not one of the images read can be decoded" in capsys.readouterr().out
    assert "Not one of 1 images read" in (tmp_path / "page.html").read_text()


def test_an_altered_shard_of_the_same_size(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.png", encode(picture(0))), ("y.png", encode(picture(1)))])
    index = build_index(tmp_path, 1)
    with (tmp_path / "a.tar").open("r+b") as file:
        file.seek(int(index.offset[1]) + 50)
        file.write(b"\0\1\2")
    seen = look_at(index, ShardReader(index), 1)
    assert seen.rgb is None and "shard altered or damaged" in seen.fault
    tally = Tally()
    tally.add(seen)
    assert tally.result() is None


def test_samples_are_keyed():
    few, many = keyed_rows(1000, 10, 3), keyed_rows(1000, 200, 3)
    np.testing.assert_array_equal(few, many[:10])
    assert len(set(many.tolist())) == 200 and many.max() > 900 and many.min() < 100
    assert few.tolist() != keyed_rows(1000, 10, 4).tolist()
    assert sorted(keyed_rows(7, 100, 0).tolist()) == list(range(7))


def run(monkeypatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["selfsup", *map(str, arguments)])
    return cli.main()


def test_command(shards, tmp_path, monkeypatch, capsys):
    config, out = tmp_path / "config.yaml", tmp_path / "new" / "page.html"
    config.write_text(yaml.safe_dump({k: v for k, v in CONTENT.items() if k != "run"}))
    assert run(monkeypatch, "data", "show", shards, "--config", config, "--out", out, "--samples", 4) == 0
    said = capsys.readouterr().out
    assert f"{out}: {SAMPLES} samples" in said
    pasted = yaml.safe_load(said.split("\n", 1)[1])["data"]
    recipe_on(shards, data=pasted)  # what it says to paste is a valid section
    assert len(Reader(out.read_text()).pictures("the training view")) == 4
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]


def test_faults_are_one_line_and_leave_the_old_page(shards, tmp_path, monkeypatch, capsys):
    out = tmp_path / "page.html"
    assert run(monkeypatch, "data", "show", shards, "--out", out, "--samples", 1) == 0
    old = out.read_text()

    def fault(*arguments: str | Path) -> str:
        assert run(monkeypatch, "data", "show", shards, *arguments) == 2
        assert out.read_text() == old and {p.name for p in tmp_path.iterdir()} <= {"page.html", "c.yaml"}
        return capsys.readouterr().err

    assert "expected a file ending in .html, got .png" in fault("--out", tmp_path / "page.png")
    assert "--samples: expected at least 1, got 0" in fault("--out", out, "--samples", 0)
    assert "cannot write it" in fault("--out", out / "page.html")
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(merge(CONTENT, {"data": {"index": "none"}})))
    assert "data.index: none streams the shards" in fault("--out", out, "--config", config)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(monkeypatch, "data", "show", shards, "--out", out) == 2
    assert "No space left on device" in capsys.readouterr().err and out.read_text() == old
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_file_of_someone_else_is_not_replaced(shards, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("<!doctype html><p>mine")
    with pytest.raises(ValueError, match="exists and is not an earlier page"):
        main_show(str(shards), out=out, samples=1)
    assert out.read_text() == "<!doctype html><p>mine"
    out.unlink()
    for samples in (1, 2):  # an earlier page is replaced
        main_show(str(shards), out=out, samples=samples)
        assert f"<p>{samples} at random" in out.read_text()


def test_large_images_are_shown_small_and_small_ones_as_they_are():
    large = picture(0, 400, 200)
    assert page.thumbnail(large).shape == (page.THUMBNAIL, page.THUMBNAIL // 2, 3)
    np.testing.assert_array_equal(page.thumbnail(large[:160, :160]), large[:160, :160])
