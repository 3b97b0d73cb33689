"""Text batches: the same for any workers, processes and micro-batches, after a resume too; and what is in them."""

import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.making import write_tar
from data.text_making import TEXTS, make_tokenizer, make_tokens
from mutants import exec_changed
from selfsup.batch import TextBatch
from selfsup.data import text
from selfsup.data.index import build_index, save_index
from selfsup.data.mask_tokens import Masking
from selfsup.data.order import BatchPlan, sample_order
from selfsup.data.rows import TextData, open_rows
from selfsup.data.text import train_text

LENGTH, SEED = 16, 5
MASKING = Masking(0.2, 0.4, 10, False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    draw = np.random.default_rng(0)
    docs = [draw.integers(5, 60, draw.integers(1, 40)).tolist() for _ in range(50)]
    folder = tmp_path_factory.mktemp("text") / "tokens"
    return docs, make_tokens(docs, folder, make_tokenizer(vocab_size=90), [i % 3 - 1 for i in range(50)])


def batches_of(corpus, plan, count, start=0, workers=0, masking=MASKING, wrap="bert", **config):
    settings = TextData(shards=str(corpus[1].folder), **config)
    rows = open_rows(settings, LENGTH, wrap, masking is None)
    stream = train_text(settings, rows, SEED, plan, start, workers, masking)
    taken = list(islice(stream, count))
    stream.close()
    return rows, taken


def samples(batch: TextBatch) -> list[tuple]:
    """Row by row, all that a model learns of it."""
    b, length = batch.tokens.shape
    where = torch.arange(b * length) if batch.where is None else batch.where
    out = []
    for row in range(b):
        own = where // length == row
        per_row = (batch.tokens, batch.document_ids, batch.positions, batch.token_types, batch.random_next)
        out.append((
            int(batch.epoch[row]), int(batch.position[row]), int(batch.index[row]),
            [None if part is None else part[row].tolist() for part in per_row],
            (where[own] % length).tolist(), batch.labels[own].tolist(),
        ))  # fmt: skip
    return out


def global_batches(corpus, world, micro, workers=0, batches=12, start=0, **config) -> list[list[tuple]]:
    plans = [BatchPlan(8, micro, rank, world) for rank in range(world)]
    each = plans[0].accumulation
    streams = [batches_of(corpus, p, batches * each, start, workers, **config)[1] for p in plans]
    out = []
    for first in range(0, batches * each, each):
        parts = [stream[m] for m in range(first, first + each) for stream in streams]
        assert {part.global_batch for part in parts} == {8}
        out.append([sample for part in parts for sample in samples(part)])
    return out


VARIANTS = {
    "mlm concat": {},
    "mlm bestfit": {"packing": "bestfit", "document_mask": True},
    "mlm words": {"packing": "pad", "masking": MASKING._replace(whole_word=True)},
    "mlm pairs": {"packing": "pairs"},
    "clm concat": {"masking": None, "wrap": "gpt"},
    "clm bestfit": {"masking": None, "wrap": "gpt", "packing": "bestfit", "document_mask": True},
}


# Workers are the same code for all variants: two show it.
LAYOUTS = [(v, *w) for v in VARIANTS for w in [(1, 2, 0), (2, 2, 0), (4, 2, 0)]]
LAYOUTS += [(v, *w) for v in ("mlm concat", "clm bestfit") for w in [(1, 2, 1), (1, 8, 2), (4, 1, 1)]]


@pytest.mark.parametrize(("variant", "world", "micro", "workers"), LAYOUTS)
def test_the_same_global_batches(corpus, variant, world, micro, workers):
    config = VARIANTS[variant]
    assert global_batches(corpus, world, micro, workers, **config) == global_batches(corpus, 1, 8, **config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resume_is_the_tail(corpus, variant):
    through = global_batches(corpus, 1, 4, **VARIANTS[variant])
    resumed = global_batches(corpus, 2, 2, start=5 * 8, batches=7, **VARIANTS[variant])
    assert resumed == through[5:]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("epoch, position,\n", "epoch, np.arange(len(cursors)),\n"),  # the place in the micro-batch
        ("cursors // self.global_batch", "cursors // len(cursors)"),  # the rate by micro-batches
    ],
)
def test_planted_bugs_are_caught(corpus, monkeypatch, old, new):
    right = global_batches(corpus, 1, 8)
    monkeypatch.setattr(text.TrainText, "batch", exec_changed(text, "TrainText.batch", old, new))
    assert global_batches(corpus, 2, 2) != right


