"""Each metric against a closed form and a slow oracle; collapsed features; known bugs, planted."""

import inspect
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from selfsup.probe import representation
from selfsup.probe.representation import (
    alignment,
    alpha_req,
    feature_std,
    lidar,
    linear_cka,
    rankme,
    uniformity,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """(n, d) with orthonormal columns."""
    return torch.linalg.qr(normal(n, d, seed=seed))[0]


def with_spectrum(
    singular_values: torch.Tensor, n: int, centred: bool = False, seed: int = 0
) -> torch.Tensor:
    """(n, d) with exactly these singular values, every column of mean 0 where asked."""
    d = len(singular_values)
    left = normal(n, d, seed=seed)
    left = torch.linalg.qr(left - left.mean(dim=0) if centred else left)[0]
    return left * singular_values @ orthogonal(d, d, seed + 1).T


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


# ---- feature_std ----------------------------------------------------------------------------------


def test_feature_std_by_hand():
    x = normal(50, 7) * 3 + 1
    rows = np.array([unit(row) for row in x.numpy()])
    assert feature_std(x) == pytest.approx(np.mean([column.std() for column in rows.T]) * 7**0.5, rel=1e-12)


def test_feature_std_is_bounded_by_one_and_reaches_it():
    axes = torch.cat([torch.eye(16), -torch.eye(16)])  # mean 0, every dimension the same variance
    assert feature_std(axes) == pytest.approx(1, abs=1e-12)
    assert 0.98 < feature_std(normal(5000, 64)) < 1
    assert feature_std(normal(5000, 64) + 5) < 0.3


# ---- RankMe ---------------------------------------------------------------------------------------


def slow_rank(shares) -> float:
    return math.exp(-sum(p * math.log(p) for p in shares))


def test_rankme_of_known_spectra():
    assert rankme(with_spectrum(torch.ones(20).double(), 100), epsilon=0.0) == pytest.approx(20, abs=1e-9)
    for values in ([3.0, 1.0], [8.0, 4.0, 2.0, 1.0, 1.0]):
        x = with_spectrum(torch.tensor(values, dtype=torch.float64), 40)
        shares = [value / sum(values) for value in values]
        assert rankme(x, epsilon=0.0) == pytest.approx(slow_rank(shares), rel=1e-12)
        assert rankme(x) == pytest.approx(slow_rank([p + 1e-7 for p in shares]), rel=1e-12)


def test_rankme_of_isotropic_noise_is_about_d():
    """Singular values of n x d noise lie within sqrt(n) (1 -+ sqrt(d/n)), semicircle-like for d << n:
    their squared coefficient of variation is d / 4n, so the entropy falls short of log d by d / 8n."""
    for n, d in ((4000, 32), (2000, 64)):
        assert rankme(normal(n, d)) / d == pytest.approx(math.exp(-d / (8 * n)), abs=3e-4)
    assert rankme(normal(64, 64)) < 0.85 * 64


def test_rankme_is_at_most_the_smaller_side():
    assert rankme(normal(10, 50)) <= 10
    assert rankme(normal(50, 10)) <= 10


def test_rankme_does_not_see_scale_rotation_or_order():
    x = normal(60, 12) * torch.linspace(0.1, 3, 12)
    expected = rankme(x)
    for other in (x * 1e-8, x * 1e8, x @ orthogonal(12, 12), x.flip(0), x.flip(1)):
        assert rankme(other) == pytest.approx(expected, rel=1e-9)


def test_rankme_is_not_centred():
    """A common mean is one strong direction; the same features without it are spread."""
    x = normal(500, 30)
    assert rankme(x + 100) < 2 < 28 < rankme(x)


# ---- alpha-ReQ ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.7])
def test_alpha_of_a_power_law(exponent):
    eigenvalues = torch.arange(1, 151, dtype=torch.float64) ** -exponent
    x = with_spectrum(eigenvalues.sqrt(), 400, centred=True)
    assert alpha_req(x) == pytest.approx(exponent, abs=1e-7)
    assert alpha_req(x * 1e3 + 5) == pytest.approx(exponent, abs=1e-5)


def test_alpha_fits_its_ranks_only():
    """Two power laws joined at rank 20: each range finds its own; weights 1 / rank by hand between."""
    rank = torch.arange(1, 81, dtype=torch.float64)
    eigenvalues = torch.where(rank <= 20, rank**-1.0, 20**-1.0 * (rank / 20) ** -3.0)
    x = with_spectrum(eigenvalues.sqrt(), 200, centred=True)
    assert alpha_req(x, (2, 20)) == pytest.approx(1, abs=1e-7)
    assert alpha_req(x, (20, 70)) == pytest.approx(3, abs=1e-7)
    k = np.arange(4, 80)  # the default 4 to 100, cut at min(n, d) - 1 = 79
    slope = np.polyfit(np.log(k), np.log(eigenvalues.numpy()[3:79]), 1, w=np.sqrt(1 / k))[0]
    assert alpha_req(x) == pytest.approx(-slope, abs=1e-7)


def test_alpha_wants_ranks_to_fit():
    with pytest.raises(
        ValueError, match="at least 3 eigenvalues from rank 4 .* 100 x 6, good for ranks up to 5"
    ):
        alpha_req(normal(100, 6))
    with pytest.raises(ValueError, match="give more rows"):
        alpha_req(normal(6, 100))
    alpha_req(normal(100, 7))


# ---- alignment and uniformity ---------------------------------------------------------------------


def test_alignment_is_the_loop():
    x, y = normal(40, 6), normal(40, 6, seed=1) * 5
    assert alignment(x, x * 7) == pytest.approx(0, abs=1e-12)
    for alpha in (1.0, 2.0, 3.5):
        distances = [np.linalg.norm(unit(a) - unit(b)) ** alpha for a, b in zip(x.numpy(), y.numpy())]
        assert alignment(x, y, alpha) == pytest.approx(np.mean(distances), rel=1e-12)
    assert alignment(x, -x) == pytest.approx(4)
    assert alignment(normal(4000, 200), normal(4000, 200, seed=1)) == pytest.approx(2, abs=0.01)


def slow_uniformity(x: torch.Tensor, t: float) -> float:
    rows = [unit(row) for row in x.numpy()]
    terms = [math.exp(-t * float(np.sum((a - b) ** 2))) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    return math.log(sum(terms) / len(terms))


@pytest.mark.parametrize("rows", [1, 7, 40, 100])
def test_uniformity_is_the_double_loop(rows, monkeypatch):
    monkeypatch.setattr(representation, "_CHUNK", 41 * rows)
    check_uniformity_is_the_double_loop()


def check_uniformity_is_the_double_loop():
    x = normal(41, 5) * 3 + 1
    for t in (0.5, 2.0, 10.0):
        assert uniformity(x, t) == pytest.approx(slow_uniformity(x, t), rel=1e-11)


def test_uniformity_limits():
    assert uniformity(torch.ones(30, 4)) == pytest.approx(0, abs=1e-12)
    assert uniformity(normal(3000, 500)) == pytest.approx(-4, abs=0.02)  # distances squared are all about 2
    pair = torch.tensor([[1.0, 0], [-1, 0]])
    assert uniformity(pair, 2.0) == pytest.approx(-8) and uniformity(pair, 1e4) == pytest.approx(-4e4)


def test_uniformity_of_ten_thousand():
    """In closed form: half the rows here, half at the other end of the sphere."""
    n = 10_000
    x = torch.cat([torch.ones(n // 2, 1), -torch.ones(n // 2, 1)]) * torch.tensor([[1.0, 0, 0]])
    same = 2 * (n // 2) * (n // 2 - 1) / 2
    expected = math.log((same + (n // 2) ** 2 * math.exp(-8)) / (n * (n - 1) / 2))
    assert uniformity(x) == pytest.approx(expected, rel=1e-10)


# ---- linear CKA -----------------------------------------------------------------------------------


def slow_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Kornblith et al.'s definition: HSIC of centred n x n Gram matrices."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    k, m = (h @ (z.numpy() @ z.numpy().T) @ h for z in (x, y))
    return float(np.trace(k @ m) / math.sqrt(np.trace(k @ k) * np.trace(m @ m)))


def test_cka_is_the_gram_form():
    x = normal(30, 8) + 3
    for y in (x + 0.5 * normal(30, 8, seed=2), normal(30, 50, seed=1) - 2, x[:, :1]):
        assert linear_cka(x, y) == pytest.approx(slow_cka(x, y), rel=1e-11)
        assert linear_cka(y, x) == pytest.approx(linear_cka(x, y), rel=1e-12)


def test_cka_is_one_up_to_rotation_scale_and_shift():
    x = normal(100, 10) * torch.linspace(0.1, 2, 10)
    for y in (x, x @ orthogonal(10, 10), -4e3 * x, x + 17, x * 1e-150):
        assert linear_cka(x, y) == pytest.approx(1, abs=1e-9)
    assert linear_cka(x, x @ normal(10, 10, seed=3)) < 0.99  # but not up to any linear map


def test_cka_of_orthogonal_and_of_unrelated_features():
    columns = normal(200, 12)
    columns = torch.linalg.qr(columns - columns.mean(dim=0))[0]
    assert linear_cka(columns[:, :5] + 3, columns[:, 5:] - 1) == pytest.approx(0, abs=1e-12)
    for d, e in ((10, 40), (30, 30)):  # the bias that the docstring states
        assert linear_cka(normal(2000, d), normal(2000, e, seed=1)) == pytest.approx(
            math.sqrt(d * e) / 2000, rel=0.15
        )


# ---- LiDAR ----------------------------------------------------------------------------------------


def slow_lidar(x: np.ndarray, delta: float, epsilon: float) -> float:
    """The LDA matrix summed up term by term, its inverse root by eigenvectors."""
    n, q, d = x.shape
    means = [sum(views) / q for views in x]
    mean = sum(means) / n
    between, within = np.zeros((d, d)), delta * np.eye(d)
    for i in range(n):
        between += np.outer(means[i] - mean, means[i] - mean) / n
        for view in x[i]:
            within += np.outer(view - means[i], view - means[i]) / (n * (q - 1))
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ between @ root).clip(0)
    return slow_rank([value / eigenvalues.sum() + epsilon for value in eigenvalues])


@pytest.mark.parametrize(("n", "q", "d"), [(30, 4, 6), (5, 3, 9), (20, 2, 8)])
def test_lidar_is_the_slow_lda(n, q, d):
    x = normal(n, 1, d) * torch.linspace(0.2, 2, d) + 0.3 * normal(n, q, d, seed=1) + 4
    for delta, epsilon in ((1e-4, 1e-7), (0.5, 1e-3)):
        expected = slow_lidar(x.numpy(), delta, epsilon)
        assert lidar(x, delta, epsilon) == pytest.approx(expected, rel=1e-9)


def test_lidar_counts_what_views_leave_alone():
    """Ten dimensions vary, in three of them views agree: RankMe counts ten, LiDAR three."""
    x = normal(2000, 1, 10) + torch.cat([torch.zeros(3), 50 * torch.ones(7)]) * normal(2000, 4, 10, seed=1)
    scaled = x / x.flatten(0, 1).std(dim=0)
    assert rankme(scaled.flatten(0, 1)) > 9.9
    assert lidar(scaled) == pytest.approx(3, abs=0.05)


# ---- collapse -------------------------------------------------------------------------------------

COLLAPSED = {
    "constant": torch.full((200, 16), 0.3),
    "zero": torch.zeros(200, 16),
    "constant and rounding": torch.full((200, 16), 0.3) * (1 + 1e-7 * normal(200, 16).float()),
}


@pytest.mark.parametrize("name", COLLAPSED)
def test_complete_collapse_is_flagged_by_each(name):
    x = COLLAPSED[name]
    assert feature_std(x) == pytest.approx(0, abs=1e-5)
    assert rankme(x) == pytest.approx(1, abs=1e-3)
    assert uniformity(x) == pytest.approx(0, abs=1e-9)
    assert alignment(x, x.flip(0)) == pytest.approx(0, abs=1e-9)
    assert lidar(x.view(50, 4, 16)) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="dimensions, 0, .* collapsed"):
        alpha_req(x)
    for pair in ((x, normal(200, 5)), (normal(200, 5), x)):
        with pytest.raises(ValueError, match="features are constant: collapsed"):
            linear_cka(*pair)


def test_dimensional_collapse_is_flagged():
    line = normal(200, 1) * normal(1, 16, seed=1)
    assert rankme(line) == pytest.approx(1, abs=1e-3)
    assert feature_std(normal(200, 1).abs() * normal(1, 16, seed=1)) == pytest.approx(0, abs=1e-12)
    assert lidar(line.view(50, 4, 16)) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="dimensions, 1, "):
        alpha_req(line)
    spread = normal(200, 16)
    assert uniformity(line) > -0.8 > -3 > uniformity(spread)  # two points on the sphere
    steep = spread * torch.arange(1, 17).double() ** -2
    assert alpha_req(steep) > 2 > alpha_req(spread)


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [feature_std, rankme, alpha_req, uniformity])
def test_bad_features_are_refused(metric):
    bare = inspect.unwrap(metric)  # as users call it: without the annotations' own checks
    for shape in ((8,), (8, 3, 4), (8, 0)):
        with pytest.raises(ValueError, match=r"expected float \(n, d\) features, got torch.float32 \(8"):
            bare(torch.ones(shape))
    with pytest.raises(ValueError, match="torch.int64"):
        bare(torch.ones(8, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        metric(torch.ones(1, 4))
    for value in (float("nan"), float("inf")):
        x = torch.ones(8, 4)
        x[2:4, 1] = value
        with pytest.raises(ValueError, match="2 of 8 rows hold NaN or infinite"):
            metric(x)


def test_bad_pairs_and_views_are_refused():
    x = normal(8, 4)
    bad = torch.where(torch.arange(4) == 1, torch.nan, x)
    with pytest.raises(ValueError, match=r"two equal shapes, got \(8, 4\) and \(8, 5\)"):
        inspect.unwrap(alignment)(x, normal(8, 5))
    with pytest.raises(ValueError, match="at least 1 rows, got 0"):
        alignment(x[:0], x[:0])
    with pytest.raises(ValueError, match="got 8 and 7"):
        inspect.unwrap(linear_cka)(x, x[:7])
    with pytest.raises(ValueError, match="at least 3 rows, got 2"):
        linear_cka(x[:2], x[:2])
    for call in (alignment, linear_cka):
        with pytest.raises(ValueError, match="8 of 8 rows"):
            call(x, bad)
    views = normal(5, 3, 4)
    for wrong, delta in ((views[:, :1], 1e-4), (views, 0.0)):
        with pytest.raises(ValueError, match="at least 2 views and delta > 0"):
            lidar(wrong, delta)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        lidar(views[:1])
    with pytest.raises(ValueError, match=r"\(n, q, d\) features, got torch.float64 \(8, 4\)"):
        inspect.unwrap(lidar)(x)


def test_half_precision_is_measured_in_float64():
    x = normal(300, 24).bfloat16()
    for metric in (feature_std, rankme, alpha_req, uniformity):
        assert metric(x) == metric(x.double())


# ---- planted bugs ---------------------------------------------------------------------------------

METRICS = ("feature_std", "rankme", "alpha_req", "alignment", "uniformity", "linear_cka", "lidar")


def plant(monkeypatch, right: str, wrong: str) -> None:
    """The metrics as they would be with `wrong` in place of `right`, for the tests of this file."""
    text = Path(representation.__file__).read_text()
    assert text.count(right) == 1, right
    mutant = ModuleType("mutant")
    exec(compile(text.replace(right, wrong), "mutant", "exec"), mutant.__dict__)
    for name in METRICS:
        monkeypatch.setitem(globals(), name, getattr(mutant, name))


MUTANTS = {
    "feature_std without unit length": (
        '_unit(_checked("feature_std", features, 2))',
        '_checked("feature_std", features, 2)',
        lambda: test_feature_std_by_hand(),
    ),
    "RankMe of squared singular values": (
        'svdvals(_checked("rankme", features, 2))',
        'svdvals(_checked("rankme", features, 2)).square()',
        lambda: test_rankme_of_known_spectra(),
    ),
    "RankMe centred": (
        'svdvals(_checked("rankme", features, 2))',
        'svdvals(_checked("rankme", features - features.mean(dim=0), 2))',
        lambda: test_rankme_is_not_centred(),
    ),
    "alpha of singular values": (
        ".square() / n\n",
        " / n\n",
        lambda: test_alpha_of_a_power_law(1.0),
    ),
    "alpha uncentred": (
        "svdvals(values - values.mean(dim=0))",
        "svdvals(values)",
        lambda: test_alpha_of_a_power_law(1.0),
    ),
    "alpha with equal weights": (
        "weight = 1 / rank / (1 / rank).sum()",
        "weight = torch.ones_like(rank) / len(rank)",
        lambda: test_alpha_fits_its_ranks_only(),
    ),
    "alpha a rank too late": (
        "eigenvalues[first - 1 : last]",
        "eigenvalues[first : last + 1]",
        lambda: test_alpha_of_a_power_law(1.0),
    ),
    "alignment without unit length": (
        "(_unit(first) - _unit(second))",
        "(first - second)",
        lambda: test_alignment_is_the_loop(),
    ),
    "uniformity without unit length": (
        '_unit(_checked("uniformity", x, 2))',
        '_checked("uniformity", x, 2)',
        lambda: check_uniformity_is_the_double_loop(),
    ),
    "uniformity with self-pairs": (
        "slice(start + 1, n)",
        "slice(start, n)",
        lambda: check_uniformity_is_the_double_loop(),
    ),
    "CKA uncentred": (
        "centred.append(values - values.mean(dim=0))",
        "centred.append(values.clone())",
        lambda: test_cka_is_the_gram_form(),
    ),
    "CKA of unsquared norms": (
        "(b.T @ a).norm().square()",
        "(b.T @ a).norm()",
        lambda: test_cka_is_the_gram_form(),
    ),
    "LiDAR with views and samples exchanged": (
        "means = values.mean(dim=1)",
        "means = values.reshape(q, n, d).mean(dim=0)",
        lambda: test_lidar_is_the_slow_lda(30, 4, 6),
    ),
    "LiDAR uncentred between samples": (
        "between = means - means.mean(dim=0)",
        "between = means.clone()",
        lambda: test_lidar_is_the_slow_lda(30, 4, 6),
    ),
    "LiDAR without the within-sample covariance": (
        "within = inside.T @ inside",
        "within = 0 * inside.T @ inside",
        lambda: test_lidar_counts_what_views_leave_alone(),
    ),
    "LiDAR without the ridge": (
        "+ delta * torch.eye",
        "+ 1e-12 * torch.eye",
        lambda: test_lidar_is_the_slow_lda(20, 2, 8),
    ),
    "rounding taken for spread": (
        "_ROUNDING = 1e-12",
        "_ROUNDING = 0.0",
        lambda: test_complete_collapse_is_flagged_by_each("constant and rounding"),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(name, monkeypatch):
    right, wrong, test = MUTANTS[name]
    test()
    plant(monkeypatch, right, wrong)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test()
