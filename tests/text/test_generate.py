import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mutants import exec_changed
from selfsup import cli
from selfsup.text import generate as module
from selfsup.text.generate import draw, filter_logits, generate
from selfsup.text.load import load_text_run
from text.making import text_run, word_tokenizer
from text_runs import shaken


def slow_filter(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> set[int]:
    """The tokens that may be drawn, one at a time."""
    scaled = np.array(logits, dtype=np.float64) / temperature
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = (
        order
        if top_k is None
        else [i for i in order if scaled[i] >= scaled[order[min(top_k, len(order)) - 1]]]
    )
    if top_p is None or top_p == 1:
        return set(kept)
    mass = np.exp(scaled[kept] - scaled[kept[0]])
    mass, taken, out = mass / mass.sum(), 0.0, set()
    for i, chance in zip(kept, mass):
        if taken >= top_p:
            break
        out.add(i)
        taken += chance
    return out


def random_logits(seed: int, vocab: int) -> torch.Tensor:
    return torch.randn(3, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


CASES = {
    "seed": st.integers(0, 1000), "vocab": st.integers(1, 40), "temperature": st.floats(0.2, 3),
    "top_k": st.none() | st.integers(1, 50), "top_p": st.none() | st.floats(0.01, 1),
}  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(**CASES)
def test_filters_keep_what_a_slow_loop_keeps(seed, vocab, temperature, top_k, top_p):
    logits = random_logits(seed, vocab)
    filtered = filter_logits(logits, temperature, top_k, top_p)
    for row, got in zip(logits, filtered):
        kept = set(torch.nonzero(got.isfinite()).flatten().tolist())
        assert kept == slow_filter(row.tolist(), temperature, top_k, top_p)
        assert torch.equal(got[sorted(kept)], (row / temperature)[sorted(kept)])


@settings(deadline=None, max_examples=60)
@given(**CASES)
def test_filters_are_those_of_transformers(seed, vocab, temperature, top_k, top_p):
    logits = random_logits(seed, vocab)
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(filter_logits(logits, temperature, top_k, top_p), expected)


@pytest.mark.parametrize(
    "old, new",
    [
        ("before >= top_p", "chances.cumsum(dim=-1) >= top_p"),
        ("logits < least", "logits <= least"),
        ("logits / temperature", "logits * temperature"),
    ],
)
def test_a_wrong_filter_is_caught(old, new):
    wrong, row = exec_changed(module, "filter_logits", old, new), torch.tensor([[2.0, 1.0, 0.5, 0.1]])

    def caught(*how) -> bool:
        found = wrong(row, *how)[0]
        kept = set(torch.nonzero(found.isfinite()).flatten().tolist())
        return kept != slow_filter(row[0].tolist(), *how) or found[0] != 2.0 / how[0]

    assert any(caught(*how) for how in [(0.5, None, 0.5), (1.0, 3, None), (2.0, None, 0.8)])


def test_temperature_zero_takes_the_first_of_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 3.0], [1.0, 0.0, -1.0]])
    assert draw(filter_logits(logits, 0.0), 5, 0).tolist() == [1, 0]


def test_draws_follow_the_probabilities_and_nothing_impossible_is_drawn():
    chances = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    n = 20000
    counts = torch.bincount(draw(chances.log().expand(n, -1), 0, 3), minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    spread = (n * chances * (1 - chances)).sqrt()
    assert ((counts - n * chances).abs() <= 4 * spread).all()
    assert not torch.equal(draw(chances.log().expand(50, -1), 0, 4), draw(chances.log().expand(50, -1), 0, 3))


def slow_generate(model, prompt: list[int], tokens: int, choose) -> list[int]:
    """One sample: the window's rule written out, no cache."""
    ids, begin, longest = list(prompt), 0, model.encoder.config.max_length
    for step in range(tokens):
        if len(ids) - begin > longest:
            begin = len(ids) - longest // 2
        with torch.no_grad():
            states = model.encoder(torch.tensor([ids[begin:]]))
        ids.append(int(choose(model.logits(states[:, -1]), step)[0]))
    return ids[len(prompt) :]


ENCODERS = [
    {"positions": "learned"}, {"positions": "rope", "num_kv_heads": 1}, {"positions": "alibi", "norm": "rms"},
    {"positions": "none", "max_length": 7},
]  # fmt: skip


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda e: e["positions"])
@pytest.mark.parametrize("prompt", [[7], [9, 8, 7], list(range(10, 45))], ids=len)
def test_cached_is_uncached_is_a_slow_loop_beyond_the_window(encoder, prompt):
    model = shaken("clm", encoder).eval()
    for temperature in (0.0, 1.0):

        def choose(logits, step, temperature=temperature):
            return draw(filter_logits(logits, temperature), 1, step)

        cached, plain = (generate(model, np.array(prompt), 25, 1, choose, each) for each in (True, False))
        assert torch.equal(cached, plain)
        assert cached[0].tolist() == slow_generate(model, prompt, 25, choose)


