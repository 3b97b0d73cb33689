"""Probe frozen encoders of text against TF-IDF, random initialisation and the commonest class."""

import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Int64
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from selfsup.data.source import Source, Texts, check_roles, wrapped
from selfsup.encoders.text import TextEncoder
from selfsup.probe import logreg
from selfsup.probe.features import Device, Features
from selfsup.probe.report import ProbeResult, Score, publish
from selfsup.probe.sources import (
    check_averaged,
    check_labels,
    describe_data,
    describe_source,
    expect,
    expect_new,
    start_computing,
)
from selfsup.text.load import TextRun, batch_of, index_of, load_text_run, open_documents, print_notes

Pool = Literal["mean", "cls", "last"]
Baseline = Literal["majority", "tfidf", "random"]
TextWeights = Literal["trained", "ema"]

_LIBRARIES = ("selfsup", "torch", "scikit-learn", "numpy", "tokenizers")
_READ = 256
"""Documents read at a time."""


class Documents(NamedTuple):
    """Labelled documents as a model reads them, held in memory."""

    ids: list[Int64[np.ndarray, "_"]]
    """Special tokens around each, none longer than a row."""
    labels: Int64[np.ndarray, " n"]
    cut: Bool[np.ndarray, " n"]
    """Which were longer than a row."""

    @property
    def truncated(self) -> int:
        """How many were cut."""
        return int(self.cut.sum())


class TextSets(NamedTuple):
    """Documents to fit on and to score on."""

    train: Documents
    test: Documents
    classes: int
    about: dict[str, Any]
    """Where they are, and how many were cut; JSON values."""
    sources: tuple[Source, Source]


def main_text(
    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")],
    /,
    *,
    train: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    test: Annotated[str | None, tyro.conf.arg(metavar="SHARDS")] = None,
    pool: Pool | None = None,
    baselines: tuple[Baseline, ...] = ("majority", "tfidf", "random"),
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    weights: TextWeights = "trained",
    device: Device = "auto",
    threads: int | None = None,
    batch_size: int = 64,
    bf16: bool = False,
) -> None:
    """Classify documents by logistic regression on frozen features, beside TF-IDF and random weights.

    Several runs that differ in their seed give means and standard deviations. Documents longer than the
    model's rows are cut, and counted.

    Args:
        runs: run or checkpoint folders of one recipe.
        train: text or token shards with labels to fit on.
        test: text or token shards with labels to score on.
        pool: what a document's feature is: the mean over its tokens, the first, or the last; default: the run's
            encoder.pool.
        baselines: what to measure beside; TF-IDF wants text shards.
        out: JSON to write; default: a file of its own in RUN/probe, for the first run.
        weights: those of the last step, or their average over steps (optim.ema).
        device: auto: CUDA where there is one.
        threads: torch's threads in this process; default: as torch chooses.
        batch_size: documents per forward pass.
        bf16: compute features in bfloat16.
    """
    expect_new(out)
    expect(batch_size >= 1, "--batch-size", ">= 1", batch_size)
    expect(threads is None or threads >= 1, "--threads", ">= 1", threads)
    loaded = load_text_runs(runs, weights, pool)
    sets = open_sets(loaded[0], train, test)
    result = probe_text(loaded, sets, start_computing(device, threads), batch_size, bf16, baselines)
    publish(result, loaded[0], out, Console())


def load_text_runs(names: tuple[str, ...], weights: TextWeights, pool: Pool | None) -> list[TextRun]:
    """Runs fit to be averaged, pooling as asked for. Raises ValueError as `load_text_run` and `check_averaged`."""
    if not names:
        raise ValueError("probe: expected a run folder, got none")
    runs = [load_text_run(name, weights) for name in names]
    for run in runs:
        print_notes(run)
        if run.tokenizer.sha256 != runs[0].tokenizer.sha256:
            raise ValueError(
                f"{run.name}: has another tokenizer than {runs[0].name}: probe them one at a time"
            )
        set_pool(run.encoder, pool)
    check_averaged(runs)
    return runs


