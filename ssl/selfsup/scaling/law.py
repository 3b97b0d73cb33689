"""The laws as pure functions of a batch of parameter vectors: log loss and its gradient.

Every law is used twice, by people as `loss(coefficients, N, D)` and by the solver as a `Model`. The
solver's parameters are scaled: sizes enter as logarithms about their mean, so that amplitudes are of the
order of the loss. R is the number of fits made at once (resamples, starts), p of parameters, n of runs.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(R, p) parameters -> (R, n) log of the predicted loss, (R, p, n) its gradient."""

EXPONENT_RANGE = (0.003, 4.0)
"""Where the solver looks for exponents: strictly positive. An exponent at either end is refused."""
_TINY = 1e-100

CHINCHILLA = ("E", "A", "B", "alpha", "beta")
KAPLAN = ("Nc", "Dc", "alpha_N", "alpha_D")
REPEATS = ("R_D", "R_N")
BROKEN = ("a", "b", "c0", "c1", "d1", "f1")
Array = Float[np.ndarray, "..."]


def chinchilla(
    E: float | Array, A: float | Array, B: float | Array, alpha: float | Array, beta: float | Array,
    params: float | Array, samples: float | Array,
) -> Array:  # fmt: skip
    """E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2); broadcasts."""
    return np.asarray(E + A * np.power(params, -np.asarray(alpha)) + B * np.power(samples, -np.asarray(beta)))


def kaplan(
    Nc: float | Array, Dc: float | Array, alpha_N: float | Array, alpha_D: float | Array,
    params: float | Array, samples: float | Array,
) -> Array:  # fmt: skip
    """((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D (Kaplan et al. 2020, equation 1.5); broadcasts."""
    ratio = np.asarray(alpha_N) / np.asarray(alpha_D)
    by_size = np.exp(ratio * (np.log(Nc) - np.log(params)))
    return np.asarray(np.power(by_size + np.exp(np.log(Dc) - np.log(samples)), alpha_D))


def effective(value: float | Array, unique: float | Array, decay: float | Array) -> Array:
    """What repeated data (or excess parameters) are worth: U + U R* (1 - exp(-R / R*)), R = value / U - 1.

    Muennighoff et al. 2023 (2305.16264), equation 5. `decay` R* infinite: repeats are worth fresh data.
    """
    repeats = np.maximum(np.asarray(value) / unique - 1.0, 0.0)
    decay = np.asarray(decay, dtype=np.float64)
    finite = np.where(np.isinf(decay), 1.0, decay)
    worth = np.where(np.isinf(decay), repeats, -finite * np.expm1(-repeats / finite))
    return np.asarray(np.minimum(value, unique) + unique * worth)


def optimal_params(
    E: float | Array, A: float | Array, B: float | Array, alpha: float | Array, beta: float | Array,
    samples: float | Array,
) -> Array:  # fmt: skip
    """The N for which `samples` are compute-optimal under C proportional to N D: alpha A / N^alpha = beta B / D^beta."""
    return np.asarray(np.power(alpha * A / (beta * B) * np.power(samples, beta), 1.0 / alpha))


def repeats(
    base: Mapping[str, float | Array], R_D: float | Array, R_N: float | Array,
    params: float | Array, samples: float | Array, unique: float | Array,
) -> Array:  # fmt: skip
    """The base law at effective data and effective parameters (2305.16264, section 3).

    Parameters beyond those that are optimal for the unique data decay as repeated data do.
    """
    size = np.minimum(params, optimal_params(**base, samples=unique))
    return chinchilla(**base, params=effective(params, size, R_N), samples=effective(samples, unique, R_D))


def broken(
    a: float | Array, b: float | Array, c0: float | Array, c1: float | Array, d1: float | Array,
    f1: float | Array, x: float | Array,
) -> Array:  # fmt: skip
    """a + b x^-c0 (1 + (x / d1)^(1 / f1))^(-c1 f1), one break (Caballero et al. 2022, equation 1)."""
    log_x = np.log(x)
    bend = np.logaddexp(0.0, (log_x - np.log(d1)) / f1)
    return np.asarray(a + b * np.exp(-np.asarray(c0) * log_x - np.asarray(c1) * f1 * bend))


