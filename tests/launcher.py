"""`selfsup train` with a test's instruments: what a rank saw, float64, or a planted bug.

Run as a script it is one rank under torchrun. `serve` keeps one warm process that forks ranks on
request, so that a test of twenty kills does not import torch sixty times; the ranks are real
processes in their own process groups either way.
"""

import json
import os
import sys
import time
import traceback
import zlib
from pathlib import Path

import torch

import faults
import mutants
from selfsup import dist, opening, start, train
from selfsup.batch import TextBatch
from selfsup.ema import Ema
from selfsup.objectives.mae import MAE
from selfsup.sharding import local
from selfsup.train import main


def instrument(options: dict) -> None:
    """options: trace (a path: one JSON line a micro-batch and rank), float64, mutant (a name in mutants.py),
    delay (seconds before each micro-batch: time to be killed in), averages (a path: one CRC32 of the averaged
    weights a step and rank), kinds (a path: the types of the model and of its parameters, one file a rank),
    fault (a name in faults.py and its arguments)."""
    torch.set_num_threads(1)
    if options.get("float64"):
        torch.set_default_dtype(torch.float64)
    if options.get("mutant"):
        getattr(mutants, options["mutant"])()
    if options.get("delay"):
        slow_down(options["delay"])
    if options.get("trace"):
        trace(Path(options["trace"]))
    if options.get("fault"):
        for name, *arguments in options["fault"] if isinstance(options["fault"][0], list) else [options["fault"]]:
            getattr(faults, name)(*arguments)
    if options.get("kinds"):
        trace_kinds(Path(options["kinds"]))
    if options.get("averages"):
        trace_averages(Path(options["averages"]))


def slow_down(seconds: float) -> None:
    """Sleeps before each micro-batch."""
    original = start.open_batches

    def open_batches(*arguments):
        inner = original(*arguments)
        try:
            for batch in inner:
                time.sleep(seconds)
                yield batch
        finally:
            inner.close()

    start.open_batches = open_batches


def trace(path: Path) -> None:
    """Writes what enters the model: epoch, position and row of each sample, CRC32 of its pixels and its mask noise;
    of text its number of targets, and the CRC32 of its tokens, masks applied, and of all else about it."""
    opened: dict[str, object] = {}
    original_batches, original_noise = start.open_batches, MAE.noise

    def write(kind: str, rows: list) -> None:
        file = opened.setdefault("file", open(f"{path}.{dist.rank()}", "a"))  # noqa: SIM115
        file.write(json.dumps([kind, rows]) + "\n")
        file.flush()

    def open_batches(*arguments):
        inner = original_batches(*arguments)
        try:
            for batch in inner:
                if isinstance(batch, TextBatch):
                    content = text_rows(batch)
                else:
                    content = [zlib.crc32(image.numpy().tobytes()) for image in batch.images]
                write(
                    "batch",
                    list(zip(batch.epoch.tolist(), batch.position.tolist(), batch.index.tolist(), content)),
                )
                yield batch
        finally:
            inner.close()

    def noise(self, batch):
        drawn = original_noise(self, batch)
        write("noise", [zlib.crc32(row.numpy().tobytes()) for row in drawn])
        return drawn

    start.open_batches, MAE.noise = open_batches, noise


def text_rows(batch: TextBatch) -> list[tuple[int, int]]:
    """Number of targets and CRC32 of each row."""
    length, out = batch.tokens.shape[1], []
    columns = (batch.tokens, batch.document_ids, batch.positions, batch.token_types, batch.random_next)
    where = torch.arange(batch.tokens.numel()) if batch.where is None else batch.where
    for row in range(len(batch.tokens)):
        inside = where // length == row
        parts = [batch.labels[inside], where[inside] % length]
        parts += [column[row] for column in columns if column is not None]
        out.append((int(inside.sum()), zlib.crc32(b"".join(part.numpy().tobytes() for part in parts))))
    return out


def trace_kinds(path: Path) -> None:
    """Writes what the loop got: the wrapper's type, and each parameter's type and size on this rank."""
    original = opening.open_run

    def open_run(*arguments):
        opened = original(*arguments)
        named = dict(opened.objective.named_parameters())
        found = {name: [type(p).__name__, local(p).numel(), p.numel()] for name, p in named.items()}
        Path(f"{path}.{dist.rank()}").write_text(json.dumps([type(opened.model).__name__, found]))
        return opened

    train.open_run = open_run


def trace_averages(path: Path) -> None:
    """Writes what each rank holds as averaged weights after each update."""
    original = Ema.update

    def update(self, *arguments):
        original(self, *arguments)
        crc = 0
        for value in self.tensors.values():
            crc = zlib.crc32(value.numpy().tobytes(), crc)
        with open(f"{path}.{dist.rank()}", "a") as file:
            file.write(f"{crc}\n")

    Ema.update = update


def serve() -> None:
    """One JSON request a line on stdin: {arguments, ranks, port, options, log} forks, {wait: [pid]} reaps."""
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in request["wait"]]
            print(json.dumps(codes), flush=True)
            continue
        pids = []
        for rank in range(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                become_rank(rank, request)
            pids.append(pid)
        print(json.dumps(pids), flush=True)


def warm_up() -> None:
    """Imports what a run imports on its way."""
    import torchvision.transforms.v2  # noqa: F401


def become_rank(rank: int, request: dict) -> None:
    """Turns the forked process into one rank; never returns."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["ranks"] > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "LOCAL_WORLD_SIZE": request["ranks"],
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}  # fmt: skip
        os.environ.update({key: str(value) for key, value in names.items()})
    code = 1
    try:
        instrument(request["options"])
        code = main(request["arguments"])
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        instrument(json.loads(os.environ.get("SELFSUP_TEST", "{}")))
        sys.exit(dist.finish(main(sys.argv[1:])))
