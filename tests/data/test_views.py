"""Views: what is drawn, what it is keyed by, where colours are changed, and how it is configured."""

from itertools import islice, permutations

import numpy as np
import pytest
import torch
from scipy import stats

from data.making import picture
from data.test_colour import one_by_one
from selfsup import start
from selfsup.batch import ImageBatch
from selfsup.checkpoint import TrainState
from selfsup.config import dump_yaml, parse_overrides, read_yaml, validate
from selfsup.data import colour as colour_module
from selfsup.data import images as images_module
from selfsup.data import views as views_module
from selfsup.data.colour import Colours, kernel_size
from selfsup.data.images import ImageData, TrainImages, make_batch, train_batches
from selfsup.data.index import build_index, open_shards, save_index
from selfsup.data.order import BatchPlan
from selfsup.data.sequential import sequential_batches
from selfsup.data.views import PRESETS, View, ViewBatch, augment, crop, draw_colours, view_kinds
from selfsup.look.draw import view_rows
from selfsup.probe.describe import AugmentedViews
from selfsup.recipe import Recipe

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
STRONG = View(solarise=0.3, blur=0.6, hue=0.5)
OFF = {"jitter": 0, "grey": 0, "blur": 0, "solarise": 0}
WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "hflip": 0}


def photographs(n: int, size: int = 16, channels: int = 3) -> list[np.ndarray]:
    return [picture(i, size, size)[..., :channels] for i in range(n)]


