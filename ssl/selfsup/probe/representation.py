"""How spread out, how invariant and how alike features are: metrics that need no labels.

Pure functions of float features, one row per sample, computed in float64 whatever comes in. Each says
its equation, whether it centres, its epsilon and what it makes of collapsed features: a set of
features is collapsed completely when all rows are equal, and in dimension when they lie in few
directions. No metric sees both alone; `feature_std` beside `rankme` does.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

EPSILON = 1e-7
"""Added to each share of a spectrum before its entropy, as RankMe's authors do for float32 features."""
DELTA = 1e-4
"""LiDAR's ridge; published re-implementations take 1e-6 to 1e-3."""
FIT_RANGE = (4, 100)
"""Ranks, counted from 1, over which the power law is fitted: those of the code of its authors."""

_ROUNDING = 1e-12
"""A variance below this share of the mean square is what rounding leaves of a constant (float32: 1e-14)."""
_CHUNK = 2**20
"""Pairs that `uniformity` works on at once: 8 MiB an array."""


def feature_std(features: Float[Tensor, "n d"]) -> float:
    """sqrt(d) * mean over dimensions of std over samples of z, z = x / |x|: 0 collapsed, 1 spread.

    The output std that Chen and He 2021 ("Exploring Simple Siamese Representation Learning", sec. 4.1)
    watch for collapse, times sqrt(d). The std divides by n, which bounds the result by 1: the
    variances of unit vectors add up to 1 - |mean z|^2. Zero rows stay zero.
    Raises ValueError for fewer than 2 rows, another shape, and NaN or infinite numbers.
    """
    units = _unit(_checked("feature_std", features, 2))
    return float(units.std(dim=0, correction=0).mean() * units.shape[1] ** 0.5)


def rankme(features: Float[Tensor, "n d"], epsilon: float = EPSILON) -> float:
    """Effective rank of the feature matrix: 1 collapsed, at most min(n, d).

    exp(-sum_k p_k log p_k), p_k = s_k / sum(s) + epsilon, s the singular values (not squared) of the
    matrix as it stands, uncentred (Garrido et al. 2023, "RankMe"): a common mean counts as one
    direction. Compare only at one n: it grows with n up to d.
    Raises ValueError for fewer than 2 rows, another shape, and NaN or infinite numbers.
    """
    return _exp_entropy(torch.linalg.svdvals(_checked("rankme", features, 2)), epsilon)


def alpha_req(features: Float[Tensor, "n d"], fit_range: tuple[int, int] = FIT_RANGE) -> float:
    """Decay of the eigenspectrum: the exponent a of lambda_k ~ k^-a; 0 flat, larger for fewer dimensions.

    Agrawal et al. 2022, "alpha-ReQ": lambda_k the eigenvalues of the centred covariance, in falling
    order; a line through (log k, log lambda_k) by least squares with weights 1 / k, for the ranks k in
    `fit_range`, both ends included, but none above min(n, d) - 1: centring takes a dimension from n,
    a LayerNorm before the features one from d. An eigenvalue below 1e-12 of the uncentred mean
    square is rounding and counts as none.
    Raises ValueError for fewer than 3 ranks to fit, where the features lie in so few dimensions that
    the spectrum ends inside the range (collapsed: there is no power law), for another shape, and
    for NaN or infinite numbers.
    """
    values = _checked("alpha_req", features, 2)
    n, d = values.shape
    first, last = fit_range[0], min(fit_range[1], min(n, d) - 1)
    if first < 1 or last - first < 2:
        raise ValueError(
            f"alpha_req: expected at least 3 eigenvalues from rank {first} to {fit_range[1]}, got features of "
            f"shape {n} x {d}, good for ranks up to {min(n, d) - 1}; give more rows or another fit_range"
        )
    eigenvalues = torch.linalg.svdvals(values - values.mean(dim=0)).square() / n
    dimensions = int((eigenvalues > _ROUNDING * values.square().sum() / n).sum())
    if dimensions < last:
        raise ValueError(
            f"alpha_req: the features vary in so few dimensions, {dimensions}, that the spectrum ends inside "
            f"the fitted ranks {first} to {last}: collapsed, no power law"
        )
    rank = torch.arange(first, last + 1, dtype=torch.float64, device=values.device)
    x, y = rank.log(), eigenvalues[first - 1 : last].log()
    weight = 1 / rank / (1 / rank).sum()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    return -float((weight * x * y).sum() / (weight * x * x).sum())


