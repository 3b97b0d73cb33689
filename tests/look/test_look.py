"""`selfsup look`: neighbours against a slow search, views against training's, TensorBoard files read back."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from look.conftest import CONTENT, HOSTILE_CLASS, SAMPLES
from running import save_untrained
from selfsup import cli
from selfsup.batch import normalise
from selfsup.checkpoint import load_encoder
from selfsup.data.images import TrainImages, eval_batches
from selfsup.data.index import open_shards
from selfsup.look import draw
from selfsup.look.command import load_run, main_look
from selfsup.look.draw import view_rows
from selfsup.look.measure import keyed_rows
from selfsup.look.neighbours import cosine, nearest
from selfsup.look.pictures import GAP, attention_picture, captioned, grid, save_png


def slow_neighbours(queries: np.ndarray, bank: np.ndarray, k: int, itself: list[int]) -> list[list[int]]:
    """One pair at a time, in float64."""
    found = []
    for query, own in zip(queries.astype(np.float64), itself):
        pairs = []
        for j, row in enumerate(bank.astype(np.float64)):
            lengths = (sum(query * query) * sum(row * row)) ** 0.5
            if j != own:
                pairs.append((-sum(query * row) / lengths if lengths else 0.0, j))
        found.append([j for _, j in sorted(pairs)[:k]])
    return found


def test_neighbours_are_those_of_a_slow_search():
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(40, 5)).astype(np.float32) * rng.uniform(0.1, 9, (40, 1)).astype(np.float32)
    bank[7] = 0
    queries, itself = bank[:9], np.array([0, 1, 2, 3, 4, 5, 6, 7, -1])
    near = nearest(cosine(queries, bank), 6, itself)
    assert near.tolist() == slow_neighbours(queries, bank, 6, itself.tolist())
    unscaled = queries.astype(np.float64) @ bank.T.astype(np.float64)  # a dot product is not a cosine
    assert nearest(unscaled, 6, itself).tolist() != near.tolist()


def test_equal_neighbours_come_in_order_and_the_query_does_not_count():
    bank = np.tile(np.eye(2), (4, 1))  # every other row is the same
    near = nearest(cosine(bank[:2], bank), 3, np.array([0, 1]))
    assert near.tolist() == [[2, 4, 6], [3, 5, 7]]
    with pytest.raises(ValueError, match="neighbours: expected at most 7"):
        nearest(cosine(bank[:2], bank), 8, np.array([0, 1]))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(channels):
    images = torch.randint(0, 256, (5, channels, 3, 4), dtype=torch.uint8)
    picture = grid(images, 2)
    assert picture.shape == (3, 3 * 3 + 2 * GAP, 2 * 4 + GAP) and picture.dtype == torch.float32
    expected = torch.ones_like(picture)
    for i in range(5):
        for colour in range(3):
            for y in range(3):
                for x in range(4):
                    value = images[i, colour % channels, y, x] / 255
                    expected[colour, i // 2 * (3 + GAP) + y, i % 2 * (4 + GAP) + x] = value
    torch.testing.assert_close(picture, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape,columns", [((0, 3, 2, 2), 1), ((1, 2, 2, 2), 1), ((1, 3, 2, 2), 0)])
def test_grid_refuses(shape, columns):
    with pytest.raises(ValueError, match="grid: expected images"):
        grid(torch.zeros(shape, dtype=torch.uint8), columns)


def test_captions_stand_below_and_are_one_line():
    images = torch.full((2, 1, 40, 50), 7, dtype=torch.uint8)
    tiles = captioned(images, ["", "a\nb <x>" * 30])
    assert tiles.shape == (2, 3, 52, 50) and bool((tiles[:, :, :40] == 7).all())
    assert bool((tiles[0, :, 40:] == 255).all()) and bool((tiles[1, :, 40:] < 128).any())


def test_attention_picture_scales_each_map(tmp_path):
    maps = torch.rand(2, 3, 4, 4) * torch.tensor([1e-4, 1.0]).view(2, 1, 1, 1)
    image = torch.full((1, 16, 16), 100, dtype=torch.uint8)
    picture = attention_picture(image, maps, tile=8)
    tile = 8 + GAP
    assert picture.shape == (3, 2 * tile - GAP, 4 * tile - GAP)
    assert bool((picture[:, :8, :8] == 100 / 255).all())
    for layer in range(2):
        for head in range(3):
            shown = picture[
                0, layer * tile : layer * tile + 8 : 2, (1 + head) * tile : (2 + head) * tile - GAP : 2
            ]
            expected = maps[layer, head] / maps[layer, head].max()
            torch.testing.assert_close(shown, expected, atol=0.5 / 255 + 1e-6, rtol=0)
    save_png(tmp_path / "a.png", picture)
    read = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1) / 255
    torch.testing.assert_close(read, picture, atol=1e-6, rtol=0)


def test_views_are_drawn_as_training_draws_them(make_run, shards):
    """With the sequential order position and row are one, so the views are training's own."""
    loaded = load_run(make_run({"data": {"order": "sequential"}, "seed": 3}))
    index = open_shards(str(shards))
    rows = np.array([4, 0, 21])
    images = torch.cat(list(draw.read_images(index, rows, loaded.recipe)))
    shown = view_rows(loaded.recipe, index, rows, images, 5).unflatten(0, (3, 6))
    torch.testing.assert_close(shown[:, 0], images, rtol=0, atol=0)
    data = TrainImages(loaded.recipe.data, index, 3, 16, 3)
    for i, row in enumerate(rows):
        seen = data.batch(np.arange(5) * SAMPLES + row)  # the sample in epochs 0 to 4
        torch.testing.assert_close(shown[i, 1:], seen.images, rtol=0, atol=0)


