"""The online monitor: is the model collapsing, and is it learning? Cheap numbers during training.

A fixed subset of the training images goes through the encoder every so often. The numbers say how
training goes, not how good the model is: they are of training data, and no test set is touched.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from selfsup.batch import normalise
from selfsup.data.images import EvalImages
from selfsup.data.index import ShardIndex
from selfsup.data.order import sample_order
from selfsup.data.rows import Rows
from selfsup.data.views import augment
from selfsup.probe.features import Features
from selfsup.probe.representation import alignment, feature_std, rankme, uniformity
from selfsup.recipe import Recipe

BANK, QUERIES = 1000, 500
"""Images that neighbours are looked for among, and images that are classified by them."""
PAIRS = 250
"""Images that are also looked at in two views."""
COLLAPSED_STD, COLLAPSED_RANK = 0.05, 1.2
"""Features or embeddings with a smaller feature_std, or a smaller rankme once centred, are collapsed."""
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


def open_monitor(
    recipe: Recipe, index: ShardIndex | Rows | None, device: torch.device
) -> "OnlineMonitor | None":
    """The monitor of a run, or None where there can be none. Prints what it measures, or why not.

    For rank 0 alone, through `dist.on_first_rank`: it raises ValueError for a sample that cannot be
    read or decoded.
    """
    if isinstance(index, Rows):
        print("monitor    off: it measures encoders of images, this is one of text", flush=True)
        return None
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
        self._pairs = _two_views(recipe, self._images[:PAIRS], self.rows[:PAIRS])
        self.similarities: dict[str, Tensor] = {}
        """Of the last measurement: cosines between embeddings of views, by name."""
        self._ended = time.perf_counter()
        self.classifies = (
            len(labelled) >= _LEAST_LABELLED and self.bank >= NEIGHBOURS and len(np.unique(self._labels)) > 1
        )
        """Whether `measure` gives a kNN accuracy."""

    @property
    def describe(self) -> str:
        """What is measured, one line."""
        held = (
            f"{len(self.rows)} training images ({self._images.numel() / 2**20:.1f} MiB): spread, rank, "
            f"two views of {len(self._pairs) // 2}"
        )
        if not self.classifies:
            return f"{held}; no knn: it wants {_LEAST_LABELLED} labelled images of two classes among them"
        return f"{held}, knn of {len(self.rows) - self.bank} among the other {self.bank}; not a test set"

    def measure(self, encoder: nn.Module, projector: nn.Module | None = None) -> dict[str, float]:
        """What the encoder makes of the images, in plain numbers.

        encoder: normalised images (b, c, h, w) -> features (b, d), on the monitor's device and not
        wrapped (DDP would wait for other ranks); projector: features -> the embeddings that the loss
        compares, none: the features themselves.

        feature_std, rankme (see `probe.representation`) of features, and with a projector
        embedding_std, embedding_rankme; alignment and uniformity of the embeddings of two views, whose
        cosines are left in `similarities`; knn: share of the queries that their 20 nearest in the bank
        classify rightly (see `probe.knn`), where there are labels; collapsed: 1 or 0 (see `collapsed`);
        monitor_share: own wall time over all wall time since the last call. Where features are NaN or
        infinite there is only feature_nonfinite, the number of such images: they do not end the run.
        In eval mode, without gradients, in the run's number format; each module's training mode is
        put back. Draws no random numbers, so training goes on bit for bit as without it.
        """
        began = time.perf_counter()
        model = nn.ModuleList([encoder, projector or nn.Identity()])
        features, embeddings = self._run(model, self._images)
        _, pairs = self._run(model, self._pairs)
        broken = _not_finite(torch.cat([features, embeddings], dim=1)) or _not_finite(pairs)
        if broken:
            values, self.similarities = {"feature_nonfinite": float(broken)}, {}
        else:
            values = {"feature_std": feature_std(features), "rankme": rankme(features)}
            if projector is not None:
                values |= {"embedding_std": feature_std(embeddings), "embedding_rankme": rankme(embeddings)}
            values |= self._compare(*pairs.chunk(2))
            judged = [features] if projector is None else [features, embeddings]
            values["collapsed"] = float(any(map(collapsed, judged)))
            if self.classifies:
                bank = Features(features[: self.bank].numpy(), self._labels[: self.bank])
                queries = Features(features[self.bank :].numpy(), self._labels[self.bank :])
                values["knn"] = self._knn(bank, queries)
        ended = time.perf_counter()
        values["monitor_share"] = (ended - began) / (ended - self._ended)
        self._ended = ended
        return values

    def _compare(self, a: Float32[Tensor, "n d"], b: Float32[Tensor, "n d"]) -> dict[str, float]:
        cosines = F.normalize(a) @ F.normalize(b).T  # (n, n)
        other = ~torch.eye(len(a), dtype=torch.bool)
        self.similarities = {"cosine/same image": cosines.diag(), "cosine/another image": cosines[other]}
        return {"alignment": alignment(a, b), "uniformity": uniformity(a)}

    def _run(
        self, model: nn.ModuleList, images: Tensor
    ) -> tuple[Float32[Tensor, "n d"], Float32[Tensor, "n e"]]:
        """Features and embeddings of uint8 images."""
        encoder, projector = model
        modes = [(module, module.training) for module in model.modules()]
        mixed = self._dtype != torch.float32
        features, embeddings = [], []
        model.eval()
        try:
            with torch.no_grad(), torch.autocast(self._device.type, self._dtype, enabled=mixed):
                for part in images.split(_BATCH):
                    found = encoder(normalise(part.to(self._device), self._mean, self._std))
                    features.append(found.float().cpu())
                    embeddings.append(projector(found).float().cpu())
        finally:
            for module, training in modes:  # one by one: a frozen part may have been in eval mode
                module.training = training
        return torch.cat(features), torch.cat(embeddings)


def collapsed(features: Float32[Tensor, "n d"]) -> bool:
    """Whether features are nearly the same for every image, or nearly all on one line.

    The first by `feature_std`, the second by `rankme` once they are centred: a common mean, which RankMe
    counts as a direction, says nothing of an image. Runs collapsed on purpose end at 0.00 to 0.04 in
    std, young healthy ones lie above 0.09 (tests/probe/test_collapse.py); a good kNN accuracy of the
    features says nothing of the embeddings, which collapse first. Two rows, and numbers in one dimension,
    lie on a line whatever they say: of them the first alone is asked.
    """
    if feature_std(features) < COLLAPSED_STD:
        return True
    centred = features.double() - features.double().mean(dim=0)
    return min(len(features) - 1, features.shape[1]) > 1 and rankme(centred) < COLLAPSED_RANK


def _not_finite(features: Tensor) -> int:
    """The number of rows with a NaN or an infinity."""
    return int((~features.isfinite()).any(dim=1).sum())


def _decode(images: EvalImages, rows: np.ndarray) -> Tensor:
    """uint8 (n, c, h, w)."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        batch = images.__getitems__(rows[start : start + _BATCH])
        if isinstance(batch, ValueError):
            raise batch
        parts.append(batch[0])
    return torch.cat(parts)


def _two_views(recipe: Recipe, images: Tensor, rows: np.ndarray) -> Tensor:
    """Two training views of each image, drawn as the recipe says but for an epoch that no run reaches:
    uint8 (2 n, c, s, s), first views first."""
    size = recipe.encoder.img_size
    kinds = recipe.data.kinds(size)
    pixels = list(images.permute(0, 2, 3, 1).numpy())
    epoch = np.full(len(rows), 2**32 - 1, dtype=np.int64)
    views = [(kinds[0], 0), (kinds[min(1, len(kinds) - 1)], 1)]
    return torch.cat([augment(kind, recipe.seed, epoch, rows, pixels, size, number) for kind, number in views])