def set_pool(encoder: TextEncoder, pool: Pool | None) -> None:
    """What `features` are from now on. Raises ValueError for the first token of a causal encoder."""
    if pool == "cls" and encoder.config.causal:
        raise ValueError(
            "--pool cls: the first token has seen no other in a causal encoder; use mean or last"
        )
    if pool is not None:
        encoder.config = encoder.config.model_copy(update={"pool": pool})


def open_sets(run: TextRun, train: str | None, test: str | None) -> TextSets:
    """Both sets of documents, read and tokenised; says how many are cut.

    Raises ValueError for shards not given, as `open_documents`, and where labels are missing or do not belong
    together.
    """
    if train is None or test is None:
        raise ValueError("--train, --test: expected folders of shards with labels, text or tokens; give both")
    sources = (open_documents(run, train, "--train"), open_documents(run, test, "--test"))
    classes = check_labels(*map(index_of, sources))
    read = [read_documents(run, source, title) for source, title in zip(sources, ("train", "test"))]
    about = {}
    for name, shards, source, documents in zip(("train", "test"), (train, test), sources, read):
        index = index_of(source)
        about[name] = {**describe_data(shards, index), "unit": "documents", "truncated": documents.truncated}
        if documents.truncated:
            print(
                f"{name}: {documents.truncated:,} of {len(index):,} documents are longer than encoder.max_length "
                f"{run.max_length} and cut there"
            )
    return TextSets(*read, classes, about, sources)


def read_documents(run: TextRun, source: Source, title: str) -> Documents:
    """Every document, wrapped and cut as the run's rows are (`data.source.wrapped`), each tokenised once."""
    wrap, width = run.recipe.objective.wrap, run.max_length
    check_roles(run.tokenizer, wrap, masks=False)
    ids, cut = [], []
    bar = tqdm(total=len(source), desc=f"read {title}", unit="doc", disable=None)
    with bar:
        for start in range(0, len(source), _READ):
            numbers = np.arange(start, min(start + _READ, len(source)))
            # A token more than fits shows what is too long without tokenising it again.
            for found in wrapped(source, numbers, wrap, width + 1):
                long = len(found) > width
                cut.append(long)
                if long and wrap == "bert":
                    found = np.append(found[: width - 1], run.tokenizer.sep)
                ids.append(found[:width].astype(np.int64))
            bar.update(len(numbers))
    return Documents(ids, np.asarray(index_of(source).label), np.array(cut, dtype=bool))


def padded(documents: list[Int64[np.ndarray, "_"]]) -> Int64[Tensor, "b n"]:
    """Rows as long as the longest, -1 behind the others."""
    rows = np.full((len(documents), max(map(len, documents))), -1, dtype=np.int64)
    for row, ids in zip(rows, documents):
        row[: len(ids)] = ids
    return torch.from_numpy(rows)


def pooled(encoder: TextEncoder, rows: Int64[Tensor, "b n"]) -> Tensor:
    """Features (b, d) of `padded` documents."""
    hidden = rows < 0
    # What stands in a hidden place is seen by nobody; without one the kernels need no mask.
    ids = torch.where(hidden, -1, 0) if bool(hidden.any()) else None
    return encoder.features(batch_of(rows.clamp(min=0), document_ids=ids))


