"""A function on several ranks: forked processes in one gloo group, which costs a fraction of a second."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed

SECONDS = 100


def on_ranks(world: int, check: Callable[[], Any], folder: Path) -> list[Any]:
    """What `check` returns on each rank (numbers and the like; it is pickled). A rank that fails, fails the test."""
    context = multiprocessing.get_context("fork")
    store = folder / f"store-{world}-{os.urandom(4).hex()}"
    ends = [context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        context.Process(target=_rank, args=(rank, world, check, store, ends[rank][1]), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        answers = []
        for rank, (receiver, _) in enumerate(ends):
            assert receiver.poll(SECONDS), f"rank {rank} does not answer"
            fault, answer = receiver.recv()
            assert fault is None, f"rank {rank}:\n{fault}"
            answers.append(answer)
        return answers
    finally:
        for process in processes:
            process.terminate()  # those that wait for one that failed
            process.join()


def _rank(rank: int, world: int, check: Callable[[], Any], store: Path, sender: Connection) -> None:
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo", f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS)
        )
        answer = check()
        torch.distributed.barrier()
        sender.send((None, answer))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    finally:
        os._exit(0)  # nothing of the forked pytest may run
