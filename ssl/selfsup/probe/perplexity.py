"""How well a model predicts text: perplexity and bits per byte of a causal one, pseudo-perplexity of a masked one."""

import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from jaxtyping import Int64
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from selfsup.checkpoint import weights_suffix, weights_title
from selfsup.data.source import Source, Texts, check_roles
from selfsup.durable import write_atomically
from selfsup.objectives.clm import CLM
from selfsup.objectives.mlm import MLM
from selfsup.probe.features import Device
from selfsup.probe.nll import causal_nll, pseudo_nll
from selfsup.probe.online import fixed_rows
from selfsup.probe.report import PERPLEXITY, short_hash
from selfsup.probe.sources import (
    describe_data,
    describe_source,
    expect,
    expect_new,
    run_folder,
    start_computing,
)
from selfsup.probe.text import TextWeights
from selfsup.text.load import (
    TextRun,
    byte_lengths,
    index_of,
    load_text_run,
    open_documents,
    print_notes,
)

PSEUDO_DOCUMENTS = 200
"""Of pseudo-perplexity, unless said otherwise: a document of n tokens takes n forward passes."""
_READ = 256
_LIBRARIES = ("selfsup", "torch", "numpy", "tokenizers")


def main_perplexity(
    run: Annotated[str, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    test: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    documents: int | None = None,
    stride: int | None = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    weights: TextWeights = "trained",
    device: Device = "auto",
    threads: int | None = None,
    batch_size: int = 32,
    bf16: bool = False,
) -> None:
    """Measure how well a run predicts text that it has not seen.

    Causal (clm): all documents end to end, each followed by [SEP]; every token but the first is predicted
    once. Rows begin every `stride` tokens; a token sees those of its row before it, and is counted in the first
    row that reaches it. Bits per byte are over the documents' UTF-8 bytes: the bits of predicting [SEP] are
    counted, bytes for it are not. Runs that read documents one by one are measured so (no bits per byte then,
    since a document's first token is never predicted).

    Masked (mlm): pseudo-perplexity (Salazar et al. 2020): each token of a document masked in turn, and predicted
    from all others; documents longer than a row are cut, and counted.

    Args:
        run: run or checkpoint folder.
        test: text or token shards.
        documents: how many are taken, at random but the same for every run; default: all, or 200 of mlm.
        stride: tokens from row to row, at most encoder.max_length, the default; fewer give more context: all
            but the first row's tokens see at least max_length - stride tokens. Causal models only.
        out: JSON to write; default: a file of its own in RUN/probe.
        weights: those of the last step, or their average over steps (optim.ema).
        device: auto: CUDA where there is one.
        threads: torch's threads in this process; default: as torch chooses.
        batch_size: rows per forward pass.
        bf16: compute in bfloat16 (autocast); the sums are float64 either way.
    """
    expect_new(out)
    expect(batch_size >= 1, "--batch-size", ">= 1", batch_size)
    expect(threads is None or threads >= 1, "--threads", ">= 1", threads)
    expect(documents is None or documents >= 1, "--documents", ">= 1", documents)
    loaded = load_text_run(run, weights)
    print_notes(loaded)
    if test is None:
        raise ValueError("--test: expected a folder of text or token shards; give one")
    if stride is not None:
        causal = isinstance(loaded.objective, CLM)
        expect(causal, "--stride", "a causal model, this one is masked: leave it out", stride)
        top = loaded.max_length
        expect(1 <= stride <= top, "--stride", f"1 to encoder.max_length {top}", stride)
    target = start_computing(device, threads)
    result = perplexity(loaded, test, target, documents, stride, batch_size, bf16)
    print_perplexity(result, Console())
    _write(result, loaded, out)


def perplexity(
    run: TextRun,
    test: str,
    device: torch.device,
    documents: int | None = None,
    stride: int | None = None,
    batch_size: int = 32,
    bf16: bool = False,
) -> dict[str, Any]:
    """What `main_perplexity` prints and writes, JSON values. Raises ValueError for what it cannot measure."""
    began, model = time.monotonic(), run.to(device).objective
    source = open_documents(run, test, "--test")
    masked = isinstance(model, MLM)
    check_roles(run.tokenizer, run.recipe.objective.wrap, masks=masked)
    wanted = PSEUDO_DOCUMENTS if documents is None and masked else documents
    numbers = np.arange(len(source)) if wanted is None else np.sort(fixed_rows(len(source), wanted))
    tokens = read_tokens(source, numbers)
    read = np.array([len(ids) > 0 for ids in tokens])
    bytes_ = int(byte_lengths(source)[numbers[read]].sum())  # of what is scored
    about: dict[str, Any] = {
        "documents": len(numbers), "empty": sum(not len(ids) for ids in tokens),
        "unknown": int(sum((ids == run.tokenizer.unk).sum() for ids in tokens)),
    }  # fmt: skip
    tokens = [ids for ids in tokens if len(ids)]
    if not tokens:
        raise ValueError(f"--test {test}: its documents hold no token")
    if isinstance(model, CLM):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = causal_nll(model, tokens, run.tokenizer.sep, stride, run.separate, batch_size)
        how = {"measure": "perplexity", "stride": stride or run.max_length, "one_by_one": run.separate}
        bits = None if run.separate else found.nll / math.log(2) / bytes_
        how |= {"bytes": bytes_, "bits_per_byte": bits}
    else:
        most = run.max_length - 2
        about["truncated"] = sum(len(ids) > most for ids in tokens)
        special = (run.tokenizer.cls, run.tokenizer.sep, run.tokenizer.mask)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = pseudo_nll(model, [ids[:most] for ids in tokens], special, batch_size)
        how = {"measure": "pseudo-perplexity"}
    if not math.isfinite(found.nll):
        raise ValueError(f"{run.name}: its predictions on {test} are NaN or infinite")
    mean = found.nll / found.tokens
    return {
        **how,
        "nll": mean,
        "perplexity": math.exp(mean) if mean < 700 else None,
        "tokens": found.tokens,
        **about,
        "max_length": run.max_length,
        "batch_size": batch_size,
        "computed_in": "bfloat16" if bf16 else "float32",
        "source": describe_source(run),
        "data": {**describe_data(test, index_of(source)), "unit": "documents"},
        "versions": {library: version(library) for library in _LIBRARIES},
        "seconds": time.monotonic() - began,
    }


def read_tokens(source: Source, numbers: Int64[np.ndarray, " n"]) -> list[Int64[np.ndarray, "_"]]:
    """All tokens of each document, without special ones."""
    if not isinstance(source, Texts):
        return [source.document(number) for number in numbers]
    parts = np.split(numbers, range(_READ, len(numbers), _READ))
    return [ids for part in tqdm(parts, desc="read", disable=None) for ids in source.read(part)]


def print_perplexity(result: dict[str, Any], console: Console) -> None:
    """The table, and what was cut, left out or unknown."""
    source, data = result["source"], result["data"]
    caption = f"{result['tokens']:,} tokens of {result['documents']:,} documents"
    table = Table(
        title=f"{source['name']}{weights_title(source['weights'])} on {data['shards']}", caption=caption
    )
    for column in ("measure", "nll, nats a token", "perplexity", "bits per byte"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    value, bits = result["perplexity"], result.get("bits_per_byte")
    cells = "beyond e^700" if value is None else f"{value:.2f}", "-" if bits is None else f"{bits:.4f}"
    table.add_row(result["measure"], f"{result['nll']:.4f}", *cells)
    console.print(table)
    for line in remarks(result):
        console.print(line, markup=False, highlight=False)


def remarks(result: dict[str, Any]) -> list[str]:
    """What a reader of the number must know."""
    lines = []
    if result["documents"] < result["data"]["samples"]:
        lines.append(f"{result['documents']:,} of {result['data']['samples']:,} documents, chosen by key")
    if result.get("truncated"):
        lines.append(f"{result['truncated']:,} documents cut at max_length {result['max_length']}")
    if result["empty"]:
        lines.append(f"{result['empty']:,} documents without a token left out")
    if result["unknown"]:
        lines.append(f"{result['unknown']:,} tokens of the documents are [UNK], which is easy to predict")
    if result.get("one_by_one"):
        lines.append(
            "documents one by one, as in training; their first tokens are not predicted: no bits per byte"
        )
    return lines


def _write(result: dict[str, Any], run: TextRun, out: Path | None) -> None:
    folder = run_folder(run)
    if out is None and folder is None:
        print("no JSON written: the model has no run folder; name a file with --out")
        return
    how = [result["data"]["fingerprint"], result["computed_in"], result["documents"], result.get("stride")]
    stem = f"{PERPLEXITY}{run.checkpoint.name}-{short_hash(how)}{weights_suffix(run.weights)}"
    path = out or folder / "probe" / f"{stem}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(result, indent=1, allow_nan=False).encode())
    except OSError as error:
        raise ValueError(f"{path}: cannot write the result: {error.strerror or error}") from error
    print(f"written to {path}")