def keys(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and positions, none of them in a row."""
    return np.arange(n) % 3, 7 * np.arange(n) + 1000


def batch_of(n: int, on_device: bool, views, size: int = 16, channels: int = 3, seed: int = 4):
    config = ImageData(shards="x", views=views, mean=MEAN[:channels], std=STD[:channels])
    epoch, position = keys(n)
    return make_batch(
        config, seed, epoch, position, position, photographs(n, size, channels), size, on_device
    )


# ---- what is drawn --------------------------------------------------------------------------------

N = 20_000


@pytest.fixture(scope="module")
def drawn() -> tuple[View, Colours]:
    view = View(
        jitter=0.7, brightness=0.4, contrast=1.5, saturation=0.9, hue=0.3, grey=0.25, blur=0.4, solarise=0.1
    )
    return view, draw_colours(view, 0, 0, np.arange(N), 1)


def pvalue(values: torch.Tensor, low: float, high: float) -> float:
    return stats.kstest(values.double().numpy(), "uniform", (low, high - low)).pvalue


RANGES = {
    "brightness": (0.6, 1.4),
    "contrast": (0.0, 2.5),  # never below 0
    "saturation": (0.1, 1.9),
    "hue": (-0.3, 0.3),
    "sigma": (0.1, 2.0),
}


@pytest.mark.parametrize("name", RANGES)
def test_strengths_are_uniform(drawn, name):
    low, high = RANGES[name]
    values = getattr(drawn[1], name)
    assert pvalue(values, low, high) > 1e-3
    assert pvalue(values, low, high + 0.05) < 1e-6  # the planted bug: a range a little off


@pytest.mark.parametrize(
    ("flag", "chance"), [("jittered", 0.7), ("grey", 0.25), ("blurred", 0.4), ("solarised", 0.1)]
)
def test_probabilities(drawn, flag, chance):
    happened = int(getattr(drawn[1], flag).sum())
    assert stats.binomtest(happened, N, chance).pvalue > 1e-3
    assert stats.binomtest(happened, N, chance + 0.03).pvalue < 1e-6


def test_all_orders_are_equally_likely(drawn):
    orders = {order: i for i, order in enumerate(permutations(range(4)))}
    counts = np.bincount([orders[tuple(order)] for order in drawn[1].order.tolist()], minlength=24)
    assert stats.chisquare(counts).pvalue > 1e-3
    swapped = np.bincount([orders[tuple(order)] for order in drawn[1].order[: N // 2].tolist()], minlength=24)
    swapped[0] += N // 2  # the planted bug: half of them as they stand
    assert stats.chisquare(swapped).pvalue < 1e-6


def test_draws_are_independent_of_each_other(drawn):
    columns = [
        field.double().reshape(N, -1)[:, :3] for field in drawn[1]
    ]  # of an order the last place follows
    correlation = torch.corrcoef(torch.cat(columns, dim=1).T)
    between_places = torch.block_diag(torch.ones(3, 3), torch.eye(9)).bool()
    assert correlation[~between_places].abs().max() < 5 / N**0.5


def largest_correlation(numbers: tuple[int, int]) -> torch.Tensor:
    """The largest correlation between what two views draw, and between a view's crop, flip and colours."""
    columns, position, side = [], np.arange(N), np.full(N, 1000)
    for number in numbers:
        boxes = views_module.crop_boxes(0, 0, position, side, side, (0.08, 1.0), (3 / 4, 4 / 3), number)
        colours = draw_colours(STRONG, 0, 0, position, number)
        strengths = [getattr(colours, name) for name in ("brightness", "contrast", "hue", "sigma", "grey")]
        mirrored = views_module.flips(0, 0, position, 0.5, number)
        columns += [*torch.from_numpy(boxes).T, torch.from_numpy(mirrored), *strengths]
    correlation = torch.corrcoef(torch.stack([column.double() for column in columns]))
    one_crop = torch.block_diag(torch.ones(4, 4), torch.eye(6)).bool()  # a large one begins near the corner
    return correlation[~torch.block_diag(one_crop, one_crop).bool()].abs().max()


def test_views_largest_correlation_are_independent():
    assert largest_correlation((0, 1)) < 5 / N**0.5
    assert largest_correlation((1, 1)) > 0.9  # the planted bug: a view's number forgotten


def test_no_draw_moves_another():
    """Used or not, weak or strong: what stays the same in the config stays the same in the sample."""
    position = np.arange(50)
    plain = draw_colours(View(), 3, 0, position, 0)
    other = draw_colours(View(jitter=0.1, hue=0, blur=0, brightness=0.1, solarise=1), 3, 0, position, 0)
    for name in ("order", "contrast", "saturation", "grey", "sigma"):
        assert torch.equal(getattr(plain, name), getattr(other, name))
    assert (other.jittered <= plain.jittered).all() and other.jittered.any()
    assert torch.equal(crop(View(), 3, np.zeros(50, int), position, photographs(50), 8, 0),
                       crop(View(**OFF), 3, np.zeros(50, int), position, photographs(50), 8, 0))  # fmt: skip


def test_draws_belong_to_the_sample_alone():
    epoch, position = keys(30)
    together = draw_colours(STRONG, 5, epoch, position, 2)
    for i in range(30):
        alone = draw_colours(STRONG, 5, int(epoch[i]), position[i : i + 1], 2)
        assert all(torch.equal(one[0], all_[i]) for one, all_ in zip(alone, together))
    for change in ({"seed": 6}, {"epoch": epoch + 1}, {"position": position + 1}, {"number": 1}):
        key = {"seed": 5, "epoch": epoch, "position": position, "number": 2, **change}
        assert (draw_colours(STRONG, **key).hue != together.hue).all()


# ---- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_is_torchvisions_operations_one_image_at_a_time(channels):
    n, (epoch, position) = 60, keys(60)
    found = augment(STRONG, 4, epoch, position, photographs(n, 40, channels), 32, 1)
    crops = crop(STRONG, 4, epoch, position, photographs(n, 40, channels), 32, 1)
    expected = one_by_one(crops.float() / 255, draw_colours(STRONG, 4, epoch, position, 1), kernel_size(32))
    assert found.dtype == torch.uint8
    assert (found - 255 * expected).abs().max() < 0.5 + 1e-2
    assert (found != crops).flatten(1).any(dim=1).float().mean() > 0.8


def test_few_images_at_a_time_are_floats(monkeypatch):
    """A micro-batch of 512 images of 224 px would take 0.9 GB in every worker."""
    (epoch, position), sizes = keys(20), []
    whole = augment(STRONG, 4, epoch, position, photographs(20), 16)
    original = views_module.apply_colours
    monkeypatch.setattr(colour_module, "IN_CACHE", 7 * 3 * 16 * 16)
    monkeypatch.setattr(views_module, "apply_colours", lambda *a: sizes.append(len(a[0])) or original(*a))
    assert torch.equal(augment(STRONG, 4, epoch, position, photographs(20), 16), whole)
    assert sizes == [7, 7, 6]


def test_everything_off_is_the_identity():
    epoch, position = keys(9)
    pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in photographs(9)])
    weak = {"jitter": 1, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    for colours in (OFF, OFF | weak):
        assert torch.equal(augment(View(**WHOLE, **colours), 0, epoch, position, photographs(9), 16), pixels)
    for name, value in {"hflip": 1, "jitter": 1, "grey": 1, "solarise": 1, "crop_scale": (0.5, 0.9)}.items():
        changed = augment(View(**(WHOLE | OFF | {name: value})), 0, epoch, position, photographs(9), 16)
        assert (changed != pixels).any(), name


@pytest.mark.parametrize("on_device", [False, True])
def test_the_same_key_gives_the_same_views_in_any_batch(on_device):
    whole = batch_of(12, on_device, (STRONG, STRONG)).to(CPU, MEAN, STD)
    again = batch_of(12, on_device, (STRONG, STRONG)).to(CPU, MEAN, STD)
    part = batch_of(5, on_device, (STRONG, STRONG)).to(CPU, MEAN, STD)
    other = batch_of(12, on_device, (STRONG, STRONG), seed=5).to(CPU, MEAN, STD)
    for i in range(2):
        assert torch.equal(whole.views[i], again.views[i]) and torch.equal(whole.views[i][:5], part.views[i])
        assert (whole.views[i] != other.views[i]).flatten(1).any(dim=1).all()


def views_differ() -> None:
    first, second = batch_of(40, False, "simclr-32").views
    assert (first != second).flatten(1).any(dim=1).all()
    colours = batch_of(40, True, "simclr-32").colours
    assert len(colours) == 2
    assert (colours[0].brightness != colours[1].brightness).all()


def test_views_of_one_image_differ():
    views_differ()


@pytest.mark.parametrize("name", ["crop_boxes", "draw_colours"])
def test_a_forgotten_view_number_is_caught(name, monkeypatch):
    module = views_module if name == "crop_boxes" else images_module
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: original(*arguments[:-1], 0))
    if name == "crop_boxes":
        monkeypatch.setattr(views_module, "flips", lambda *_: np.zeros(40, bool))
        monkeypatch.setitem(PRESETS, "simclr-32", (View(count=2, **OFF),))
    with pytest.raises(AssertionError):
        views_differ()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("channels", [1, 3])
