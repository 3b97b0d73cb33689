"""Causal language modelling's parts against slow loops and closed forms, and the table that it shows."""

import math

import pytest
import torch
import torch.nn.functional as F

from mutants import exec_changed
from selfsup.objectives import clm
from selfsup.objectives.blanks import spell
from text_runs import batch_of, build, shaken, tokenizer

ROWS, LENGTH = 3, 20


def next_tokens(lengths: list[list[int]] | None = None, vocab: int = 70):
    """Random rows and what follows each token; lengths: documents of each row, masked, then padding."""
    ids = torch.randint(5, vocab, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    if lengths is None:
        return batch_of(ids[:, :-1], ids[:, 1:].flatten(), None)
    document = torch.full((ROWS, LENGTH + 1), -1)
    positions, where = torch.zeros_like(document), []
    for r, row in enumerate(lengths):
        at = 0
        for number, length in enumerate(row):
            document[r, at : at + length], positions[r, at : at + length] = number, torch.arange(length)
            where += [r * LENGTH + i for i in range(at, at + length - 1)]
            at += length
    where = torch.tensor(where, dtype=torch.long)
    labels = ids[:, 1:].flatten()[where]
    return batch_of(ids[:, :-1], labels, where, document[:, :-1], positions=positions[:, :-1])


PACKED = [[6, 9, 6], [1, 4], [20]]


def slow_loss(model, batch, total, z_loss=0.0):
    """Over targets one by one: the document so far, alone, through the encoder. Loss and cross-entropy."""
    where = range(batch.tokens.numel()) if batch.where is None else batch.where.tolist()
    loss = nll = 0.0
    for label, place in zip(batch.labels.tolist(), where, strict=True):
        r, column = divmod(place, LENGTH)
        first = 0 if batch.positions is None else column - int(batch.positions[r, column])
        state = model.encoder(batch.tokens[r : r + 1, first : column + 1])[0, -1]
        words = model.encoder.token_embed.weight if model.decoder is None else model.decoder.weight
        scores = torch.stack([words[v] @ state for v in range(model.encoder.config.vocab_size)])
        denominator = scores.exp().sum().log()
        nll = nll + (denominator - scores[label]) / total
        loss = loss + (denominator - scores[label] + z_loss * denominator**2) / total
    return loss, nll


def check_equal(model, loss, right):
    assert abs(loss - right) < 1e-12
    ours, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, right))
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11), name


@pytest.mark.parametrize("lengths", [None, PACKED])
@pytest.mark.parametrize(
    "tied,z_loss,encoder",
    [
        (True, 0.0, {}),
        (False, 0.01, {"norm": "rms", "activation": "swiglu", "bias": False, "num_kv_heads": 1}),
    ],
)
def test_the_loss_and_its_gradient_equal_a_slow_loop(lengths, tied, z_loss, encoder):
    model, batch = shaken("clm", encoder, tied=tied, z_loss=z_loss, chunk=7), next_tokens(lengths)
    out = model(batch, 90.0)
    loss, nll = slow_loss(model, batch, 90.0, z_loss)
    check_equal(model, out.loss, loss)
    assert out.metrics.keys() == ({"nll"} if z_loss else set())
    assert all(abs(value - nll) < 1e-12 and not value.requires_grad for value in out.metrics.values())


