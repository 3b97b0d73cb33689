import numpy as np
import pytest
import torch

from data.text_making import make_tokenizer
from mutants import exec_changed
from selfsup import cli
from selfsup.data.index import open_shards
from selfsup.data.reader import ShardReader
from selfsup.text import fill as module
from selfsup.text.fill import blanked_ids, blanked_rows, fill, grade, masked_model
from selfsup.text.load import load_text_run
from text.making import text_run, text_shards, token_shards, word_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("fill"), word_tokenizer()
    texts = text_shards(folder / "texts", 40)
    tokens = token_shards(texts, folder / "tokens", tokenizer)
    run = text_run(folder / "mlm", "mlm", tokenizer, str(tokens))
    causal = text_run(folder / "clm", "clm", tokenizer, str(tokens))
    return {"texts": str(texts), "tokens": str(tokens), "mlm": str(run), "clm": str(causal), "folder": folder}


def run_cli(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["selfsup", "fill", *map(str, arguments)])
    return cli.main()


def test_guesses_are_the_models_likeliest_tokens(files):
    run = load_text_run(files["mlm"])
    model, tokenizer = masked_model(run), run.tokenizer
    ids = blanked_ids(run, "the [MASK] and its cast")
    words = tokenizer.encode(["the and its cast"])[0].tolist()
    assert ids.tolist() == [2, words[0], 4, *words[1:], 3]
    lines = fill(run, model, "the [MASK] and its cast", 3).splitlines()
    states = model.head(model.encoder(torch.from_numpy(ids)[None])[0, 2])
    chances = (states @ model.word_weights.T + model.head.bias).softmax(dim=0)
    best = chances.topk(3)
    for i, p in zip(best.indices.tolist(), best.values.tolist()):
        assert f"{100 * p:.0f}%" in lines[1]
        assert (tokenizer.decode([i]).strip() or tokenizer.token(i)) in lines[1]
    assert "the ____ and its cast" in lines[1] and len(lines) == 2


def test_a_byte_level_blank_takes_its_space_along(tmp_path):
    tokenizer = make_tokenizer("bpe")
    run = load_text_run(str(text_run(tmp_path / "bpe", "mlm", tokenizer)))
    ids = blanked_ids(run, "the lazy [MASK] jumps").tolist()
    before, after = (tokenizer.encode([part])[0].tolist() for part in ("the lazy", " jumps"))
    assert ids == [2, *before, 4, *after, 3]


def test_grades_are_those_of_a_slow_loop(files):
    run = load_text_run(files["mlm"])
    model = masked_model(run)
    found = grade(run, model, files["tokens"], 60, 3, 0)
    data, right, nll = blanked_rows(run, files["tokens"], 0), [], []
    for cursor in range(found.rows):
        batch = data.batch(np.array([cursor]))
        tokens = batch.tokens.clone()
        assert (tokens.flatten()[batch.where] == run.tokenizer.mask).all()
        states = model.head(model.encoder(tokens)[0])
        scores = (states @ model.word_weights.T + model.head.bias).log_softmax(dim=-1)
        for place, label in zip(batch.where.tolist(), batch.labels.tolist()):
            right.append(label in scores[place].topk(5).indices.tolist())
            nll.append(-scores[place, label].item())
    assert found.targets == len(right) >= 60
    assert found.top5 == pytest.approx(np.mean(right))
    assert found.nll == pytest.approx(np.mean(nll), rel=1e-5)
    assert found.top1 <= found.top5
    assert len(found.table.splitlines()) == 1 + 12


def test_blanks_shown_stand_where_they_were_taken(files):
    run = load_text_run(files["mlm"])
    data, tokenizer = blanked_rows(run, files["texts"], 0), run.tokenizer
    whole = [" ".join(tokenizer.token(i) for i in ids) for ids in _originals(data)]
    for graded, holds in (
        (grade, True),
        (exec_changed(module, "grade", "number * _ROWS * batch", "number * batch"), False),
    ):
        table = graded(run, masked_model(run), files["texts"], 10**6, 1, 0).table.splitlines()[1:]
        assert all(_restored(line) in " ; ".join(whole) for line in table) == holds