def test_workers_and_device_give_the_same_views(channels, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    views = (STRONG, View(size=10, count=2, solarise=0.5))
    by_workers, pending = (batch_of(40, on_device, views, 16, channels) for on_device in (False, True))
    assert by_workers.colours == () and len(pending.colours) == 3
    assert [view.dtype for view in by_workers.views + pending.views] == [torch.uint8] * 6
    mean, std = torch.tensor(MEAN[:channels]), torch.tensor(STD[:channels])
    there = pending.to(torch.device(device), MEAN[:channels], STD[:channels])
    assert there.colours == () and there.targets == 40 and there.position.device.type == device
    for exact, rounded in zip(there.views, by_workers.views):
        assert exact.dtype == torch.float32 and exact.shape == rounded.shape
        pixels = exact.cpu() * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
        assert (pixels - rounded / 255).abs().max() < 0.5 / 255 + 1e-6
        assert (pixels - rounded / 255).abs().max() > 0.4 / 255  # not rounded to 8 bits
    for one, other in zip(by_workers.to(CPU, MEAN[:channels], STD[:channels]).views, by_workers.views):
        assert torch.allclose(one * std.view(-1, 1, 1) + mean.view(-1, 1, 1), other / 255, atol=1e-6)


def test_global_and_local_views():
    batch = batch_of(6, False, ({"count": 2}, {"size": 8, "count": 3, "crop_scale": (0.05, 0.25)}))
    assert [tuple(view.shape[1:]) for view in batch.views] == [(3, 16, 16)] * 2 + [(3, 8, 8)] * 3
    pairs = [(a, b) for a in batch.views for b in batch.views if a is not b and a.shape == b.shape]
    assert len(pairs) == 2 + 6 and all((a != b).flatten(1).any(dim=1).all() for a, b in pairs)
    assert batch.images is batch.views[0] and batch.targets == 6


def test_a_local_view_is_cut_from_less(monkeypatch):
    seen = []
    original = views_module.crop_boxes
    monkeypatch.setattr(views_module, "crop_boxes", lambda *a: seen.append(original(*a)) or seen[-1])
    batch_of(50, False, ({"crop_scale": (0.5, 1)}, {"size": 8, "crop_scale": (0.05, 0.25)}), size=64)
    areas = [boxes[:, 2] * boxes[:, 3] / 64**2 for boxes in seen]
    assert areas[0].min() > 0.45 and 0.04 < areas[1].min() and areas[1].max() < 0.28


def test_shown():
    batch = batch_of(5, False, "byol")
    tiles = batch.to(CPU, MEAN, STD).shown(MEAN, STD)
    expected = [view[i] for i in range(5) for view in batch.views]
    assert torch.equal(tiles, torch.stack(expected))
    assert torch.equal(batch.to(CPU, MEAN, STD).shown(MEAN, STD, most=3), torch.stack(expected[:3]))
    mixed = batch_of(5, False, ({}, {"size": 8}))
    assert torch.equal(mixed.to(CPU, MEAN, STD).shown(MEAN, STD), mixed.views[0])
    single = batch_of(5, False, "none")
    assert isinstance(single, ImageBatch)
    assert torch.equal(single.to(CPU, MEAN, STD).shown(MEAN, STD, most=4), single.images[:4])


# ---- through the loaders --------------------------------------------------------------------------


@pytest.fixture
def index(shards):
    save_index(build_index(shards, 1))
    return open_shards(str(shards))


def same(a: ViewBatch, b: ViewBatch) -> bool:
    tensors = [
        [*batch.views, batch.epoch, batch.position, batch.index, *(f for c in batch.colours for f in c)]
        for batch in (a, b)
    ]
    return a.seed == b.seed and all(map(torch.equal, *tensors))


@pytest.mark.parametrize("on_device", [False, True])
def test_workers_do_not_change_the_views(index, on_device):
    config = ImageData(shards=str(index.folder), views=({"count": 2}, {"size": 4}))
    taken = []
    for workers in (0, 2):
        stream = train_batches(config, index, 5, 8, 3, BatchPlan(6, 6, 0, 1), 0, workers, on_device)
        taken.append(list(islice(stream, 8)))  # more than an epoch of 40
        stream.close()
    assert len(taken[0]) == 8 and all(map(same, *taken))
    assert [view.shape[-1] for view in taken[0][0].views] == [8, 8, 4]
    whole = TrainImages(config, index, 5, 8, 3, on_device).batch(np.arange(48))
    for i in range(3):
        assert torch.equal(torch.cat([batch.views[i] for batch in taken[0]]), whole.views[i])
    one, other = (batch.to(CPU, MEAN, STD).views for batch in (taken[0][0], taken[1][0]))
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("on_device", [False, True])
def test_processes_and_a_resume_do_not_change_the_views(index, on_device):
    """Two processes of two micro-batches each against one process; and one that goes on in the middle."""
    config = ImageData(shards=str(index.folder), views="byol")

    def taken(plan: BatchPlan, start: int, count: int, workers: int = 0) -> list[ViewBatch]:
        stream = train_batches(config, index, 5, 8, 3, plan, start, workers, on_device)
        batches = list(islice(stream, count))
        stream.close()
        return [batch.to(CPU, MEAN, STD) for batch in batches]

    whole = taken(BatchPlan(8, 8, 0, 1), 0, 7)  # more than an epoch of 40
    ranks = [taken(BatchPlan(8, 2, rank, 2), 0, 14, workers=rank) for rank in range(2)]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][2 * step + micro] for micro in range(2) for rank in range(2)]
        for i in range(2):
            assert torch.equal(torch.cat([part.views[i] for part in parts]), batch.views[i])
    assert all(map(same, whole[3:], taken(BatchPlan(8, 8, 0, 1), 3 * 8, 4, workers=2)))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_sequential_reader_makes_views_too(shards, workers):
    config = ImageData(shards=str(shards), index="none", views="byol")
    stream = sequential_batches(config, 3, 16, 3, BatchPlan(6, 6, 0, 1), workers, True)
    batch = next(stream)
    stream.close()
    assert isinstance(batch, ViewBatch) and (batch.index == -1).all()
    expected = draw_colours(config.kinds(16)[1], 3, 0, batch.position.numpy(), 1)
    assert all(map(torch.equal, batch.colours[1], expected))
    assert [view.shape for view in batch.to(CPU, MEAN, STD).views] == [(6, 3, 16, 16)] * 2