def test_a_window_that_keeps_its_cache_is_caught():
    wrong = exec_changed(
        module, "generate", "begin, caches = ids.shape[1] - longest // 2, None", "caches = None"
    )
    model = shaken("clm").eval()
    with pytest.raises(ValueError, match="max_length"):
        wrong(model, np.array([7]), 30, 1, lambda logits, step: logits.argmax(-1))


def test_a_sample_depends_on_its_number_and_seed_alone():
    model = shaken("clm").eval()

    def texts(samples: int, seed: int):
        return generate(model, np.array([7]), 30, samples, lambda logits, step: draw(logits, seed, step))

    eight = texts(8, 0)
    assert torch.equal(texts(3, 0), eight[:3]) and torch.equal(texts(8, 0), eight)
    assert len({tuple(row) for row in eight.tolist()}) == 8
    assert not torch.equal(texts(8, 1), eight)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return text_run(tmp_path_factory.mktemp("clm") / "run", "clm", word_tokenizer())


def run_cli(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["selfsup", *map(str, arguments)])
    return cli.main()


def test_the_command_prints_the_same_text_for_the_same_seed(run, monkeypatch, capsys):
    printed = []
    for _ in range(2):
        arguments = ["--prompt", "the film", "--tokens", 20, "--samples", 2, "--top-k", 20]
        assert run_cli(monkeypatch, "generate", run, *arguments) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].count("the film") >= 2 and "--- 2" in printed[0]


def test_a_document_ends_where_the_model_ends_it(run):
    loaded = load_text_run(str(run))
    sep, (a, b) = loaded.tokenizer.sep, loaded.tokenizer.encode(["film cast"])[0].tolist()
    assert module.as_text(loaded, "the", [a, sep, b], "document") == "the film"
    assert module.as_text(loaded, "the", [a, sep, b], "tokens") == "the film\n---\ncast"
    assert module.as_text(loaded, "", [a, b], "tokens") == "film cast"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "0"], "--tokens: expected >= 1, got 0"),
        (["--temperature", "-1"], "--temperature: expected >= 0"),
        (["--top-p", "0"], "--top-p: expected 0 < p <= 1"),
        (["--top-k", "0"], "--top-k: expected >= 1"),
        (["--prompt", " "], "makes no token of it"),
    ],
)
def test_what_makes_no_sense_is_one_line(run, monkeypatch, capsys, arguments, message):
    assert run_cli(monkeypatch, "generate", run, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_runs_that_cannot_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    tokenizer = word_tokenizer()
    masked = text_run(tmp_path / "mlm", "mlm", tokenizer)
    single = text_run(tmp_path / "single", "clm", tokenizer, data={"document_mask": True})
    bare = text_run(tmp_path / "bare", "clm", tokenizer)
    (bare / "tokenizer.json").unlink()
    swapped = text_run(tmp_path / "swapped", "clm", tokenizer)
    (swapped / "tokenizer.json").write_text(tokenizer.json.replace('"film"', '"flim"'))
    for run, message in (
        (masked, "selfsup fill"), (single, "was never asked how one begins"), (bare, "tokenizer.json: missing"),
        (swapped, "not the tokenizer of this run"), (tmp_path, "no whole checkpoint"),
    ):  # fmt: skip
        assert run_cli(monkeypatch, "generate", run) == 2
        assert message in capsys.readouterr().err
    for arguments in (["--prompt", "film", "--until", "tokens"], ["--prompt", "film [SEP]"]):
        assert run_cli(monkeypatch, "generate", single, *arguments) == 2
        assert "was never asked how one begins" in capsys.readouterr().err
