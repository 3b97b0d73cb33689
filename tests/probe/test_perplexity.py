import json
import math
import shutil
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mutants import exec_changed
from selfsup import cli
from selfsup.probe import nll as module
from selfsup.probe.nll import causal_nll, pseudo_nll, windows
from selfsup.probe.perplexity import perplexity, read_tokens
from selfsup.text.load import load_text_run, open_documents
from text.making import text_run, text_shards, token_shards, word_tokenizer
from text_runs import SMALL, build, shaken

SEP, VOCAB = 3, SMALL["vocab_size"]
SPECIAL = (2, 3, 4)


def some_documents(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, VOCAB, n) for n in lengths]


@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 12))
def test_windows_count_every_token_but_the_first_once(tokens, length, stride):
    stride = min(stride, length)
    counted = []
    for number, (begin, end, start) in enumerate(windows(tokens, length, stride)):
        assert begin == number * stride and 0 < end - begin <= length
        new = range(max(begin + 1, start), end + 1)
        assert number == 0 or all(token - begin >= length - stride + 1 for token in new)
        counted += new
    assert counted == list(range(1, tokens))


def test_uniform_scores_have_the_perplexity_of_the_vocabulary():
    documents = some_documents([30, 5, 17])
    causal, masked = build("clm", tied=False).eval(), build("mlm", tied=False).eval()
    torch.nn.init.zeros_(causal.decoder.weight)
    torch.nn.init.zeros_(masked.head.decoder.weight)
    for found, tokens in (
        (causal_nll(causal, documents, SEP), 30 + 5 + 17 + 3 - 1),
        (pseudo_nll(masked, [ids[:18] for ids in documents], SPECIAL), 18 + 5 + 17),
    ):
        assert found.tokens == tokens
        assert math.exp(found.nll / found.tokens) == pytest.approx(VOCAB, rel=1e-5)


def bigrams():
    """A model whose scores depend on the last token alone, and its table of log-probabilities."""
    model = shaken("clm", {"positions": "none"}, tied=False).eval()
    for block in model.encoder.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    with torch.no_grad():
        states = model.encoder(torch.arange(VOCAB)[:, None])[:, 0]
        return model, model.logits(states).log_softmax(dim=-1)


@pytest.mark.parametrize("stride", [None, 1, 7, 20])
def test_bigrams_cost_what_their_table_says(stride):
    model, table = bigrams()
    documents = some_documents([30, 1, 12, 50])
    stream = [token for ids in documents for token in [*ids.tolist(), SEP]]
    expected = -sum(table[a, b].item() * n for (a, b), n in Counter(pairwise(stream)).items())
    found = causal_nll(model, documents, SEP, stride, batch_size=3)
    assert found.tokens == len(stream) - 1
    assert found.nll == pytest.approx(expected, rel=1e-12)


def slow_causal(model, stream: list[int], stride: int) -> float:
    """Each token from its own forward pass, in the first row that reaches it."""
    length, total = model.encoder.config.max_length, 0.0
    for target in range(1, len(stream)):
        begin = next(b for b in range(0, len(stream), stride) if target <= b + length)
        states = model.encoder(torch.tensor([stream[begin:target]]))[0, -1]
        total -= F.log_softmax(model.logits(states), dim=-1)[stream[target]].item()
    return total


@torch.no_grad()
@pytest.mark.parametrize("stride", [20, 9, 1])
@pytest.mark.parametrize("positions", ["learned", "rope", "alibi"])
def test_rows_are_those_of_a_slow_loop(stride, positions):
    model, documents = shaken("clm", {"positions": positions}).eval(), some_documents([33, 4, 25])
    stream = [token for ids in documents for token in [*ids.tolist(), SEP]]
    expected = slow_causal(model, stream, stride)
    assert causal_nll(model, documents, SEP, stride, batch_size=2).nll == pytest.approx(expected, rel=1e-9)


def test_a_token_counted_twice_is_caught():
    wrong = exec_changed(module, "windows", "begin + stride, end + 1", "begin + stride, begin + 1")
    rows = islice(wrong(12, 10, 5), 20)
    counted = [token for begin, end, start in rows for token in range(max(begin + 1, start), end + 1)]
    assert counted != list(range(1, 12))