def simclr(index, **run) -> Recipe:
    return validate(
        Recipe,
        {
            "objective": {"name": "simclr"},
            "encoder": {"img_size": 8, "patch_size": 4},
            "data": {"shards": str(index.folder), "views": "byol"},
            "run": {"dir": "r", "workers": 0, **run},
        },
    )


@pytest.mark.parametrize(
    ("augment", "device", "pending"), [("auto", "cpu", 0), ("workers", "cpu", 0), ("device", "cpu", 2)]
)
def test_the_recipe_says_where_colours_are_changed(index, augment, device, pending):
    recipe = simclr(index, augment=augment, device=device)
    state = TrainState(None, None, None, recipe, 0, 0, {})
    batches = start.open_batches(recipe, index, BatchPlan(4, 4, 0, 1), state)
    assert len(next(batches).colours) == pending
    batches.close()


def test_pictures_and_probes_draw_the_runs_own_views(index):
    """The first kind of view, colours and all."""
    recipe, rows = simclr(index), np.array([3, 30])
    kind, kept = recipe.data.kinds(8)[0], [picture(i) for i in rows]
    zeros, blank = np.zeros(2, int), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    shown = view_rows(recipe, index, rows, blank, 1)
    assert torch.equal(shown[1::2], augment(kind, recipe.seed, zeros, rows, kept, 8))
    viewed = AugmentedViews(recipe.data, index, 8, 3, 2).__getitems__(rows)
    for number in (1, 2):
        expected = augment(kind, 0, zeros, rows, kept, 8, number)
        assert torch.equal(viewed[:, number - 1], expected)
        assert (expected != crop(kind, 0, zeros, rows, kept, 8, number)).any()  # it has colours to change


