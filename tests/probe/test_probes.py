"""kNN against a slow loop, logistic regression against scikit-learn by hand, features against the encoder."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from selfsup.checkpoint import load_encoder
from selfsup.data.images import eval_batches
from selfsup.data.index import open_shards
from selfsup.export.load import load_frozen
from selfsup.probe import logreg as logreg_module
from selfsup.probe.features import Features, choose_device, encoder_features, pixel_features, random_encoder
from selfsup.probe.knn import knn_accuracy
from selfsup.probe.logreg import C_GRID, logreg


def blobs(n: int, seed: int, d: int = 12, classes: int = 4, noise: float = 1.5) -> Features:
    """Noisy clusters around the same centres for every seed."""
    centres = np.random.default_rng(99).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    values = centres[labels] + noise * rng.normal(size=(n, d))
    return Features((5 + values * np.linspace(0.1, 10, d)).astype(np.float32), labels)


def slow_knn(train: Features, test: Features, k: int, temperature: float) -> float:
    """DINO's eval_knn.py, one sample and one neighbour at a time, in float64."""
    right = 0
    for x, label in zip(test.values.astype(np.float64), test.labels):
        similarities = []
        for y in train.values.astype(np.float64):
            norms = np.linalg.norm(x) * np.linalg.norm(y)
            similarities.append(x @ y / norms if norms > 0 else 0.0)
        votes: dict[int, float] = {}
        for i in sorted(range(len(similarities)), key=lambda i: -similarities[i])[:k]:
            votes[train.labels[i]] = votes.get(train.labels[i], 0.0) + np.exp(similarities[i] / temperature)
        right += max(votes, key=lambda c: votes[c]) == label
    return right / len(test.labels)


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (7, 0.5)])
def test_knn_is_the_slow_loop(k, temperature):
    train, test = blobs(150, 1), blobs(60, 2)
    train.values[3] = 0  # a black image
    test.values[5] = 0
    accuracy = knn_accuracy(train, test, k, temperature)
    assert accuracy == slow_knn(train, test, k, temperature)
    assert 0.3 < accuracy < 1


def test_knn_weighs_and_normalises():
    """A near neighbour outvotes two far ones; a long vector counts no more than a short one."""
    train = Features(np.array([[10.0, 0], [0.6, 0.8], [0.5, 0.8]], np.float32), np.array([0, 1, 1]))
    test = Features(np.array([[1.0, 0.1]], np.float32), np.array([0]))
    assert knn_accuracy(train, test, k=3, temperature=0.07) == 1
    assert knn_accuracy(train, test, k=3, temperature=100.0) == 0


def test_knn_wants_k_samples():
    with pytest.raises(ValueError, match="at least k = 20 training samples, got 19"):
        knn_accuracy(blobs(19, 0), blobs(5, 1))


def test_logreg_is_scikit_learn_by_hand():
    train, test = blobs(600, 1), blobs(200, 2)
    result = logreg(train, test)
    scaler = StandardScaler().fit(train.values)
    held, kept = np.split(np.random.default_rng(0).permutation(600), [60])
    values, accuracies = scaler.transform(train.values), {}
    for c in C_GRID:
        model = LogisticRegression(C=c, max_iter=1000).fit(values[kept], train.labels[kept])
        accuracies[f"{c:g}"] = model.score(values[held], train.labels[held])
    for c, accuracy in result.held_out_accuracy.items():
        assert abs(accuracy - accuracies[c]) <= 1 / 60 + 1e-9
    assert f"{result.c:g}" == max(result.held_out_accuracy, key=lambda c: result.held_out_accuracy[c])
    model = LogisticRegression(C=result.c, max_iter=1000).fit(values, train.labels)
    assert abs(result.accuracy - model.score(scaler.transform(test.values), test.labels)) <= 1 / 200 + 1e-9
    assert result.converged and 0.5 < result.accuracy < 1
    assert logreg(train, test) == result


def test_logreg_never_looks_at_the_test_set():
    train, test = blobs(300, 1), blobs(100, 2)
    other = logreg(train, Features(test.values * 100 + 7, test.labels))
    assert logreg(train, test)._replace(accuracy=0.0) == other._replace(accuracy=0.0)


def test_logreg_leaves_the_grid_when_it_only_gets_worse():
    """More features than samples and labels that are noise but for one: strong regularisation wins."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1000, 400)).astype(np.float32)
    labels = (values[:, 0] + 2 * rng.normal(size=1000) > 0).astype(np.int64)
    result = logreg(Features(values, labels), Features(values[:10], labels[:10]))
    assert len(result.held_out_accuracy) < len(C_GRID)


def test_logreg_reports_a_fit_that_was_stopped(monkeypatch):
    monkeypatch.setattr(logreg_module, "MAX_ITERATIONS", 2)
    result = logreg(blobs(200, 1), blobs(50, 2))
    assert not result.converged and result.iterations == 2


def test_logreg_learns_a_class_that_only_the_held_out_part_has():
    train = blobs(200, 1)
    train.labels[np.random.default_rng(0).permutation(200)[0]] = 9
    assert logreg(train, Features(train.values, train.labels)).accuracy > 0.5


def test_logreg_wants_classes_and_samples():
    one = Features(blobs(100, 0).values, np.zeros(100, dtype=np.int64))
    with pytest.raises(ValueError, match="two classes, got 100 of 1"):
        logreg(one, one)
    with pytest.raises(ValueError, match="at least 20 training samples"):
        logreg(blobs(19, 0), blobs(5, 0))


def test_features_are_the_encoders_in_index_order(make_run, digits):
    run = make_run()
    encoder, *_ = load_encoder(run)
    index = open_shards(str(digits / "test"))
    features = encoder_features(load_frozen(str(run)), index, batch_size=33)
    images = torch.cat([images for images, _, _ in eval_batches(index, 8, 1, 100)])
    with torch.no_grad():
        expected = encoder((images / 255 - 0.3) / 0.4)
    assert features.values.dtype == np.float32 and features.values.shape == (100, 24)
    assert np.allclose(features.values, expected, atol=1e-5)
    assert np.array_equal(features.labels, index.label)
    in_bf16 = encoder_features(load_frozen(str(run)), index, bf16=True)
    assert in_bf16.values.dtype == np.float32
    assert 0 < np.abs(in_bf16.values - features.values).max() < 0.1
    pixels = pixel_features(index, 8, 1, batch_size=33)
    assert np.allclose(pixels.values, images.flatten(1) / 255) and pixels.values.dtype == np.float32
    assert pixel_features(index, 4, 3).values.shape == (100, 48)


def test_features_that_are_not_numbers_are_refused(make_run, digits):
    frozen = load_frozen(str(make_run()))
    frozen.module.norm.bias[0] = float("nan")
    with pytest.raises(ValueError, match="of 100 of 100 images are NaN or infinite"):
        encoder_features(frozen, open_shards(str(digits / "test")))


def test_random_encoder_is_the_runs_own_start(make_run):
    recipe = load_frozen(str(make_run({"seed": 5}))).recipe
    torch.manual_seed(5)
    expected = recipe.objective.build(recipe.encoder).encoder.state_dict()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    random = random_encoder(recipe, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(expected[k], v) for k, v in random.module.state_dict().items())
    other = random_encoder(recipe, 6).module.state_dict()
    assert not all(torch.equal(expected[k], v) for k, v in other.items())


def test_device():
    assert choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="--device cpu"):
            choose_device("cuda")