MUTANTS = {
    "mean over the micro-batch": ("global_mean(loss, total)", "loss / len(batch.labels)"),
    "the token itself": ("batch.labels, config.chunk", "batch.tokens.flatten()[batch.where], config.chunk"),
    "the place before": ("states[batch.where]", "states[batch.where - 1]"),
    "z-loss forgotten": (", config.z_loss\n", "\n"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, mutant):
    monkeypatch.setattr(clm.CLM, "forward", exec_changed(clm, "CLM.forward", *MUTANTS[mutant]))
    with pytest.raises(AssertionError):
        test_the_loss_and_its_gradient_equal_a_slow_loop(PACKED, True, 0.01, {})


def test_every_place_equals_naming_all_of_them():
    model, batch = shaken("clm"), next_tokens()
    named = batch._replace(where=torch.arange(ROWS * LENGTH))
    right = F.cross_entropy(model.logits(model.encoder.encode(batch)).flatten(0, 1), batch.labels)
    check_equal(model, model(batch, 60.0).loss, right)
    assert model(named, 60.0).loss == model(batch, 60.0).loss


def test_rows_with_other_numbers_of_targets_add_up():
    model, batch = shaken("clm"), next_tokens(PACKED)
    total = 0.0
    for r in range(ROWS):
        inside = batch.where // LENGTH == r
        row = {
            k: v[r : r + 1]
            for k, v in batch._asdict().items()
            if k in ("tokens", "document_ids", "positions")
        }
        row |= {"where": batch.where[inside] - r * LENGTH, "labels": batch.labels[inside]}
        total = total + model(batch._replace(**row), float(batch.targets)).loss
    check_equal(model, total, model(batch, float(batch.targets)).loss)


@pytest.mark.parametrize("tied", [True, False])
def test_at_the_start_the_loss_is_the_logarithm_of_the_vocabulary(tied):
    model = build("clm", tied=tied, z_loss=1e-3)
    out = model(next_tokens(), 60.0)
    assert out.metrics["nll"].item() == pytest.approx(math.log(70), rel=0.03)
    assert out.loss.item() == pytest.approx(math.log(70) + 1e-3 * math.log(70) ** 2, rel=0.03)


@pytest.mark.parametrize("tied", [True, False])
def test_padded_rows_of_the_vocabulary_are_out_of_it(tied):
    model, batch = shaken("clm", tied=tied), next_tokens()
    before = model(batch, 60.0).loss
    (gradient,) = torch.autograd.grad(before, model.encoder.token_embed.weight)
    read = torch.zeros(128, dtype=torch.bool).index_fill(0, batch.tokens.unique(), True)
    assert not gradient[70:].any() and model.logits(model.encoder.encode(batch)).shape == (ROWS, LENGTH, 70)
    assert torch.equal(gradient[:70].any(1), torch.ones(70, dtype=torch.bool) if tied else read[:70])
    with torch.no_grad():
        model.encoder.token_embed.weight[70:] = 1e6
    assert model(batch, 60.0).loss == before
    assert ("decoder.weight" in model.state_dict()) is not tied


def test_a_batch_without_targets_costs_nothing_and_reaches_every_parameter():
    model, batch = shaken("clm", tied=False), next_tokens([[1, 1], [], [1]])
    assert batch.targets == 0
    out = model(batch, 7.0)
    found = torch.autograd.grad(out.loss, list(model.parameters()))
    assert out.loss == 0 and not any(g.any() for g in found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_shown_is_a_table_and_leaves_the_mode_as_it_was(training, named):
    """Truth, guesses and what was read before the place, the last token of the row among them."""
    letters = tokenizer()
    texts = ("the quick brown fox jum", "pack my box with five d")
    ids = torch.tensor([letters.encode([text])[0].tolist() for text in texts])
    where = torch.tensor([0, 7, 14, 21, 22, 43]) if named else None
    labels = ids[:, 1:].flatten()
    batch = batch_of(ids[:, :-1], labels if where is None else labels[where], where)
    model = build("clm", {"vocab_size": letters.vocab_size, "max_length": 22, "dropout": 0.5}).train(training)
    table = model.shown(batch, letters)
    assert model.training is training and model.encoder.blocks[0].training is training
    assert table == model.shown(batch, letters)  # without dropout
    head, *lines = table.splitlines()
    assert head.split() == ["truth", "guesses", "text"] and len(lines) == (6 if named else 8)
    scores = model.eval().logits(model.encoder.encode(batch)).softmax(-1)
    columns = [0, 7, 14, 21]
    expected = [(0, c) for c in columns] + [(1, c) for c in ((0, 21) if named else columns)]
    for line, (r, c) in zip(lines, expected, strict=True):
        best = scores[r, c].argsort(descending=True)[:3].tolist()
        assert "  ".join(f"{spell(letters, [i])} {100 * scores[r, c, i]:.0f}%" for i in best) in line
        read = letters.decode(ids[r, max(0, c - 7) : c + 1].tolist())
        assert line.endswith(f"{read} ____") and line.startswith(spell(letters, [int(ids[r, c + 1])]))


@pytest.mark.parametrize(
    "encoder,options,words",
    [
        ({"causal": False}, {}, "encoder.causal: expected true, clm may not see the token it predicts"),
        ({"pool": "cls"}, {}, "encoder.pool: expected mean or last"),
        ({}, {"z_loss": -1}, "z_loss"),
    ],
)
def test_refusals(encoder, options, words):
    with pytest.raises(ValueError, match=words):
        build("clm", encoder, **options)