def chinchilla_model(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Model:
    """theta = (E, A', B', alpha, beta): E + A' exp(-alpha x) + B' exp(-beta y), x and y centred log N, log D."""

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        E, A, B, alpha, beta = (theta[:, i, None] for i in range(5))
        by_size, by_data = np.exp(-alpha * x), np.exp(-beta * y)
        loss = np.maximum(E + A * by_size + B * by_data, _TINY)
        J = np.empty((len(theta), 5, len(x)))
        J[:, 0], J[:, 1], J[:, 2] = 1.0 / loss, by_size / loss, by_data / loss
        J[:, 3], J[:, 4] = -A * x * J[:, 1], -B * y * J[:, 2]
        return np.log(loss), J

    return model


def tied_model(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Model:
    """theta = (E, A', B', alpha): the same with beta = alpha (Gadre et al. 2024, equation 4)."""
    full = chinchilla_model(x, y)

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        f, J = full(np.concatenate([theta, theta[:, 3:]], axis=1))
        return f, np.concatenate([J[:, :3], J[:, 3:4] + J[:, 4:]], axis=1)

    return model


def kaplan_model(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Model:
    """theta = (A', B', ratio, alpha_D): (A' exp(-ratio x) + B' exp(-y))^alpha_D, ratio = alpha_N / alpha_D."""

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        A, B, ratio, power = (theta[:, i, None] for i in range(4))
        by_size, by_data = np.exp(np.clip(-ratio * x, -200.0, 200.0)), np.exp(-y)[None]
        inner = np.maximum(A * by_size + B * by_data, _TINY)
        J = np.empty((len(theta), 4, len(x)))
        J[:, 0], J[:, 1] = power * by_size / inner, power * by_data / inner
        J[:, 2], J[:, 3] = -A * x * J[:, 0], np.log(inner)
        return power * J[:, 3], J

    return model


def repeats_model(
    base: Mapping[str, float], params: Float[np.ndarray, " n"], samples: Float[np.ndarray, " n"],
    unique: Float[np.ndarray, " n"],
) -> Model:  # fmt: skip
    """theta = (log R_D, log R_N); the base law stays as it is."""
    size = np.minimum(params, optimal_params(**base, samples=unique))

    def worth(value: np.ndarray, unit: np.ndarray, log_decay: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        decay = np.exp(log_decay)[:, None]
        ratio = np.maximum(value / unit - 1.0, 0.0) / decay
        amount = np.minimum(value, unit) - unit * decay * np.expm1(-ratio)
        return amount, unit * decay * (-np.expm1(-ratio) - ratio * np.exp(-ratio))

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        data, d_data = worth(samples, unique, theta[:, 0])
        sizes, d_sizes = worth(params, size, theta[:, 1])
        loss = chinchilla(**base, params=sizes, samples=data)
        by_data = -base["beta"] * base["B"] * data ** (-base["beta"] - 1.0) * d_data / loss
        by_size = -base["alpha"] * base["A"] * sizes ** (-base["alpha"] - 1.0) * d_sizes / loss
        return np.log(loss), np.stack([by_data, by_size], axis=1)

    return model


def joint_repeats_model(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], u: Float[np.ndarray, " n"]
) -> Model:
    """theta = (E, A', B', alpha, beta, log R_D, log R_N): base law and half-lives together.

    x: centred log N. y, u: log D and the log of its unique samples, both less the mean of log D. The size that the
    unique samples are optimal for, beyond which parameters decay, moves with the base law (as in `repeats`).
    """
    fresh, excess = np.minimum(y, u), np.expm1(np.maximum(y - u, 0.0))

    def worth(over: np.ndarray, log_decay: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        decay = np.exp(log_decay)
        left = np.exp(-over / decay)
        amount = -decay * np.expm1(-over / decay)
        return amount, left, amount - over * left  # its slope in `over`, in log R

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        E, A, B, alpha, beta, log_d, log_n = (theta[:, i, None] for i in range(7))
        A, B = np.maximum(A, _TINY), np.maximum(B, _TINY)
        amount, _, slope = worth(excess, log_d)
        by_data = np.exp(-beta * (fresh + np.log1p(amount)))
        d_log_d = slope / (1 + amount)
        z = (np.log(alpha * A) - np.log(beta * B) + beta * u) / alpha
        over = np.expm1(np.clip(x - z, 0.0, 50.0))
        amount_n, left, slope_n = worth(over, log_n)
        n = np.minimum(x, z) + np.log1p(amount_n)
        d_z = np.where(x > z, 1 - left * (1 + over) / (1 + amount_n), 0.0)
        by_size = np.exp(np.clip(-alpha * n, -200.0, 200.0))
        loss = np.maximum(E + A * by_size + B * by_data, _TINY)
        to_n = -alpha * A * by_size / loss
        to_z = to_n * d_z
        J = np.empty((len(theta), 7, len(x)))
        J[:, 0] = 1 / loss
        J[:, 1] = by_size / loss + to_z / (alpha * A)
        J[:, 2] = by_data / loss - to_z / (alpha * B)
        J[:, 3] = -A * n * by_size / loss + to_z * (1 / alpha - z) / alpha
        J[:, 4] = -B * (fresh + np.log1p(amount)) * by_data / loss + to_z * (u - 1 / beta) / alpha
        J[:, 5] = -beta * B * by_data / loss * d_log_d
        J[:, 6] = to_n * slope_n / (1 + amount_n)
        return np.log(loss), J

    return model


def broken_model(x: Float[np.ndarray, " n"]) -> Model:
    """theta = (a, b', c0, c1, log d1', log f1), x centred log; one break."""

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, b, c0, c1, d, log_f = (theta[:, i, None] for i in range(6))
        f = np.exp(log_f)
        z = (x - d) / f
        bend, share = np.logaddexp(0.0, z), 1.0 / (1.0 + np.exp(-np.clip(z, -500.0, 500.0)))
        curve = np.exp(np.clip(-c0 * x - c1 * f * bend, -200.0, 200.0))
        loss = np.maximum(a + b * curve, _TINY)
        J = np.empty((len(theta), 6, len(x)))
        J[:, 0], J[:, 1] = 1.0 / loss, curve / loss
        slope = b * curve / loss
        J[:, 2], J[:, 3] = -x * slope, -f * bend * slope
        J[:, 4], J[:, 5] = c1 * share * slope, -c1 * f * (bend - z * share) * slope
        return np.log(loss), J

    return model
