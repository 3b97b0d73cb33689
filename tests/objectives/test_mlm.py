"""Masked language modelling's parts against slow loops and closed forms, and the table that it shows."""

import math

import pytest
import torch
import torch.nn.functional as F

from mutants import exec_changed
from selfsup.objectives import mlm
from selfsup.objectives.blanks import blanks_table, pick_targets, spell
from text_runs import batch_of, build, masked, shaken, tokenizer

EACH = [3, 1, 0, 5]
PAIRS = {"encoder": {"token_types": 2, "post_norm": True, "embed_norm": True}, "next_sentence": True}


def slow_loss(model, batch, total):
    """Over targets one by one, from rows that are encoded alone."""
    encoder, length, out = model.encoder, batch.tokens.shape[1], 0.0
    for label, place in zip(batch.labels.tolist(), batch.where.tolist()):
        r = place // length
        types = None if batch.token_types is None else batch.token_types[r : r + 1]
        state = encoder(batch.tokens[r : r + 1], token_types=types)[0, place % length]
        x = F.gelu(model.head.dense.weight @ state + model.head.dense.bias)
        x = (x - x.mean()) / (x.var(unbiased=False) + model.head.norm.eps).sqrt()
        x = x * model.head.norm.weight + model.head.norm.bias
        words = encoder.token_embed.weight if model.head.decoder is None else model.head.decoder.weight
        scores = [words[v] @ x + model.head.bias[v] for v in range(encoder.config.vocab_size)]
        out = out - (scores[label] - torch.stack(scores).exp().sum().log()) / total
    return out


def slow_pairs(model, batch):
    """The next-sentence loss, row by row."""
    out, head = 0.0, model.next_sentence
    for r, answer in enumerate(batch.random_next.tolist()):
        cls = model.encoder(batch.tokens[r : r + 1], token_types=batch.token_types[r : r + 1])[0, 0]
        scores = head.score.weight @ torch.tanh(head.dense.weight @ cls + head.dense.bias) + head.score.bias
        out = out - (scores[answer] - scores.exp().sum().log()) / batch.global_batch
    return out


def gradients(model, loss):
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def check_equal(model, loss, right):
    assert abs(loss - right) < 1e-12
    ours, theirs = gradients(model, loss), gradients(model, right)
    assert ours.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_loss_and_its_gradient_equal_a_slow_loop(tied, chunk):
    model, batch = shaken("mlm", tied=tied, chunk=chunk), masked(EACH)
    out = model(batch, 30.0)
    assert out.metrics == {}
    check_equal(model, out.loss, slow_loss(model, batch, 30.0))


def pairs_batch(**rest):
    second = (torch.arange(20) >= torch.tensor([[5], [9], [13], [2]])).long()
    return masked(EACH, token_types=second, random_next=torch.tensor([1, 0, 0, 1]), **rest)


def test_next_sentence_is_a_mean_over_the_global_batch_beside_that_over_tokens():
    model, batch = shaken("mlm", **PAIRS), pairs_batch(global_batch=12)
    out = model(batch, 30.0)
    tokens, pairs = slow_loss(model, batch, 30.0), slow_pairs(model, batch)
    check_equal(model, out.loss, tokens + pairs)
    assert out.metrics.keys() == {"mlm_loss", "next_sentence_loss"}
    assert (
        abs(out.metrics["mlm_loss"] - tokens) < 1e-12
        and abs(out.metrics["next_sentence_loss"] - pairs) < 1e-12
    )
    assert not any(value.requires_grad for value in out.metrics.values())