@torch.no_grad()
def test_documents_one_by_one_are_those_alone():
    model = shaken("clm", {"max_length": 60}).eval()
    documents = some_documents([12, 1, 20, 9])
    expected, tokens = 0.0, 0
    for ids in documents:
        row = torch.tensor([[*ids.tolist(), SEP]])
        logits = model.logits(model.encoder(row[:, :-1]))
        expected += F.cross_entropy(logits[0], row[0, 1:], reduction="sum").item()
        tokens += row.shape[1] - 1
    found = causal_nll(model, documents, SEP, separate=True)
    assert found.tokens == tokens
    assert found.nll == pytest.approx(expected, rel=1e-9)
    assert causal_nll(model, documents, SEP).nll != pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_pseudo_perplexity_masks_one_token_at_a_time():
    model, documents = shaken("mlm").eval(), some_documents([7, 1, 18])
    expected = 0.0
    for ids in documents:
        for place in range(len(ids)):
            row = torch.tensor([[2, *ids.tolist(), 3]])
            row[0, place + 1] = 4
            states = model.encoder(row)[0, place + 1]
            logits = F.linear(model.head(states), model.word_weights, model.head.bias)
            expected -= logits.log_softmax(dim=-1)[ids[place]].item()
    found = pseudo_nll(model, documents, SPECIAL, batch_size=4)
    assert found.tokens == 26
    assert found.nll == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "old, new", [("rows[copies, places] = mask", "rows[:, places] = mask"), ("[cls], ", "")]
)
def test_other_masks_are_caught(old, new):
    wrong = exec_changed(module, "pseudo_nll", old, new)
    model, documents = shaken("mlm").eval(), some_documents([7, 18])
    try:
        assert wrong(model, documents, SPECIAL).nll != pytest.approx(
            pseudo_nll(model, documents, SPECIAL).nll, rel=1e-6
        )
    except IndexError:
        assert not new


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Text shards, the same as token shards, and a run of each objective."""
    folder, tokenizer = tmp_path_factory.mktemp("ppl"), word_tokenizer()
    texts = text_shards(folder / "texts", 40)
    tokens = token_shards(texts, folder / "tokens", tokenizer)
    runs = {name: text_run(folder / name, name, tokenizer, str(tokens)) for name in ("mlm", "clm")}
    return {"texts": str(texts), "tokens": str(tokens), "folder": folder, **runs}


@pytest.mark.parametrize("name", ["clm", "mlm"])
def test_text_shards_and_token_shards_are_the_same(files, name):
    run, device = load_text_run(str(files[name])), torch.device("cpu")
    texts, tokens = (perplexity(run, files[kind], device, documents=15) for kind in ("texts", "tokens"))
    for key in ("nll", "tokens", "documents", "bytes", "perplexity"):
        assert texts.get(key) == tokens.get(key), key
    assert tokens["documents"] == 15 < tokens["data"]["samples"]


def test_bits_per_byte_are_over_the_bytes_of_the_documents(files):
    run = load_text_run(str(files["clm"]))
    source = open_documents(run, files["texts"], "--test")
    texts = source.reader.texts(np.arange(len(source)))
    found = perplexity(run, files["tokens"], torch.device("cpu"))
    assert found["bytes"] == sum(len(text.encode()) for text in texts)
    nats = found["nll"] * found["tokens"]
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"])
    assert found["tokens"] == sum(len(ids) + 1 for ids in read_tokens(source, np.arange(len(source)))) - 1


def test_a_run_of_single_documents_is_measured_so(files):
    run = text_run(files["folder"] / "single", "clm", word_tokenizer(), data={"packing": "pad"})
    found = perplexity(load_text_run(str(run)), files["tokens"], torch.device("cpu"))
    assert found["one_by_one"] and found["bits_per_byte"] is None


def run_cli(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["selfsup", "probe", "perplexity", *map(str, arguments)])
    return cli.main()


def test_the_command_writes_json_that_show_passes_over(files, monkeypatch, capsys):
    out = files["folder"] / "found.json"
    assert run_cli(monkeypatch, files["mlm"], "--test", files["texts"], "--documents", 5, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "pseudo-perplexity" in printed and "documents cut at max_length 16" in printed
    assert json.loads(out.read_text())["tokens"] > 0
    assert run_cli(monkeypatch, files["clm"], "--test", files["texts"], "--stride", 4) == 0
    (written,) = (files["clm"] / "probe").glob("perplexity-*.json")
    monkeypatch.setattr("sys.argv", ["selfsup", "probe", "show", str(written)])
    assert cli.main() == 2 and "passed over" in capsys.readouterr().out


def test_a_checkpoint_outside_a_run_folder_needs_out(files, tmp_path, monkeypatch, capsys):
    away = shutil.copytree(next((files["clm"] / "checkpoints").iterdir()), tmp_path / "a" / "step-00000007")
    shutil.copy(files["clm"] / "tokenizer.json", tmp_path)
    arguments = [away, "--test", files["texts"], "--documents", 3]
    assert run_cli(monkeypatch, *arguments) == 0
    assert "no JSON written: the model has no run folder" in capsys.readouterr().out
    assert run_cli(monkeypatch, *arguments, "--out", tmp_path / "found.json") == 0
    assert json.loads((tmp_path / "found.json").read_text())["documents"] == 3


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("clm", [], "--test: expected a folder"),
        ("clm", ["--stride", "17"], "--stride: expected 1 to encoder.max_length 16, got 17"),
        ("mlm", ["--stride", "4"], "--stride: expected a causal model"),
        ("mlm", ["--documents", "0"], "--documents: expected >= 1"),
    ],
)
def test_what_makes_no_sense_is_one_line(files, monkeypatch, capsys, name, arguments, message):
    test = ["--test", files["texts"]] if arguments else []
    assert run_cli(monkeypatch, files[name], *test, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_token_shards_of_another_tokenizer_are_refused(files, tmp_path, monkeypatch, capsys):
    tokenizer = word_tokenizer()
    other = type(tokenizer)(tokenizer.json.replace('"film"', '"flim"'))
    shards = token_shards(files["texts"], tmp_path / "other", other)
    assert run_cli(monkeypatch, files["clm"], "--test", shards) == 2
    assert "token shards of another tokenizer than the run's" in capsys.readouterr().err
