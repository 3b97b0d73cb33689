"""DINO's weighted nearest-neighbour classifier (Caron et al. 2021, sec. 4.1), by scikit-learn."""

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from selfsup.probe.features import Features

NEIGHBOURS = 20
TEMPERATURE = 0.07

RECIPE = {
    "name": "weighted kNN (scikit-learn)",
    "k": NEIGHBOURS,
    "temperature": TEMPERATURE,
    "similarity": "cosine",
    "vote": "exp(similarity / temperature)",
}


def knn_accuracy(
    train: Features, test: Features, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> float:
    """Share of `test` classified rightly, 0..1, by the k nearest of `train` in cosine similarity.

    Each neighbour votes for its label with exp(similarity / temperature); no training, no random
    numbers. float32 (n, d) features, labels >= 0. A feature of zeros has similarity 0 to all.
    Raises ValueError for fewer than k training samples.
    """
    if len(train.labels) < k:
        raise ValueError(f"kNN: expected at least k = {k} training samples, got {len(train.labels)}")

    def votes(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / temperature)  # 1 - cosine similarity

    model = KNeighborsClassifier(k, metric="cosine", weights=votes).fit(train.values, train.labels)
    return float(model.score(test.values, test.labels))