def part(batch, rows, length=20):
    """Some rows of a batch, as a micro-batch of the same global batch."""
    inside = (batch.where >= rows.start * length) & (batch.where < rows.stop * length)
    cut = {k: v[rows] for k, v in batch._asdict().items() if torch.is_tensor(v) and v.shape[:1] == (4,)}
    where = batch.where[inside] - rows.start * length
    return batch._replace(**{**cut, "labels": batch.labels[inside], "where": where})


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1), (2, 2)])
def test_micro_batches_add_up_to_the_global_batch(sizes):
    """With other numbers of targets in each, and with none in one."""
    model, batch = shaken("mlm", **PAIRS), pairs_batch()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [part(batch, slice(s, s + n)) for s, n in zip(starts, sizes)]
    assert sorted(p.targets for p in parts) != [parts[0].targets] * len(parts)
    check_equal(model, sum(model(p, 9.0).loss for p in parts), model(batch, 9.0).loss)


MUTANTS = {
    "mean over the micro-batch": ("global_mean(nll, total)", "nll / len(batch.labels)"),
    "places of the next row": ("[batch.where]", "[batch.where.roll(1)]"),
    "head forgotten": ("self.head(chosen)", "chosen"),
    "bias forgotten": ("self.head.bias, batch.labels", "None, batch.labels"),
    "pairs over the micro-batch": ("batch.global_batch)", "len(batch.tokens))"),
    "pairs from the last token": ("states[:, 0]", "states[:, -1]"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, mutant):
    monkeypatch.setattr(mlm.MLM, "forward", exec_changed(mlm, "MLM.forward", *MUTANTS[mutant]))
    with pytest.raises(AssertionError):
        test_next_sentence_is_a_mean_over_the_global_batch_beside_that_over_tokens()


def test_the_head_on_chosen_places_equals_the_head_on_all():
    model, batch = shaken("mlm", {"activation": "gelu_tanh", "norm": "rms"}), masked(EACH)
    everywhere = model.logits(batch._replace(where=None))
    assert everywhere.shape == (80, 70) and model.logits(batch).shape == (9, 70)
    assert torch.allclose(everywhere[batch.where], model.logits(batch), rtol=1e-12)
    right = F.cross_entropy(everywhere[batch.where], batch.labels, reduction="sum") / 9
    check_equal(model, model(batch, 9.0).loss, right)


@pytest.mark.parametrize("encoder", [{}, {"init": "bert", "post_norm": True, "embed_norm": True}])
@pytest.mark.parametrize("tied", [True, False])
def test_at_the_start_the_loss_is_the_logarithm_of_the_vocabulary(encoder, tied):
    model, batch = build("mlm", encoder, tied=tied), masked([10] * 8)
    assert model(batch, 80.0).loss.item() == pytest.approx(math.log(70), rel=0.03)
    pairs = build("mlm", **PAIRS)(pairs_batch(), 9.0).metrics["next_sentence_loss"]
    assert pairs.item() == pytest.approx(math.log(2), rel=0.03)


@pytest.mark.parametrize("tied", [True, False])
def test_padded_rows_of_the_vocabulary_are_out_of_it(tied):
    """70 tokens in 128 rows: the others get no gradient and no score; tied, the first 70 are the head's too."""
    model, batch = shaken("mlm", tied=tied), masked(EACH)
    assert model.encoder.token_embed.weight.shape[0] == 128
    assert model.head.bias.shape == (70,) and model.logits(batch).shape[1] == 70
    before = model(batch, 9.0).loss
    gradient = gradients(model, before)["encoder.token_embed.weight"]
    with_targets = batch.tokens[[0, 1, 3]]
    read = torch.zeros(128, dtype=torch.bool).index_fill(0, with_targets.unique(), True)
    assert not gradient[70:].any()
    assert torch.equal(gradient[:70].any(1), torch.ones(70, dtype=torch.bool) if tied else read[:70])
    with torch.no_grad():
        model.encoder.token_embed.weight[70:] = 1e6
    assert model(batch, 9.0).loss == before
    names = {name for name, _ in model.named_parameters() if "decoder" in name}
    assert names == (set() if tied else {"head.decoder.weight"})


def test_a_batch_without_targets_costs_nothing_and_reaches_every_parameter():
    model, batch = shaken("mlm"), masked([0, 0])
    out = model(batch, 7.0)
    found = gradients(model, out.loss)
    assert out.loss == 0 and found.keys() == dict(model.named_parameters()).keys()
    assert not any(g.any() for g in found.values())


@pytest.mark.parametrize("training", [True, False])
def test_shown_is_a_table_and_leaves_the_mode_as_it_was(training):
    letters = tokenizer()
    ids = torch.tensor(
        [letters.encode([text])[0].tolist() for text in ("the quick brown", "fox jumps over ")]
    )
    batch = batch_of(ids.index_fill(1, torch.tensor([4]), letters.mask), ids[:, 4], torch.tensor([4, 19]))
    model = build("mlm", {"vocab_size": letters.vocab_size, "dropout": 0.5}).train(training)
    table = model.shown(batch, letters)
    assert model.training is training and model.encoder.blocks[0].training is training
    assert table == model.shown(batch, letters)  # without dropout
    head, *lines = table.splitlines()
    assert head.split() == ["truth", "guesses", "text"]
    scores = model.eval().logits(batch).softmax(-1)
    for line, truth, row in zip(lines, "qj", scores, strict=True):
        best = row.argsort(descending=True)[:3].tolist()
        guesses = "  ".join(f"{spell(letters, [i])} {100 * row[i]:.0f}%" for i in best)
        assert line.split()[0] == truth and guesses in line
    assert lines[0].endswith(" the  ____ uick bro") and lines[1].endswith(" fox  ____ umps ove")


def test_targets_to_show():
    where = torch.tensor([0, 3, 4, 9, 21, 22, 23, 24, 25, 41])
    assert pick_targets(where, 10, 4, 3).tolist() == [0, 1, 3, 4, 6, 8]  # rows 0 and 2; row 4 is beyond
    assert pick_targets(where[:0], 10, 4, 3).tolist() == []


def test_a_table_of_blanks():
    letters = tokenizer()
    ids = torch.tensor([letters.encode(["the quick brown fox"])[0].tolist()])
    q, place, row = ids[0, 4], torch.tensor([4]), ids.clone()
    row[0, 6] = letters.sep
    logits = torch.full((1, letters.vocab_size), -20.0)
    logits[0, q], logits[0, letters.mask] = 2.0, 2.0 + math.log(3)
    known = blanks_table(row, place, q[None], logits, letters, best=2)
    assert known.splitlines() == [
        "truth  guesses            text", "q      [MASK] 75%  q 25%  the  ____ u [SEP] ck bro"
    ]  # fmt: skip
    unknown = blanks_table(row, place, None, logits, letters, after=False, best=2)
    assert unknown.splitlines() == ["guesses            text", "[MASK] 75%  q 25%  the  ____"]
    assert len(blanks_table(row, place[:0], None, logits[:0], letters).splitlines()) == 1


@pytest.mark.parametrize(
    "encoder,options,words",
    [
        ({"causal": True}, {}, "encoder.causal: expected false, mlm predicts a token from both sides"),
        ({}, {"next_sentence": True}, "encoder.token_types: expected at least 2"),
        ({}, {"mask_share": 0.8, "random_share": 0.3}, "random_share: expected at most 0.2"),
        ({}, {"mask_ratio": 1.0}, "mask_ratio"),
        ({}, {"chunk": 0}, "chunk"),
    ],
)
def test_refusals(encoder, options, words):
    with pytest.raises(ValueError, match=words):
        build("mlm", encoder, **options)


def test_masking_goes_from_the_first_ratio_to_the_last():
    config = build("mlm", mask_ratio=0.3, final_mask_ratio=0.1, whole_word=True).config
    masking = config.masking(100)
    assert [masking.at(s) for s in (0, 50, 100, 200)] == pytest.approx(
        [0.3, 0.2, 0.1, 0.1]
    ) and masking.whole_word
    assert build("mlm").config.masking(10)[:6] == (0.15, 0.15, 10, False, 0.8, 0.1)
