"""The online monitor: what it says of collapsed and of good encoders, and that training cannot tell it is there."""

import numpy as np
import pytest
import torch
from torch import nn

from selfsup.batch import ImageBatch, normalise
from selfsup.config import validate
from selfsup.data.images import EvalImages
from selfsup.data.index import open_shards
from selfsup.data.pack import pack_arrays
from selfsup.export.load import load_frozen
from selfsup.probe import online
from selfsup.probe.features import Features
from selfsup.probe.knn import knn_accuracy
from selfsup.probe.online import OnlineMonitor, open_monitor
from selfsup.probe.representation import feature_std, rankme
from selfsup.recipe import Recipe

CPU = torch.device("cpu")


def recipe_of(shards, mixed="fp32", **encoder) -> Recipe:
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return validate(
        Recipe,
        {
            "objective": {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2},
            "encoder": {**sizes, **encoder},
            "data": {"shards": str(shards), "mean": [0.3], "std": [0.4]},
            "precision": {"mixed": mixed},
            "run": {"dir": "r"},
        },
    )


@pytest.fixture
def monitor(digits) -> OnlineMonitor:
    return OnlineMonitor(recipe_of(digits / "train"), open_shards(str(digits / "train")), CPU)


class Function(nn.Module):
    """Images (b, 1, 8, 8) -> features (b, d), by a plain function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


# ---- what it says ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_encoder_is_collapsed(monitor, value):
    values = monitor.measure(Function(lambda images: torch.full((len(images), 16), value)))
    assert values["feature_std"] == pytest.approx(0, abs=1e-9)
    assert values["rankme"] == pytest.approx(1, abs=1e-3)
    shares = np.bincount(monitor._labels[monitor.bank :]) / (len(monitor.rows) - monitor.bank)
    assert np.isclose(values["knn"], shares).any() and values["knn"] < 0.2  # one class for all


def test_pixels_of_digits_are_separable(monitor):
    values = monitor.measure(nn.Flatten())
    assert values["knn"] > 0.9 and values["feature_std"] > 0.4 and values["rankme"] > 5


def test_one_direction_is_collapsed(monitor):
    direction = torch.linspace(1, 2, 16)
    values = monitor.measure(Function(lambda images: images.abs().sum((1, 2, 3))[:, None] * direction))
    assert values["rankme"] == pytest.approx(1, abs=1e-3)


def test_numbers_are_those_of_the_probes_on_the_same_rows(monitor, make_run, digits):
    index, encoder = open_shards(str(digits / "train")), load_frozen(str(make_run())).module
    images, labels, _ = EvalImages(index, 8, 1).__getitems__(monitor.rows)
    with torch.no_grad():
        features = encoder(normalise(images, (0.3,), (0.4,)))
    bank, queries = (
        Features(features[part].numpy(), labels[part].numpy()) for part in (slice(267), slice(267, 400))
    )
    expected = {"feature_std": feature_std(features), "rankme": rankme(features)}
    values = monitor.measure(encoder)
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert values["knn"] == pytest.approx(knn_accuracy(bank, queries), abs=2 / 133)


def test_the_runs_number_format(digits, make_run):
    encoder, index = load_frozen(str(make_run())).module, open_shards(str(digits / "train"))
    values = [
        OnlineMonitor(recipe_of(digits / "train", m), index, CPU).measure(encoder) for m in ("fp32", "bf16")
    ]
    assert values[0]["rankme"] != values[1]["rankme"] == pytest.approx(values[0]["rankme"], rel=0.05)


def test_features_that_are_not_numbers_do_not_end_the_run(monitor):
    def broken(images):
        features = images.flatten(1).clone()
        features[:1] = float("nan")
        return features

    monitor.measure(nn.Flatten())
    assert monitor.similarities
    values = monitor.measure(Function(broken))
    assert set(values) == {"feature_nonfinite", "monitor_share"}
    assert not monitor.similarities  # not those of the last measurement
    assert values["feature_nonfinite"] == 4  # the first of each batch of at most 128


# ---- which images ---------------------------------------------------------------------------------


def test_no_query_is_in_the_bank_and_rows_are_the_same_for_every_seed(digits):
    index = open_shards(str(digits / "train"))
    first = OnlineMonitor(recipe_of(digits / "train"), index, CPU)
    assert len(set(first.rows)) == len(first.rows) == 400 and first.bank == 267
    other = recipe_of(digits / "train").model_copy(update={"seed": 5})
    assert np.array_equal(OnlineMonitor(other, index, CPU).rows, first.rows)


def knn_of_noise(digits) -> float:
    """Of features that tell images apart, but no two alike: above chance only where a query meets itself."""
    weights = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    encoder = Function(lambda images: torch.sin(1e3 * images.flatten(1) @ weights))
    monitor = OnlineMonitor(recipe_of(digits / "train"), open_shards(str(digits / "train")), CPU)
    return monitor.measure(encoder)["knn"]


def test_queries_in_the_bank_would_be_seen(digits, monkeypatch):
    assert knn_of_noise(digits) < 0.25
    original_rows = online.fixed_rows
    monkeypatch.setattr(
        online, "fixed_rows", lambda n, count: original_rows(n, count) % 200
    )  # the planted leak
    assert knn_of_noise(digits) > 0.6


def test_sizes_are_bounded(digits, monkeypatch):
    index = open_shards(str(digits / "train"))
    monkeypatch.setattr(online, "MOST_BYTES", 90 * 64)
    small = OnlineMonitor(recipe_of(digits / "train"), index, CPU)
    assert (len(small.rows), small.bank) == (90, 60) and small._images.numel() == 90 * 64
    assert "90 training images" in small.describe and "knn of 30 among the other 60" in small.describe
    monkeypatch.setattr(online, "MOST_BYTES", 2**28)
    monkeypatch.setattr(online, "BANK", 100)
    monkeypatch.setattr(online, "QUERIES", 50)
    assert OnlineMonitor(recipe_of(digits / "train"), index, CPU).bank == 100


def images_of(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8), dtype=np.uint8)


def packed(tmp_path, labels, classes):
    pack_arrays(images_of(len(labels)), np.array(labels, np.int64), classes, tmp_path / "shards", 50)
    return open_shards(str(tmp_path / "shards"))


def unlabelled(index, keep: int):
    index.label[keep:] = -1
    return index


def test_without_labels_there_is_no_knn(tmp_path):
    index = unlabelled(packed(tmp_path, [i % 2 for i in range(80)], ["a", "b"]), 29)
    monitor = OnlineMonitor(recipe_of(index.folder), index, CPU)
    assert set(monitor.measure(nn.Flatten())) == {
        "feature_std",
        "rankme",
        "alignment",
        "uniformity",
        "collapsed",
        "monitor_share",
    }
    assert len(monitor.rows) == 80 and "no knn: it wants 30 labelled" in monitor.describe


def test_labelled_images_are_preferred(tmp_path):
    index = unlabelled(packed(tmp_path, [i % 2 for i in range(80)], ["a", "b"]), 40)
    monitor = OnlineMonitor(recipe_of(index.folder), index, CPU)
    assert sorted(monitor.rows) == list(range(40)) and "knn" in monitor.measure(nn.Flatten())


def test_one_class_has_no_knn(tmp_path):
    index = packed(tmp_path, [0] * 40, ["a"])
    assert "knn" not in OnlineMonitor(recipe_of(index.folder), index, CPU).measure(nn.Flatten())


def test_off_and_why(tmp_path, capsys, digits):
    recipe = recipe_of(digits / "train")
    assert open_monitor(recipe, None, CPU) is None
    assert "off" in (said := capsys.readouterr().out) and "data.index is none" in said
    assert open_monitor(recipe, packed(tmp_path, [0], ["a"]), CPU) is None
    assert "off: one image" in capsys.readouterr().out
    monitor = open_monitor(recipe, open_shards(str(digits / "train")), CPU)
    assert monitor is not None and monitor.describe in capsys.readouterr().out
    assert "not a test set" in monitor.describe


def test_a_damaged_sample_is_named_before_training(tmp_path):
    index = packed(tmp_path, [i % 2 for i in range(40)], ["a", "b"])
    index.crc32[7] += 1
    with pytest.raises(ValueError, match="shard altered or damaged"):
        open_monitor(recipe_of(index.folder), index, CPU)


# ---- training goes on as without it ---------------------------------------------------------------


def train(monitor: OnlineMonitor | None, recipe: Recipe) -> dict:
    """Six steps with drop path, never seeded again: a single draw or a changed mode would show."""
    torch.manual_seed(0)
    np.random.seed(0)
    objective = recipe.objective.build(recipe.encoder).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    images = torch.from_numpy(images_of(32))[:, None]
    losses = []
    for step in range(6):
        position = torch.arange(32)
        batch = ImageBatch(images, 0, torch.full_like(position, step), position, position)
        mixed = recipe.precision.mixed == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = objective(batch.to(CPU, recipe.data.mean, recipe.data.std), 32.0).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if monitor is not None and step % 2 == 1:
            monitor.measure(objective.encoder)
    return {
        "losses": losses,
        "weights": [p.detach().numpy().tobytes() for p in objective.parameters()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
    }  # not Python's generator: beartype draws from it to check a list


@pytest.mark.parametrize("mixed", ["fp32", "bf16"])
def test_losses_weights_and_generators_are_the_same_bits(digits, mixed):
    recipe = recipe_of(digits / "train", mixed, drop_path=0.5)
    monitor = OnlineMonitor(recipe, open_shards(str(digits / "train")), CPU)
    with_it, without = train(monitor, recipe), train(None, recipe)
    for name, value in without.items():
        assert repr(with_it[name]) == repr(value), name


def drawing(self, model, images):
    """Planted: the subset drawn anew from torch's generator."""
    return original(self, model, images[torch.randperm(len(images))])