def test_masks_differ_between_epochs(corpus):
    rows, batches = batches_of(corpus, BatchPlan(4, 4, 0, 1), 40, packing="bestfit", order="sequential")
    seen: dict[int, set] = {}
    for sample in (s for batch in batches for s in samples(batch)):
        seen.setdefault(sample[2], set()).add(tuple(sample[4]))
    twice = [places for row, places in seen.items() if row < 160 - len(rows)]
    assert len(twice) > 10 and np.mean([len(places) > 1 for places in twice]) > 0.9


def transformers_repeats_its_masks(seed: int) -> bool:
    """Whether transformers' collator masks two epochs alike, with one worker."""
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer()._prompts, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    rows = [{"input_ids": list(range(5, 60))} for _ in range(8)]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.15, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(rows, 4, num_workers=1, collate_fn=collate, multiprocessing_context="fork")
        first, second = ([batch["labels"] for batch in loader] for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_transformers_collator_repeats_its_masks_and_ours_does_not(corpus):
    """transformers#36357's seed: workers are made anew each epoch, and so is their generator."""
    pytest.importorskip("transformers")
    assert transformers_repeats_its_masks(seed=1)

    rows, batches = batches_of(
        corpus, BatchPlan(1, 1, 0, 1), 100, workers=1, packing="pad", order="sequential",
        masking=MASKING._replace(last_ratio=0.2),
    )  # fmt: skip
    assert len(rows) == 50
    first, second = ([b.where.tolist() for b in batches[e * 50 : e * 50 + 50]] for e in range(2))
    assert (
        np.mean([a != b for a, b in zip(first, second)]) > 0.8
    )  # documents of a few tokens leave little choice


# ---- what is in a batch ---------------------------------------------------------------------------


MLM = [
    (p, m) for p in ("concat", "bestfit", "pad", "pairs") for m in (False, True) if (p, m) != ("pairs", True)
]


@pytest.mark.parametrize(("packing", "document_mask"), MLM)
def test_mlm_batches_against_a_naive_loop(corpus, packing, document_mask):
    rows, batches = batches_of(
        corpus, BatchPlan(8, 4, 0, 1), 30, packing=packing, document_mask=document_mask
    )
    cursor = 0
    for number, batch in enumerate(batches):
        ids = batch.tokens.clone().reshape(-1)
        ids[batch.where] = batch.labels
        ids = ids.reshape(batch.tokens.shape)
        assert batch.tokens.shape == (4, LENGTH) and batch.targets == len(batch.labels)
        assert (batch.where.diff() > 0).all()
        for i in range(4):
            epoch, position = divmod(cursor, len(rows))
            assert (int(batch.epoch[i]), int(batch.position[i])) == (epoch, position)
            index = int(sample_order(SEED, epoch, np.array([position]), len(rows), "shuffled")[0])
            row = rows.row(SEED, epoch, index)
            assert int(batch.index[i]) == index and ids[i].tolist() == row.ids.tolist()
            real = row.document >= 0
            chosen = int((batch.where // LENGTH == i).sum())
            rate = 0.2 + 0.2 * min(1, number // 2 / 10)
            maskable = int((real & (row.ids >= 5)).sum())
            assert chosen == min(maskable, max(1, int(rate * real.sum() + 0.5)))
            hides = packing != "concat" or document_mask
            assert (batch.document_ids is None) == (not hides) and (batch.positions is None) == (
                not document_mask
            )
            expected = [-1 if d < 0 else d if document_mask else 0 for d in row.document.tolist()]
            if hides:
                assert batch.document_ids[i].tolist() == expected
            if document_mask:
                places, last, count = [], None, 0
                for d in row.document.tolist():
                    count = count + 1 if d == last else 0
                    last = d
                    places.append(0 if d < 0 else count)
                assert batch.positions[i].tolist() == places
            if packing == "pairs":
                assert batch.token_types[i].tolist() == row.second.tolist()
                assert int(batch.random_next[i]) == row.random_next
            else:
                assert batch.token_types is None and batch.random_next is None
            cursor += 1


@pytest.mark.parametrize("packing", ["concat", "bestfit", "pad"])
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("wrap", ["gpt", "bert"])
def test_labels_are_the_next_tokens(corpus, packing, document_mask, wrap):
    check_next_tokens(corpus, packing, document_mask, wrap)


def check_next_tokens(corpus, packing, document_mask, wrap) -> None:
    rows, batches = batches_of(
        corpus,
        BatchPlan(4, 4, 0, 1),
        30,
        masking=None,
        wrap=wrap,
        packing=packing,
        document_mask=document_mask,
    )
    for batch in batches:
        where, labels = [], []
        for i in range(4):
            row = rows.row(SEED, int(batch.epoch[i]), int(batch.index[i]))
            assert batch.tokens[i].tolist() == row.ids[:-1].tolist()
            for j in range(LENGTH):
                here, there = row.document[j], row.document[j + 1]
                if there >= 0 and (not document_mask or here == there):
                    where.append(i * LENGTH + j)
                    labels.append(int(row.ids[j + 1]))
        if packing == "concat" and not document_mask:
            assert batch.where is None and batch.document_ids is None and len(labels) == 4 * LENGTH
        else:
            assert batch.where.tolist() == where
        assert batch.labels.tolist() == labels
        if document_mask:  # the next token is at the next place of the same document
            follows = batch.where[(batch.where % LENGTH) < LENGTH - 1]
            flat = batch.document_ids.reshape(-1)
            assert torch.equal(flat[follows], flat[follows + 1])


def test_labels_across_documents_are_caught(corpus, monkeypatch):
    """The planted bug: the last token of a document learns the first of the next."""
    mutant = exec_changed(text, "TrainText._next", "if self.rows.document_mask", "if False")
    monkeypatch.setattr(text.TrainText, "_next", mutant)
    with pytest.raises(AssertionError):
        check_next_tokens(corpus, "bestfit", True, "gpt")


def test_whole_words_of_a_tokenizer_without_words(tmp_path):
    tokenizer = make_tokenizer("char")
    index = make_tokens([[6] * 40], tmp_path / "t", tokenizer)
    settings = TextData(shards=str(index.folder))
    rows = open_rows(settings, LENGTH, "bert", False)
    with pytest.raises(ValueError, match="whole words"):
        train_text(settings, rows, 0, BatchPlan(1, 1, 0, 1), 0, 0, MASKING._replace(whole_word=True))


def test_whole_words_are_whole(tmp_path):
    tokenizer = make_tokenizer(vocab_size=120)
    docs = [ids.tolist() for ids in tokenizer.encode(TEXTS)]
    corpus = docs, make_tokens(docs, tmp_path / "t", tokenizer)
    goes_on = ~tokenizer.starts_word
    _, batches = batches_of(
        corpus, BatchPlan(3, 3, 0, 1), 40, packing="pad", masking=Masking(0.4, 0.4, 1, True)
    )
    apart = 0
    for batch in batches:
        ids = batch.tokens.clone().reshape(-1)
        ids[batch.where] = batch.labels
        chosen = set(batch.where.tolist())
        for place, token in enumerate(ids.tolist()):
            if goes_on[token] and token >= 5:
                assert (place in chosen) == (place - 1 in chosen)
                apart += 1
    assert apart > 100


def test_moving_to_a_device_and_no_global_generator(corpus):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    settings = TextData(shards=str(corpus[1].folder), packing="bestfit")
    _, (batch,) = batches_of(corpus, BatchPlan(4, 4, 0, 1), 1, packing="bestfit", workers=1)
    moved = settings.to(batch, torch.device("cpu"))
    assert samples(moved) == samples(batch) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_text_stops_training_and_is_named(tmp_path, workers):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_tar(folder / "t.tar", [(f"{i}.txt", t.encode()) for i, t in enumerate(TEXTS)])
    save_index(build_index(folder, 1))
    (tmp_path / "tokenizer.json").write_text(make_tokenizer().json)
    settings = TextData(shards=str(folder), packing="pad", tokenizer=str(tmp_path / "tokenizer.json"))
    rows = open_rows(settings, LENGTH, "bert", False)
    plan = BatchPlan(3, 3, 0, 1)
    stream = train_text(settings, rows, 0, plan, 0, workers, MASKING)
    assert next(stream).tokens.shape == (3, LENGTH)
    stream.close()
    data = bytearray((folder / "t.tar").read_bytes())
    data[520] ^= 1
    (folder / "t.tar").write_bytes(data)
    stream = train_text(settings, rows, 0, plan, 0, workers, MASKING)
    with pytest.raises(ValueError, match="t.tar: 0: shard altered or damaged"):
        next(stream)