@torch.inference_mode()
def text_features(
    encoder: TextEncoder,
    documents: Documents,
    batch_size: int,
    device: torch.device,
    bf16: bool = False,
    title: str = "features",
) -> Features:
    """The encoder's feature of every document, float32 (n, d). Raises ValueError where one is not finite."""
    encoder.to(device).eval()
    values = np.empty((len(documents.ids), encoder.embed_dim), dtype=np.float32)
    order = by_length(documents.ids)  # so that a batch holds little padding
    with tqdm(total=len(order), desc=title, unit="doc", disable=None) as bar:
        for part in np.split(order, range(batch_size, len(order), batch_size)):
            rows = padded([documents.ids[i] for i in part]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                values[part] = pooled(encoder, rows).float().cpu().numpy()
            bar.update(len(part))
    broken = int((~np.isfinite(values).all(axis=1)).sum())
    if broken:
        raise ValueError(f"{title}: features of {broken} of {len(values)} documents are NaN or infinite")
    return Features(values, documents.labels)


def by_length(documents: list[Int64[np.ndarray, "_"]]) -> Int64[np.ndarray, " n"]:
    """The shortest first."""
    return np.argsort([len(ids) for ids in documents], kind="stable")


def random_text_encoder(run: TextRun) -> TextEncoder:
    """The encoder as it was before the run's first step. Leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(run.recipe.seed)
        encoder = run.recipe.encoder.build()
    set_pool(encoder, run.encoder.config.pool)
    return encoder.requires_grad_(False)


def probe_text(
    runs: list[TextRun],
    sets: TextSets,
    device: torch.device,
    batch_size: int = 64,
    bf16: bool = False,
    baselines: Iterable[Baseline] = ("majority", "tfidf", "random"),
) -> ProbeResult:
    """Accuracies of logistic regression on the runs' features and of the baselines asked for."""
    start, baselines = time.monotonic(), tuple(baselines)
    scores: dict[str, dict[str, Score]] = {}
    kinds: tuple[Baseline, ...] = ("majority", "tfidf", "random")
    left_out = {kind: "left out, not asked for" for kind in kinds if kind not in baselines}
    if "majority" in baselines:
        scores["majority"] = {"constant": Score((majority(sets.train.labels, sets.test.labels),))}
    sources = sets.sources
    if "tfidf" in baselines and all(isinstance(source, Texts) for source in sources):
        texts = [source.reader.texts(np.arange(len(source))) for source in sources]
        words = logreg.words_logreg(texts[0], sets.train.labels, texts[1], sets.test.labels)
        scores["tfidf"] = _score([words])
    elif "tfidf" in baselines:
        left_out["tfidf"] = "left out, token shards hold no words; give the text shards"

    def score(encoder: TextEncoder, title: str) -> logreg.LogregResult:
        features = (
            text_features(encoder, part, batch_size, device, bf16, f"{title}, features")
            for part in (sets.train, sets.test)
        )
        return logreg.logreg(*features, f"{title}, logistic regression")

    if "random" in baselines:
        fresh = map(random_text_encoder, runs)
        scores["random"] = _score([score(each, f"random {i + 1}") for i, each in enumerate(fresh)])
    scores["pretrained"] = _score([score(run.encoder, f"pretrained {i + 1}") for i, run in enumerate(runs)])
    return ProbeResult(
        probe="text",
        mode="fast",
        scores=scores,
        spread="runs",
        left_out=left_out,
        sources=tuple(map(describe_source, runs)),
        recipe={
            "features": f"frozen, {runs[0].encoder.config.pool} of a document's tokens, special ones among them",
            "max_length": runs[0].max_length,
            "computed_in": "bfloat16" if bf16 else "float32",
            "baselines": sorted(baselines),
            "logreg": logreg.RECIPE,
            "tfidf": logreg.WORDS_RECIPE,
        },
        data=sets.about,
        versions={library: version(library) for library in _LIBRARIES},
        seconds=time.monotonic() - start,
    )


def majority(train: Int64[np.ndarray, " n"], test: Int64[np.ndarray, " m"]) -> float:
    """Accuracy of always answering the commonest class of the training set, the first of equals."""
    return float((test == np.bincount(train).argmax()).mean())


def _score(results: list[logreg.LogregResult]) -> dict[str, Score]:
    details = [result._asdict() for result in results]
    return {"logreg": Score(tuple(each.pop("accuracy") for each in details), tuple(details))}
