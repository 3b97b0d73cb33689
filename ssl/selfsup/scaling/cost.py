"""What a run costs, C = (base + extra N^-power) N D, where the table gives C and N and D.

6 N D leaves out what grows more slowly than N: attention costs as N^(2/3) at one context, an embedding that is not
counted in N as N^(1/3). Their share falls as a power of N, and C / (N D) ends at a constant.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize_scalar

CONSTANT = 0.01
"""C / (N D) that varies by no more is taken as one number."""


class Cost(NamedTuple):
    """C / (N D) = base + extra N^-power; `off`: the largest relative error of it in the table."""

    base: float
    extra: float = 0.0
    power: float = 1.0
    off: float = 0.0

    def per(self, params: float | Float[np.ndarray, "..."]) -> np.ndarray:
        """FLOPs per parameter and sample at sizes N."""
        return np.asarray(self.base + self.extra * np.power(params, -self.power))

    def growth(self, params: float | Float[np.ndarray, "..."]) -> np.ndarray:
        """d log C / d log N at one D: 1 where C is proportional to N."""
        return np.asarray(1.0 - self.power * (1.0 - self.base / self.per(params)))


def fit_cost(
    params: Float[np.ndarray, " n"], samples: Float[np.ndarray, " n"], flops: Float[np.ndarray, " n"],
    constant: float,
) -> Cost:  # fmt: skip
    """The cost of measured runs, by least squares of relative errors; `constant` where C / (N D) is one number.

    Also where no curve with base > 0 that grows with N is nearer than the constant: `off` then says by how much it errs.
    """
    ratio = flops / (params * samples)
    flat = Cost(constant, off=float(np.abs(constant / ratio - 1).max()))
    if ratio.max() <= (1 + CONSTANT) * ratio.min() or len(np.unique(params)) < 3:
        return flat

    def at(power: float) -> tuple[float, np.ndarray]:
        columns = np.stack([np.ones(len(ratio)), (params / params.min()) ** -power], axis=1) / ratio[:, None]
        z, *_ = np.linalg.lstsq(columns, np.ones(len(ratio)), rcond=None)
        return float(((columns @ z - 1) ** 2).sum()), z

    power = float(minimize_scalar(lambda p: at(p)[0], bounds=(0.1, 1.0), method="bounded").x)
    error, z = at(power)
    curve = Cost(float(z[0]), float(z[1] * params.min() ** power), power)
    curve = curve._replace(off=float(np.abs(curve.per(params) / ratio - 1).max()))
    grows = curve.base > 0 and (curve.per(params) > 0).all() and (curve.growth(params) > 0).all()
    return curve if grows and error < float(((constant / ratio - 1) ** 2).sum()) else flat