def left_in_eval_mode(self, model, images):
    """Planted: the training mode is not put back."""
    found = original(self, model, images)
    model.eval()
    return found


def in_training_mode(self, model, images):
    """Planted: measured with drop path on."""
    model.eval = lambda: None
    return original(self, model, images)


original = OnlineMonitor._run


@pytest.mark.parametrize("bug", [drawing, left_in_eval_mode, in_training_mode])
def test_planted_bugs_are_caught(digits, monkeypatch, bug):
    monkeypatch.setattr(OnlineMonitor, "_run", bug)
    with pytest.raises(AssertionError):
        test_losses_weights_and_generators_are_the_same_bits(digits, "fp32")


def test_each_modules_mode_is_put_back_even_after_a_fault(monitor):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.norm = nn.Dropout().eval(), nn.BatchNorm1d(64)

        def forward(self, images):
            assert not (self.training or self.frozen.training or self.norm.training)
            assert not torch.is_grad_enabled()
            self.norm(images.flatten(1))
            raise RuntimeError("out of memory")

    module = Fails().train()
    module.frozen.eval()
    with pytest.raises(RuntimeError, match="out of memory"):
        monitor.measure(module)
    assert module.training and module.norm.training and not module.frozen.training
    assert module.norm.num_batches_tracked == 0 and torch.is_grad_enabled()


def test_it_times_itself(monitor, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(online.time, "perf_counter", lambda: now[0])

    def slow(images):
        now[0] += 0.5  # eight batches of at most 128: 400 images, two views of 250
        return images.flatten(1)

    monitor._ended = 100.0
    now[0] = 118.0
    assert monitor.measure(Function(slow))["monitor_share"] == pytest.approx(4 / 22)
    now[0] += 6
    assert monitor.measure(Function(slow))["monitor_share"] == pytest.approx(4 / 10)
