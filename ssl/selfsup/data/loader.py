"""Worker processes that make batches: what every data set's loader shares."""

import atexit
import signal
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset


def load(dataset: Dataset, batches: Iterable[np.ndarray] | None, workers: int, prefetch: int) -> Iterator:
    """What `dataset` makes of each of `batches` (None: it is an iterable one), by `workers` processes.

    A ValueError that the data set yields is raised. Closing the iterator ends the workers.
    """
    assert (batches is None) == isinstance(dataset, IterableDataset)
    on_linux = sys.platform == "linux"
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        batch_size=1 if batches is not None else None,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="fork" if workers and on_linux else None,
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from the global generator, which is training's
    )
    iterator = iter(loader)
    if workers:
        # At exit multiprocessing sends SIGTERM to what is left and waits; our workers ignore it, so a
        # run that died of an error, its traceback still holding this frame, would never end.
        atexit.register(iterator._shutdown_workers)
    try:
        for batch in iterator:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a loader process died ({error}); go on with selfsup train --resume") from error
    finally:
        if workers:
            iterator._shutdown_workers()  # now, not when the garbage collector comes by
            atexit.unregister(iterator._shutdown_workers)


def _as_is(batch: object) -> object:
    return batch


def _init_worker(worker: int) -> None:
    """A signal goes to the whole process group: the loop answers it, the workers serve on until closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