# ---- configuration --------------------------------------------------------------------------------


SIMCLR = {"jitter": 0.8, "grey": 0.2, "crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3), "hflip": 0.5}


@pytest.mark.parametrize(
    ("name", "strengths", "blurs", "solarises"),
    [
        ("simclr", (0.8, 0.8, 0.8, 0.2), (0.5, 0.5), (0, 0)),
        ("simclr-32", (0.4, 0.4, 0.4, 0.1), (0, 0), (0, 0)),
        ("byol", (0.4, 0.4, 0.2, 0.1), (1, 0.1), (0, 0.2)),
    ],
)
def test_presets_are_the_papers(name, strengths, blurs, solarises):
    kinds = ImageData(shards="x", views=name).kinds(32)
    assert tuple(kind.blur for kind in kinds) == blurs
    assert tuple(kind.solarise for kind in kinds) == solarises
    for kind in kinds:
        assert (kind.brightness, kind.contrast, kind.saturation, kind.hue) == strengths
        assert {key: getattr(kind, key) for key in SIMCLR} == SIMCLR
        assert (kind.size, kind.count, kind.blur_sigma) == (32, 1, (0.1, 2.0))


def test_every_preset_can_be_asked_for():
    for name in PRESETS:
        assert len(view_kinds(validate(ImageData, {"shards": "x", "views": name}).views)) == 2 * (
            name != "none"
        )
    assert ImageData(shards="x").views == "none"


def test_lists_in_yaml_and_names_on_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("shards: x\nviews:\n- {count: 2}\n- {size: 96, count: 6, crop_scale: [0.05, 0.25]}\n")
    config = validate(ImageData, read_yaml(path))
    assert [kind.size for kind in config.kinds(224)] == [224] * 2 + [96] * 6
    path.write_text(dump_yaml(config))
    assert validate(ImageData, read_yaml(path)) == config
    assert parse_overrides(["--data.views", "simclr-32"]) == {"data": {"views": "simclr-32"}}


def test_help_shows_the_presets(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("data: {shards: x, views: [{}, {}]}\nobjective: {name: simclr}\nrun: {dir: r}\n")
    for config, default in ((None, "none"), (path, "'2 kinds of view'")):
        start.print_help(config, "")
        words = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "--data.views {none,simclr,simclr-32,byol}" in words and f"(default: {default})" in words


PRESET_NAMES = "'none', 'simclr', 'simclr-32' or 'byol'"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"views": "simclrr"}, f"views: expected one of {PRESET_NAMES}, got 'simclrr'"),
        ({"views": 3}, f"views: expected one of {PRESET_NAMES}, got 3"),
        (
            {"views": {"hue": 0.1}},
            "views: expected the name of a preset, or a list of kinds of view, which only YAML",
        ),
        ({"views": []}, "views: expected at least one kind of view, got an empty list"),
        ({"views": [{}, 3]}, "views.1: expected a section of keys, got 3"),
        ({"views": [{}, {"hue": 0.6}]}, "views.1.hue: expected 0 <= x <= 0.5, got 0.6"),
        ({"views": [{"hu": 0.1}]}, "views.0.hu: unknown key; perhaps you meant views.0.hue"),
        ({"views": [{"zzz": 0.1}]}, "views.0.zzz: unknown key"),
        ({"views": [{"blur": "x"}]}, "views.0.blur: expected a number, got 'x'"),
        ({"views": [{"count": 0}]}, "views.0.count: expected 1 <= x <= 100, got 0"),
        ({"views": [{"size": 1}]}, "views.0.size: expected 2 <= x, got 1"),
        ({"views": [{"crop_scale": [0.5, 2]}]}, "views.0.crop_scale.1: expected 0 < x <= 1, got 2"),
        ({"views": [{"blur_sigma": [2, 1]}]}, "views.0.blur_sigma: expected low <= high, got 2.0 and 1.0"),
        ({"views": "simclr", "hflip": 0.1}, "hflip: views have their own, so this one would be ignored"),
        ({"views": [{}], "crop_scale": [0.3, 1]}, "crop_scale: views have their own"),
    ],
)
def test_faults(content, message):
    with pytest.raises(ValueError) as fault:
        validate(ImageData, {"shards": "x", **content})
    assert str(fault.value).startswith(message) and len(str(fault.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ("simclr32", f"data.views: expected one of {PRESET_NAMES}, got 'simclr32'"),
        (True, f"data.views: expected one of {PRESET_NAMES}, got True"),
        (
            {"0": {"hue": 0.1}},
            "data.views: expected the name of a preset, or a list of kinds of view, which only YAML",
        ),
        (["simclr", "byol"], "data.views.0: expected a section of keys, got 'simclr'"),
        ([{}, {"hu": 0.1}], "data.views.1.hu: unknown key; perhaps you meant data.views.1.hue"),
        ([{}, {"strength": 0.5}], "data.views.1.strength: unknown key"),
        ([{}, {"<hue": 0.1}], "data.views.1.<hue: unknown key; perhaps you meant data.views.1.hue"),
        ([{}, {"blur_sigma": [1]}], "data.views.1.blur_sigma.1: expected a value, got"),
        (
            [{}, {"blur_sigma": [1, 2, 3]}],
            "data.views.1.blur_sigma: expected at most 2 values, got [1, 2, 3]",
        ),
        ([{}, {"hue": "x"}], "data.views.1.hue: expected a number, got 'x'"),
        ([{}, {"crop_scale": [0.5, 2]}], "data.views.1.crop_scale.1: expected 0 < x <= 1, got 2"),
        (
            [{}, {"size": 4}],
            "data.views: expected 2 views of 8 px, which simclr compares, got 2 of [4, 8] px",
        ),
        (
            [{"count": 2}, {"size": 4, "count": 6}],
            "data.views: expected 2 views of 8 px, which simclr compares, got 8",
        ),
    ],
)
def test_faults_of_a_recipe(views, message):
    """The same with whole keys; the objective has a word too."""
    content = {
        "objective": {"name": "simclr"},
        "encoder": {"img_size": 8, "patch_size": 4},
        "run": {"dir": "r"},
    }
    with pytest.raises(ValueError) as fault:
        validate(Recipe, {**content, "data": {"shards": "x", "views": views}})
    lines = str(fault.value).splitlines()
    assert lines[0].startswith(message) and len(lines) == (2 if views == ["simclr", "byol"] else 1)
    assert max(map(len, lines)) < 200 and ("perhaps" in lines[0]) == ("perhaps" in message)


@pytest.mark.parametrize(
    ("key", "near"),
    [("blur", "views.0.blur"), ("solarize", "views.0.solarise"), ("size", "views.0.size"), ("view", "views")],
)
def test_a_key_of_a_view_beside_the_views(key, near):
    with pytest.raises(ValueError, match=rf"^data\.{key}: unknown key; perhaps you meant data\.{near}$"):
        validate(Recipe, {"data": {"shards": "x", key: 1}, "run": {"dir": "r"}})


def test_a_view_and_a_preset_on_the_command_line():
    """In either order: none of the two is dropped in silence."""
    for words in ("--data.views simclr --data.views.0.hue 0", "--data.views.0.hue 0 --data.views simclr"):
        with pytest.raises(ValueError, match="views was given a value and a key below it"):
            parse_overrides(words.split())