def look(run, *arguments) -> None:
    """The command with few samples."""
    sys.argv = [
        "selfsup",
        "look",
        str(run),
        "--samples",
        "3",
        "--views",
        "2",
        "--neighbours",
        "4",
        *arguments,
    ]
    assert cli.main() == 0


@pytest.fixture(autouse=True)
def _argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_command(make_run, shards, tmp_path, capsys):
    run = make_run()
    look(run)
    said = capsys.readouterr().out
    assert "looking at training images" in said and f"all {SAMPLES} images are used" in said
    folder = run / "look" / "step-00000007"
    pictures = {"attention-00", "attention-01", "attention-02", "reconstruction-00", "views", "neighbours"}
    assert {path.stem for path in folder.glob("*.png")} == pictures
    assert list((run / "look").iterdir()) == [folder]

    index, rows = open_shards(str(shards)), keyed_rows(SAMPLES, 2000, 0)
    encoder, recipe, *_ = load_encoder(run)
    images = torch.cat([images for images, _, _ in eval_batches(index, 16, 3, 5)])[rows]
    with torch.no_grad():
        features = encoder(normalise(images, recipe.data.mean, recipe.data.std)).numpy()

    about = json.loads((folder / "look.json").read_text())
    assert about["step"] == 7 and about["fingerprint"] == index.fingerprint
    keys = [index.key(row) for row in rows]
    assert [image["key"] for image in about["images"]] == keys[:3]
    for name, bank in (("by_embedding", features), ("by_pixels", images.flatten(1).numpy())):
        expected = slow_neighbours(bank[:3], bank, 4, [0, 1, 2])
        assert [[near["key"] for near in image[name]] for image in about["images"]] == [
            [keys[j] for j in row] for row in expected
        ]

    whole = torch.from_numpy(np.array(Image.open(folder / "neighbours.png"))).permute(2, 0, 1)
    by_key, tall, wide = dict(zip(keys, images)), 48 + 12 + GAP, 48 + GAP  # enlarged three times, a caption
    for i, image in enumerate(about["images"]):
        key_rows = [image["key"], *(n["key"] for n in image["by_embedding"]), None]
        for j, key in enumerate([*key_rows, *(n["key"] for n in image["by_pixels"])]):
            tile = whole[:, i * tall : i * tall + 48 : 3, j * wide : j * wide + 48 : 3]
            assert bool((tile == (255 if key is None else by_key[key])).all()), (i, j)

    projected = folder / "00007" / "features"
    read = np.loadtxt(projected / "tensors.tsv", delimiter="\t")
    np.testing.assert_allclose(read, features, atol=1e-5)
    lines = (projected / "metadata.tsv").read_text().splitlines()
    names = ["cat", HOSTILE_CLASS, "a tab here"]
    labels = [names[i] if i >= 0 else "no label" for i in index.label[rows]]
    assert lines == ["key\tlabel", *(f"{key}\t{label}" for key, label in zip(keys, labels))]
    sprite = np.asarray(Image.open(projected / "sprite.png"))
    assert sprite.shape == (5 * 16, 5 * 16, 3)  # 23 thumbnails in five rows
    for i in range(SAMPLES):
        y, x = 16 * (i // 5), 16 * (i % 5)
        thumbnail = sprite[y : y + 16, x : x + 16].transpose(2, 0, 1).astype(int)
        assert np.abs(thumbnail - images[i].numpy()).max() <= 1
    assert "00007/features/tensors.tsv" in (folder / "projector_config.pbtxt").read_text()

    board = EventAccumulator(str(folder))
    board.Reload()
    tags = board.Tags()["images"]
    assert {f"attention/{key}" for key in keys[:3]} < set(tags) and "training views" in tags
    assert len(tags) == len(pictures) and any(tag.startswith("reconstruction: input") for tag in tags)
    assert board.Images(tags[0])[0].step == 7


def test_again_elsewhere_and_over_something_else(make_run, tmp_path, capsys):
    run = make_run()
    out = tmp_path / "out"
    look(run, "--out", str(out))
    first = json.loads((out / "look.json").read_text())
    (out / "stale.png").write_text("")
    look(run, "--out", str(out), "--seed", "1")
    assert json.loads((out / "look.json").read_text())["images"] != first["images"]
    assert not (out / "stale.png").exists() and len(list(out.glob("events*"))) == 1
    assert not (run / "look").exists()
    with pytest.raises(ValueError, match="exists and is not an earlier look"):
        main_look(run, out=run / "checkpoints")
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_averaged_weights_have_a_folder_of_their_own(make_run, capsys):
    run = make_run({"optim": {"ema": 0.9}})
    for weights in ("trained", "ema"):
        main_look(run, samples=1, views=1, neighbours=1, points=4, weights=weights)
    folders = [run / "look" / name for name in ("step-00000007", "step-00000007-ema")]
    found = [json.loads((folder / "look.json").read_text()) for folder in folders]
    assert [about["weights"] for about in found] == ["trained", "ema"]
    similar = [about["images"][0]["by_embedding"][0]["similarity"] for about in found]
    assert similar[0] != similar[1] and len(list((run / "look").iterdir())) == 2
    loaded = load_run(run, "ema").objective.encoder.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in load_encoder(run, "ema")[0].state_dict().items())


