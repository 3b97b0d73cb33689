"""Nearest neighbours by cosine similarity."""

import numpy as np
from jaxtyping import Float, Float64, Int64


def cosine(queries: Float[np.ndarray, "q d"], bank: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, "q n"]:
    """Cosine similarity of each query with each row of the bank, in float64. Zeros are similar to nothing."""
    return _unit(queries) @ _unit(bank).T


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def nearest(
    similarity: Float64[np.ndarray, "q n"], k: int, itself: Int64[np.ndarray, " q"]
) -> Int64[np.ndarray, "q k"]:
    """The columns of the k most similar, best first, equal ones by column.

    itself: the column that is the query itself and does not count; -1 for none. Raises ValueError
    where fewer than k remain.
    """
    remaining = similarity.shape[1] - int((itself >= 0).any())
    if k > remaining:
        raise ValueError(f"neighbours: expected at most {remaining}, as many as there are others, got {k}")
    distance = -similarity
    asked = np.flatnonzero(itself >= 0)
    distance[asked, itself[asked]] = np.inf
    return np.argsort(distance, axis=1, kind="stable")[:, :k]