def _originals(data) -> list[list[int]]:
    batch = data.batch(np.arange(len(data.rows)))
    tokens = batch.tokens.flatten()
    tokens[batch.where] = batch.labels
    return tokens.reshape(batch.tokens.shape).tolist()


def _restored(line: str) -> str:
    """`truth  guess p%  left ____ right` -> the token and one neighbour, as far as they are not blanked."""
    truth, text = line.split()[0], line.split("%", 1)[1].split()
    at = text.index("____")
    left, right = text[at - 1 : at] if at else [], text[at + 1 : at + 2]
    return " ".join([*(w for w in left if w != "[MASK]"), truth, *(w for w in right if w != "[MASK]")])


def test_the_same_blanks_for_every_run_another_seed_others(files):
    run = load_text_run(files["mlm"])
    batches = [blanked_rows(run, files["tokens"], seed).batch(np.arange(4)) for seed in (0, 0, 1)]
    assert torch.equal(batches[0].tokens, batches[1].tokens)
    assert not torch.equal(batches[0].tokens, batches[2].tokens)


def test_the_command_fills_and_grades(files, monkeypatch, capsys):
    assert run_cli(monkeypatch, files["mlm"], "the [MASK]", "its [MASK] cast [MASK]", "--best", 2) == 0
    assert capsys.readouterr().out.count("____") == 3
    assert run_cli(monkeypatch, files["mlm"]) == 0
    printed = capsys.readouterr().out
    assert "what the run trained on" in printed and "right at first guess" in printed
    assert "fewer than --targets 2000: these are all rows there are" in printed
    assert run_cli(monkeypatch, files["mlm"], "--shards", files["texts"], "--targets", 20) == 0
    printed = capsys.readouterr().out
    assert "what the run trained on" not in printed and "packing pad" in printed and "graded are cut" in printed


def test_how_documents_lie_in_rows_and_how_many_are_cut(files):
    run = load_text_run(files["mlm"])
    found = grade(run, masked_model(run), files["texts"], 10**6, 1, 0)
    reader = ShardReader(open_shards(files["texts"], "text"))
    lengths = [len(ids) + 2 for ids in run.tokenizer.encode(reader.texts(np.arange(40)))]
    assert found.rows == 40 and found.cut == sum(length > run.max_length for length in lengths) > 0
    assert "40 rows of 16 tokens, packing pad, from 40 documents" in found.packed
    tokens = grade(run, masked_model(run), files["tokens"], 60, 1, 0)
    assert tokens.cut is None and "packing concat" in tokens.packed


@pytest.mark.parametrize(
    "run, arguments, message",
    [
        ("clm", ["the [MASK]"], "selfsup generate"),
        ("mlm", ["the film"], "expected a [MASK] where the blank is"),
        ("mlm", ["the [MASK] " + "film " * 20], "expected at most encoder.max_length 16 tokens"),
        ("mlm", ["the [MASK]", "--shards", "somewhere"], "--shards: expected no TEXT beside it"),
        ("mlm", ["the [MASK]", "--targets", "2000"], "--targets: expected no TEXT beside it"),
        ("mlm", ["the [MASK]", "--seed", "0"], "--seed: expected no TEXT beside it"),
        ("mlm", ["--best", "0"], "--best: expected 1 to 50"),
        ("mlm", ["the [MASK]", "--best", "51"], "--best: expected 1 to 50"),
        ("mlm", ["--shards", "nowhere-at-all"], "--shards: no such folder: nowhere-at-all"),
    ],
)
def test_what_makes_no_sense_is_one_line(files, monkeypatch, capsys, run, arguments, message):
    assert run_cli(monkeypatch, files[run], *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_pictures_and_pages_are_not_for_text(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["selfsup", "look", files["mlm"]])
    assert cli.main() == 2
    error = capsys.readouterr().err
    assert "expected images; for text: selfsup fill" in error and error.count("\n") == 1