def test_more_than_eight_have_all_their_reconstructions(make_run, tmp_path):
    sys.argv = ["selfsup", "look", str(make_run()), "--samples", "19", "--out", str(tmp_path / "out")]
    assert cli.main() == 0
    sizes = [Image.open(tmp_path / "out" / f"reconstruction-{i:02d}.png").size for i in range(3)]
    assert sizes == [(8 * 16, 4 * 16), (8 * 16, 4 * 16), (3 * 16, 4 * 16)]


def test_a_failure_leaves_the_earlier_look(make_run, tmp_path, monkeypatch):
    run, out = make_run(), tmp_path / "out"
    look(run, "--out", str(out))
    before = sorted(path.name for path in out.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(draw, "neighbour_picture", full)
    with pytest.raises(ValueError, match=r"--out .*No space left on device"):
        main_look(run, out=out)
    assert sorted(path.name for path in out.iterdir()) == before
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"samples": 0}, "--samples: expected at least 1"),
        ({"points": 5001}, "--points: .* at most 5000"),
        ({"points": 8}, "--points: expected --samples 8 and more than --neighbours 8"),
        ({"neighbours": 23}, "neighbours: expected at most 22"),
    ],
)
def test_counts_that_cannot_be(make_run, wrong, message):
    run = make_run()
    with pytest.raises(ValueError, match=message):
        main_look(run, **wrong)
    assert not list((run / "look").glob("*"))


def test_a_checkpoint_outside_a_run_needs_a_place(make_run, tmp_path):
    elsewhere = tmp_path / "copied"
    (make_run() / "checkpoints" / "step-00000007").rename(elsewhere)
    with pytest.raises(ValueError, match="say where to write with --out DIR"):
        main_look(elsewhere)


def test_an_encoder_without_our_attention_has_the_other_pictures(tmp_path, shards, capsys):
    objective = {"name": "simclr", "hidden_dim": 8, "out_dim": 4}
    encoder = {"name": "timm", "model": "test_resnet", "img_size": 32}
    content = {**CONTENT, "objective": objective, "encoder": encoder}
    content["data"] = {**CONTENT["data"], "shards": str(shards), "views": "simclr-32"}
    run = save_untrained(tmp_path / "run", content, 0.1, {}, 7)
    main_look(run, samples=2, views=2, neighbours=2, points=8)
    out = capsys.readouterr().out
    assert "no attention maps: expected a vit encoder of selfsup, got TimmEncoder: other models keep" in out
    names = {path.name for path in (run / "look" / "step-00000007").glob("*.png")}
    assert names == {"neighbours.png", "views.png"}
