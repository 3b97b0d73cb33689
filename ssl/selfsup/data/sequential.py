"""`data.index: none`: training straight from webdataset's own pipeline, where there is no index.

For shards that cannot be indexed, or to compare. What it cannot promise is in BROKEN_PROMISES and is
printed when training starts.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from selfsup.batch import ImageBatch
from selfsup.data.decode import decode_image
from selfsup.data.images import ImageData, make_batch
from selfsup.data.index import list_shards, local_folder
from selfsup.data.loader import load
from selfsup.data.order import BatchPlan
from selfsup.data.shard import IMAGE_EXTENSIONS, check_is_tar
from selfsup.data.views import ViewBatch
from selfsup.keyed import Purpose, random_bits

BROKEN_PROMISES = """\
data.index: none reads the shards as a stream. Without an index these promises do not hold:
- a resumed run does not go on with the same samples: the stream starts again, in another order;
- another number of processes or loader workers gives other batches;
- a sample is not seen exactly once per epoch: there are no epochs, and ranks differ in samples;
- a damaged shard is not always seen: webdataset reads some as shorter ones, in silence;
- samples without an image are passed over and not counted.
To have them, make an index (selfsup data index FOLDER) and set data.index: auto."""

_BUFFER = 1000
"""Encoded samples held by a worker to draw from, so that neighbours in a shard part."""


def sequential_batches(
    config: ImageData,
    seed: int,
    img_size: int,
    channels: int,
    plan: BatchPlan,
    workers: int,
    colours_on_device: bool = False,
) -> Iterator[ImageBatch | ViewBatch]:
    """This rank's micro-batches without end: uint8 images, index -1, epoch 0, positions that no two
    samples of a run share. Order and views follow from `seed`: a resumed run had better bring another.
    colours_on_device: see `make_batch`.

    Raises ValueError for a missing folder, for fewer shards than readers (ranks x workers), for
    what is not a plain tar, and, while iterating, for a sample that cannot be decoded.
    """
    # webdataset reads the variable when imported, which may have happened; both: no shell, no unpickling.
    os.environ["WDS_SECURE"] = "1"
    wds.utils.enforce_security = True
    folder = local_folder(config.shards)
    paths = list_shards(folder)
    readers = plan.world * max(1, workers)
    if len(paths) < readers:
        raise ValueError(
            f"{folder}: data.index: none needs a shard for each reader: {plan.world} processes x "
            f"{max(1, workers)} workers = {readers}, got {len(paths)} shards; use fewer workers "
            "(--run.workers), or make an index: selfsup data index"
        )
    for path in paths:
        check_is_tar(path)
    seen = wds.utils.pytorch_worker_info()[:2]
    if seen != (plan.rank, plan.world):
        raise ValueError(
            f"data.index: none: webdataset takes this for process {seen[0]} of {seen[1]}, expected "
            f"{plan.rank} of {plan.world}; unset RANK and WORLD_SIZE, or start with torchrun"
        )
    dataset = _Stream(
        config, seed, img_size, channels, plan, [str(path) for path in paths], colours_on_device
    )
    return load(dataset, None, workers, prefetch=2)


class _Stream(IterableDataset):
    """One reader's share of the shards, over and over, in finished micro-batches."""

    def __init__(
        self,
        config: ImageData,
        seed: int,
        img_size: int,
        channels: int,
        plan: BatchPlan,
        paths: list[str],
        colours_on_device: bool,
    ) -> None:
        self.config, self.seed, self.img_size, self.channels = config, seed, img_size, channels
        self.plan, self.paths, self.colours_on_device = plan, paths, colours_on_device

    def __iter__(self) -> Iterator[ImageBatch | ViewBatch | ValueError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.plan.rank * workers + number, self.plan.world * workers
        samples = iter(self._pipeline(reader))
        count = 0
        while True:
            counts = np.arange(count, count + self.plan.micro_batch, dtype=np.int64)
            try:
                images = [self._decode(next(samples)) for _ in range(self.plan.micro_batch)]
            except StopIteration:
                yield ValueError(f"data.shards: the shards of reader {reader} of {readers} hold no images")
                return
            except ValueError as error:
                yield error
                return
            yield self._batch(images, counts * readers + reader)
            count += self.plan.micro_batch

    def _pipeline(self, reader: int) -> Iterable[dict[str, Any]]:
        """Samples (still encoded) of this reader's shards without end; ends only where there are none."""
        seed = int(random_bits(self.seed, 0, np.array(reader), Purpose.ORDER, 1, view=48)[0])
        shuffle = self.config.order != "sequential"
        pipeline = wds.WebDataset(
            self.paths,
            nodesplitter=wds.split_by_node,
            workersplitter=wds.split_by_worker,
            shardshuffle=len(self.paths) if shuffle else False,
            detshuffle=shuffle,  # a plain seeded shuffle repeats the same order every epoch
            seed=seed,
            empty_check=False,  # an empty stream is reported by __iter__, in words of ours
        ).select(_has_image)
        if shuffle:
            pipeline = pipeline.compose(wds.filters.detshuffle(_BUFFER, _BUFFER, seed))
        return pipeline.repeat()

    def _decode(self, sample: dict[str, Any]) -> np.ndarray:
        # Our own decoder on an allowlist of extensions; webdataset's .decode() would unpickle.
        data = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
        return decode_image(data, self.channels, f"{sample['__url__']}: {sample['__key__']}")

    def _batch(self, images: list[np.ndarray], position: np.ndarray) -> ImageBatch | ViewBatch:
        epoch, rows = np.zeros_like(position), np.full_like(position, -1)
        return make_batch(
            self.config, self.seed, epoch, position, rows, images, self.img_size, self.colours_on_device
        )


def _has_image(sample: dict[str, Any]) -> bool:
    return any(extension in sample for extension in IMAGE_EXTENSIONS)