def alignment(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], alpha: float = 2.0) -> float:
    """How far two views of a sample lie apart: mean over samples of |z(x) - z(y)|^alpha, z = x / |x|.

    Wang and Isola 2020 ("Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", sec. 4.1); row i of x and y are views of one sample. 0: views agree,
    or everything is collapsed, which `uniformity` tells apart; 2 for unrelated views in many
    dimensions (alpha 2). Uncentred, no epsilon.
    Raises ValueError for no rows, shapes that differ, and NaN or infinite numbers.
    """
    first, second = _checked("alignment", x, 1), _checked("alignment", y, 1)
    if first.shape != second.shape:
        raise ValueError(f"alignment: expected two equal shapes, got {_shape(x)} and {_shape(y)}")
    return float((_unit(first) - _unit(second)).norm(dim=1).pow(alpha).mean())


def uniformity(x: Float[Tensor, "n d"], t: float = 2.0) -> float:
    """How evenly features cover the sphere: log of the mean over pairs of exp(-t |z_i - z_j|^2), z = x / |x|.

    Wang and Isola 2020, sec. 4.1, over the n (n - 1) / 2 pairs of distinct rows. 0: collapsed; about
    -2 t for a uniform sphere of many dimensions; -4 t is the least. Uncentred, no epsilon; a sum of
    exponentials in logarithms, so large t does not underflow. Time n^2 d, memory a few arrays of 8 MiB.
    Raises ValueError for fewer than 2 rows, another shape, and NaN or infinite numbers.
    """
    units = _unit(_checked("uniformity", x, 2))
    n = len(units)
    squares = units.square().sum(dim=1)  # 1, but 0 for zero rows
    rows, parts = max(1, _CHUNK // n), []
    for start in range(0, n - 1, rows):
        block, others = units[start : start + rows], slice(start + 1, n)
        distances = squares[start : start + rows, None] + squares[others] - 2 * block @ units[others].T
        pairs = torch.ones_like(distances, dtype=torch.bool).triu()  # column c is row start + 1 + c
        parts.append(torch.logsumexp(-t * distances.clamp_min(0)[pairs], dim=0))
    return float(torch.logsumexp(torch.stack(parts), dim=0)) - math.log(n * (n - 1) / 2)


def linear_cka(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"]) -> float:
    """How alike two representations of the same samples are: 0 orthogonal, 1 equal up to rotation and scale.

    |Yc' Xc|_F^2 / (|Xc' Xc|_F |Yc' Yc|_F), Xc and Yc centred over samples (Kornblith et al. 2019,
    "Similarity of Neural Network Representations Revisited", sec. 3): the biased form, which for
    unrelated features is about sqrt(d e) / n and not 0. No epsilon.
    Raises ValueError for fewer than 3 rows, different numbers of rows, features that are constant
    over samples (collapsed: it is 0 / 0), another shape, and NaN or infinite numbers.
    """
    first, second = _checked("linear_cka", x, 3), _checked("linear_cka", y, 3)
    if len(first) != len(second):
        raise ValueError(f"linear_cka: expected the same rows twice, got {len(first)} and {len(second)}")
    centred = []
    for name, values in (("first", first), ("second", second)):
        centred.append(values - values.mean(dim=0))
        if _is_rounding(centred[-1], values):
            raise ValueError(f"linear_cka: the {name} features are constant: collapsed, nothing to compare")
        centred[-1] /= centred[-1].norm()  # cancels below; keeps fourth powers within range
    a, b = centred
    return float((b.T @ a).norm().square() / ((a.T @ a).norm() * (b.T @ b).norm()))


def lidar(features: Float[Tensor, "n q d"], delta: float = DELTA, epsilon: float = EPSILON) -> float:
    """Effective rank of what tells samples apart beyond their views: 1 collapsed, at most min(n - 1, d).

    features: q views of each of n samples. Thilak et al. 2024 ("LiDAR: Sensing Linear Probing
    Performance in Joint Embedding SSL Architectures"): exp(-sum p_k log p_k),
    p_k = l_k / sum(l) + epsilon, l the eigenvalues of Sw^-1/2 Sb Sw^-1/2. Sb is the covariance of
    the n means over views; Sw the mean over samples of the covariance of their q views (dividing by
    q - 1) plus delta times the identity. `delta` makes it depend on the scale of the features; a
    spread of the means that is only rounding counts as none. The
    paper takes n = 1,000 and q = 50; with few views Sw is noisy: compare only at one n and q.
    Raises ValueError for fewer than 2 samples or 2 views, delta <= 0, another shape, and NaN or
    infinite numbers.
    """
    values = _checked("lidar", features, 2, ("n", "q", "d"))
    n, q, d = values.shape
    if q < 2 or delta <= 0:
        raise ValueError(f"lidar: expected at least 2 views and delta > 0, got {q} views and delta {delta}")
    means = values.mean(dim=1)
    inside = (values - means[:, None]).flatten(0, 1)  # (n, q, d) -> (n q, d)
    between = means - means.mean(dim=0)
    if _is_rounding(between, values):
        between = torch.zeros_like(between)
    within = inside.T @ inside / (n * (q - 1)) + delta * torch.eye(
        d, dtype=values.dtype, device=values.device
    )
    # With Sw = L L', the eigenvalues of Sw^-1/2 Sb Sw^-1/2 are those of L^-1 Sb L'^-1.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between.T, upper=False)  # (d, n)
    return _exp_entropy(torch.linalg.eigvalsh(whitened @ whitened.T).clamp_min(0), epsilon)


def _checked(
    name: str, features: Tensor, rows: int, axes: tuple[str, ...] = ("n", "d")
) -> Float64[Tensor, "n *rest"]:
    """The features in float64, fit to be measured."""
    expected = f"({', '.join(axes)})"
    if features.ndim != len(axes) or 0 in features.shape[1:] or not features.is_floating_point():
        raise ValueError(
            f"{name}: expected float {expected} features, got {features.dtype} {_shape(features)}"
        )
    if len(features) < rows:
        raise ValueError(f"{name}: expected at least {rows} rows, got {len(features)}")
    values = features.detach().to(torch.float64)
    broken = len(features) - int(values.isfinite().flatten(1).all(dim=1).sum())
    if broken:
        raise ValueError(f"{name}: {broken} of {len(features)} rows hold NaN or infinite numbers")
    return values


def _shape(features: Tensor) -> str:
    return f"({', '.join(map(str, features.shape))})"


def _unit(values: Tensor) -> Tensor:
    """Rows over their length; rows of zeros stay zero. Scaled first: squares of 1e-200 would vanish."""
    values = values / values.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return values / values.norm(dim=1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


def _is_rounding(centred: Tensor, values: Tensor) -> bool:
    """Whether nothing but rounding is left of `values` once centred."""
    return bool(centred.square().mean() <= _ROUNDING * values.square().mean())


def _exp_entropy(spectrum: Tensor, epsilon: float) -> float:
    """exp of the entropy of the shares plus epsilon; a spectrum of zeros gives epsilon each: about 1."""
    total = spectrum.sum()
    shares = spectrum / total if total > 0 else spectrum
    return float(torch.special.entr(shares + epsilon).sum().exp())
