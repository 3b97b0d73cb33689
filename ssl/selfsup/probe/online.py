"""The online monitor: is the encoder collapsing, and is it learning? Cheap numbers during training.

A fixed subset of the training images goes through the encoder every so often. The numbers say how
training goes, not how good the model is: they are of training data, and no test set is touched.
"""

import time

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from selfsup.batch import normalise
from selfsup.data.images import EvalImages
from selfsup.data.index import ShardIndex
from selfsup.data.order import sample_order
from selfsup.probe.features import Features
from selfsup.probe.representation import feature_std, rankme
from selfsup.recipe import Recipe

BANK, QUERIES = 1000, 500
"""Images that neighbours are looked for among, and images that are classified by them."""
MOST_BYTES = 2**28
"""Of decoded images held in memory; larger ones make the subset smaller."""

_BATCH = 128
_LEAST_LABELLED = 30
"""With fewer no kNN: a third are queries, and 20 neighbours are wanted."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fixed_rows(n: int, count: int) -> Int64[np.ndarray, " m"]:
    """`count` of `n` rows, or all where there are fewer, the same for every run whatever its seed.

    The first rows of a keyed permutation that no run trains in, so that fewer are a part of more.
    """
    return sample_order(0, 2**32 - 1, np.arange(min(n, count), dtype=np.int64), n, "shuffled")


def open_monitor(recipe: Recipe, index: ShardIndex | None, device: torch.device) -> "OnlineMonitor | None":
    """The monitor of a run, or None where there can be none. Prints what it measures, or why not.

    For rank 0 alone, through `dist.on_first_rank`: it raises ValueError for a sample that cannot be
    read or decoded.
    """
    if index is None:
        print("monitor    off: it needs to find its images again, and data.index is none", flush=True)
        return None
    if len(index) < 2:
        print("monitor    off: one image has no spread", flush=True)
        return None
    monitor = OnlineMonitor(recipe, index, device)
    print(f"monitor    {monitor.describe}", flush=True)
    return monitor


class OnlineMonitor:
    """Holds a fixed subset of the training images, and measures an encoder on it.

    Built before the loop, on rank 0 only; the other ranks wait for it in their next collective. At
    most 1,500 images, decoded once as the probes do (no augmentation) and held as uint8 in at most
    256 MiB: rows by `fixed_rows`, of the labelled ones where there are enough. A third of them are
    the queries of the kNN, which are not in its bank.
    """

    def __init__(self, recipe: Recipe, index: ShardIndex, device: torch.device) -> None:
        """Raises ValueError, naming shard and key, for a sample that cannot be read or decoded."""
        # scikit-learn: a second to import, only where used
        from selfsup.probe.knn import NEIGHBOURS, knn_accuracy

        self._knn, self._device = knn_accuracy, device
        self._mean, self._std = recipe.data.mean, recipe.data.std
        self._dtype = _DTYPES[recipe.precision.mixed]
        size, channels = recipe.encoder.img_size, recipe.encoder.in_chans
        labelled = np.flatnonzero(index.label >= 0)
        rows = labelled if len(labelled) >= _LEAST_LABELLED else np.arange(len(index))
        room = MOST_BYTES // (channels * size**2)
        self.rows = rows[fixed_rows(len(rows), max(2, min(BANK + QUERIES, room)))]
        self.bank = len(self.rows) - len(self.rows) // 3
        """The first so many of `rows` are the bank, the others the queries."""
        self._labels = index.label[self.rows]
        self._images = _decode(EvalImages(index, size, channels), self.rows)
        self._ended = time.perf_counter()
        self.classifies = (
            len(labelled) >= _LEAST_LABELLED and self.bank >= NEIGHBOURS and len(np.unique(self._labels)) > 1
        )
        """Whether `measure` gives a kNN accuracy."""

    @property
    def describe(self) -> str:
        """What is measured, one line."""
        held = (
            f"{len(self.rows)} training images ({self._images.numel() / 2**20:.1f} MiB): feature_std, rankme"
        )
        if not self.classifies:
            return f"{held}; no knn: it wants {_LEAST_LABELLED} labelled images of two classes among them"
        return f"{held}, knn of {len(self.rows) - self.bank} among the other {self.bank}; not a test set"

    def measure(self, encoder: nn.Module) -> dict[str, float]:
        """feature_std and rankme (see `probe.representation`), knn, and monitor_share.

        encoder: normalised images (b, c, h, w) -> features (b, d), on the monitor's device and not
        wrapped (DDP would wait for other ranks). knn: share of the queries that their 20 nearest in
        the bank classify rightly (see `probe.knn`), where there are labels. monitor_share: own wall
        time over all wall time since the last call. Where features are NaN or infinite there is
        only feature_nonfinite, the number of such images: they do not end the run.
        In eval mode, without gradients, in the run's number format; each module's training mode is
        put back. Draws no random numbers, so training goes on bit for bit as without it.
        """
        began = time.perf_counter()
        features = self._features(encoder)
        broken = len(features) - int(features.isfinite().all(dim=1).sum())
        if broken:
            values = {"feature_nonfinite": float(broken)}
        else:
            values = {"feature_std": feature_std(features), "rankme": rankme(features)}
            if self.classifies:
                bank = Features(features[: self.bank].numpy(), self._labels[: self.bank])
                queries = Features(features[self.bank :].numpy(), self._labels[self.bank :])
                values["knn"] = self._knn(bank, queries)
        ended = time.perf_counter()
        values["monitor_share"] = (ended - began) / (ended - self._ended)
        self._ended = ended
        return values

    def _features(self, encoder: nn.Module) -> Float32[Tensor, "n d"]:
        modes = [(module, module.training) for module in encoder.modules()]
        mixed = self._dtype != torch.float32
        parts = []
        encoder.eval()
        try:
            with torch.no_grad(), torch.autocast(self._device.type, self._dtype, enabled=mixed):
                for images in self._images.split(_BATCH):
                    inputs = normalise(images.to(self._device), self._mean, self._std)
                    parts.append(encoder(inputs).float().cpu())
        finally:
            for module, training in modes:  # one by one: a frozen part may have been in eval mode
                module.training = training
        return torch.cat(parts)


def _decode(images: EvalImages, rows: np.ndarray) -> Tensor:
    """uint8 (n, c, h, w)."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        batch = images.__getitems__(rows[start : start + _BATCH])
        if isinstance(batch, ValueError):
            raise batch
        parts.append(batch[0])
    return torch.cat(parts)
