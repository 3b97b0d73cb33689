import json

import numpy as np
import pytest
import torch

from data.text_making import make_tokenizer, make_tokens
from mutants import exec_changed
from selfsup import cli
from selfsup.data.index import open_shards
from selfsup.data.order import sample_order
from selfsup.data.text_sources import pack_text
from selfsup.probe import text as module
from selfsup.probe import text_finetune as finetune_module
from selfsup.probe.embed import embed
from selfsup.probe.sources import check_labels
from selfsup.probe.text import (
    Documents,
    load_text_runs,
    majority,
    open_sets,
    probe_text,
    random_text_encoder,
    read_documents,
    text_features,
)
from selfsup.probe.text_finetune import (
    TextFinetuneRecipe,
    bucketed_rows,
    build_text_classifier,
    build_text_optimizer,
    limited,
    text_finetune,
)
from selfsup.text.load import load_text_run
from text.making import WORDS, text_run, text_shards, token_shards, word_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Labelled text shards, training ones as token shards too, and runs of each objective."""
    folder, tokenizer = tmp_path_factory.mktemp("probe-text"), word_tokenizer()
    train, test = text_shards(folder / "train", 80), text_shards(folder / "test", 40, seed=1)
    tokens = token_shards(train, folder / "tokens", tokenizer)
    wide = {"max_length": 40}
    return {
        "folder": folder, "train": str(train), "test": str(test), "tokens": str(tokens),
        "mlm": str(text_run(folder / "mlm", "mlm", tokenizer, str(tokens), encoder=wide)),
        "short": str(text_run(folder / "short", "clm", tokenizer, str(tokens))),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mlm", "clm"])
@pytest.mark.parametrize("length", [5, 8, 9, 40])
def test_documents_are_wrapped_and_cut_as_rows_are(tmp_path, name, length):
    tokenizer = make_tokenizer("char")
    made = [list(range(5, 5 + n)) for n in range(1, 13)]
    source = make_tokens(made, tmp_path / "t", tokenizer, [0] * 12)
    run = load_text_run(str(text_run(tmp_path / "r", name, tokenizer, encoder={"max_length": length})))
    found = read_documents(run, source, "")
    whole = [[2, *ids, 3] if name == "mlm" else [*ids, 3] for ids in made]
    expected = [ids[:length] for ids in whole]
    if name == "mlm":  # ends in [SEP] all the same
        expected = [[*ids[:-1], 3] for ids in expected]
    assert [ids.tolist() for ids in found.ids] == expected
    assert found.cut.tolist() == [len(ids) > length for ids in whole]
    assert found.truncated == sum(len(ids) > length for ids in whole)


@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_features_are_those_of_a_document_alone(files, pool):
    (run,) = load_text_runs((files["mlm"],), "trained", pool)
    documents = open_sets(run, files["train"], files["test"]).test
    found = text_features(run.encoder, documents, 7, CPU)
    for ids, value in zip(documents.ids, found.values):
        states = run.encoder(torch.from_numpy(ids)[None])[0]
        expected = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pool]
        np.testing.assert_allclose(value, expected.numpy(), atol=2e-6)
    assert len({len(ids) for ids in documents.ids}) > 5
    said = [any(word in run.tokenizer.decode(ids) for word in WORDS[1]) for ids in documents.ids]
    assert found.labels.tolist() == [int(each) for each in said] and sum(said) == 20


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("pooled", "torch.where(hidden, -1, 0)", "torch.where(hidden, 0, 0)"),
        ("text_features", "values[part] =", "values[np.sort(part)] ="),
    ],
)
def test_padding_seen_or_rows_mixed_up_are_caught(files, monkeypatch, name, old, new):
    (run,) = load_text_runs((files["mlm"],), "trained", None)
    documents = open_sets(run, files["train"], files["test"]).test
    right = text_features(run.encoder, documents, 7, CPU).values
    monkeypatch.setattr(module, name, exec_changed(module, name, old, new))
    wrong = module.text_features(run.encoder, documents, 7, CPU).values
    assert not np.allclose(right, wrong, atol=1e-3)


def test_text_and_token_shards_have_the_same_features(files):
    (run,) = load_text_runs((files["short"],), "trained", None)
    texts, tokens = (open_sets(run, files[kind], files["test"]) for kind in ("train", "tokens"))
    assert all(np.array_equal(a, b) for a, b in zip(texts.train.ids, tokens.train.ids))
    assert texts.train.labels.tolist() == tokens.train.labels.tolist()
    assert texts.train.truncated == tokens.train.truncated > 0


def test_random_is_where_the_run_began(files):
    run = load_text_run(files["mlm"])
    torch.manual_seed(run.recipe.seed)
    before = run.recipe.objective.build(run.recipe.encoder).encoder.state_dict()
    fresh = random_text_encoder(run).state_dict()
    assert all(torch.equal(fresh[name], before[name]) for name in before)
    assert any(not torch.equal(fresh[name], value) for name, value in run.encoder.state_dict().items())


def test_the_commonest_class_is_that_of_the_training_set():
    assert majority(np.array([0, 1, 1]), np.array([0, 0, 0, 1])) == 0.25


def test_what_the_words_tell_is_found(files):
    runs = load_text_runs((files["mlm"],), "trained", None)
    sets = open_sets(runs[0], files["train"], files["test"])
    scores = probe_text(runs, sets, CPU).scores
    assert scores["majority"]["constant"].mean == 0.5
    assert scores["tfidf"]["logreg"].mean > 0.9
    assert scores["random"]["logreg"].mean > 0.6 and scores["pretrained"]["logreg"].mean > 0.6
    shuffled = sets._replace(train=sets.train._replace(labels=np.roll(sets.train.labels, 1)))
    assert probe_text(runs, shuffled, CPU, baselines=()).scores["pretrained"]["logreg"].mean < 0.5


def run_cli(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["selfsup", "probe", *map(str, arguments)])
    return cli.main()


def test_the_commands_print_and_write_what_show_reads(files, monkeypatch, capsys):
    data = ["--train", files["train"], "--test", files["test"]]
    assert run_cli(monkeypatch, "text", files["short"], *data) == 0
    assert "documents are longer than encoder.max_length 16 and cut there" in capsys.readouterr().out
    few = ["--epochs", 1, "--seeds", 0, 1, "--limit", 32]
    assert run_cli(monkeypatch, "text-finetune", files["short"], *data, *few) == 0
    assert run_cli(monkeypatch, "text-finetune", files["short"], *data, *few, "--scratch") == 0
    assert "32 training" in capsys.readouterr().out
    written = sorted((files["folder"] / "short" / "probe").glob("text*.json"))
    assert len(written) == 3
    results = [json.loads(path.read_text()) for path in written]
    assert {tuple(result["scores"]) for result in results} >= {("scratch",), ("pretrained",)}
    capsys.readouterr()
    assert run_cli(monkeypatch, "show", *written) == 0
    printed = capsys.readouterr().out
    assert "TF-IDF" in printed and "test documents" in printed.replace("\n", " ")


def test_runs_of_two_seeds_are_averaged(files, tmp_path):
    tokenizer = word_tokenizer()
    names = [
        str(
            text_run(
                tmp_path / f"{seed}", "mlm", tokenizer, files["tokens"], encoder={"max_length": 40}, seed=seed
            )
        )
        for seed in (0, 1)
    ]
    runs = load_text_runs(tuple(names), "trained", None)
    found = probe_text(runs, open_sets(runs[0], files["tokens"], files["test"]), CPU)
    assert len(found.scores["pretrained"]["logreg"].values) == 2
    assert found.left_out["tfidf"].startswith("left out, token shards hold no words")
    with pytest.raises(ValueError, match="objective"):
        load_text_runs((names[0], files["short"]), "trained", None)


@pytest.mark.parametrize("steps", [3, 50, 117])
def test_buckets_hold_the_keyed_order_and_little_padding(steps):
    lengths = np.random.default_rng(0).integers(1, 500, 300)
    batches = list(bucketed_rows(lengths, 4, 8, steps))
    assert len(batches) == steps and {len(batch) for batch in batches} == {8}
    epoch, position = np.divmod(np.arange(8 * steps), 300)
    assert sorted(np.concatenate(batches)) == sorted(sample_order(4, epoch, position, 300, "shuffled"))
    assert all(np.array_equal(a, b) for a, b in zip(batches, bucketed_rows(lengths, 4, 8, steps)))
    if steps == 50:
        longest = np.array([lengths[batch].max() for batch in batches])
        assert (longest[:, None] * 8).sum() < 1.1 * lengths[np.concatenate(batches)].sum()
        assert not (np.diff(longest) >= 0).all()  # the batches themselves are shuffled


def test_layer_decay_goes_down_from_the_head(files):
    run, recipe = load_text_run(files["mlm"]), TextFinetuneRecipe(layer_decay=0.5)
    model = build_text_classifier(run, recipe, 2)
    optimizer = build_text_optimizer(model, recipe)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert set(map(id, named.values())) == scale.keys()
    for name, expected in {
        "head.weight": 1.0, "encoder.norm.weight": 1.0, "encoder.blocks.1.mlp.fc1.weight": 0.5,
        "encoder.blocks.0.attn.qkv.weight": 0.25, "encoder.token_embed.weight": 0.125, "encoder.pos_embed.weight": 0.125,
    }.items():  # fmt: skip
        assert scale[id(named[name])] == expected, name
        assert decay[id(named[name])] == (0.01 if named[name].ndim > 1 else 0.0)


def test_fine_tuning_learns_and_leaves_the_run_alone(files):
    runs = load_text_runs((files["mlm"],), "trained", None)
    sets = open_sets(runs[0], files["train"], files["test"])
    before = {name: value.clone() for name, value in runs[0].encoder.state_dict().items()}
    recipe = TextFinetuneRecipe(epochs=8.0, batch_size=16, lr=1e-2)
    first, again = (text_finetune(runs, sets, CPU, (0,), recipe, False).scores for _ in range(2))
    assert first == again
    assert first["pretrained"]["finetune"].mean > 0.9
    assert all(torch.equal(before[name], value) for name, value in runs[0].encoder.state_dict().items())
    assert not runs[0].encoder.training and not any(p.requires_grad for p in runs[0].encoder.parameters())


def test_scratch_has_nothing_of_the_run_but_its_architecture(files):
    run = load_text_run(files["mlm"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = build_text_classifier(run, TextFinetuneRecipe(scratch=True), 2)
        torch.manual_seed(5)
        expected = run.recipe.encoder.build().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.encoder.state_dict().items())
    kept = build_text_classifier(run, TextFinetuneRecipe(), 2).encoder.state_dict()
    assert all(torch.equal(value, run.encoder.state_dict()[name]) for name, value in kept.items())


def test_a_limit_takes_a_part_of_a_larger_limit(files):
    run = load_text_run(files["mlm"])
    sets = open_sets(run, files["tokens"], files["test"])
    sets = sets._replace(train=Documents([np.array([i]) for i in range(80)], np.arange(80), np.arange(80) % 3 == 0))
    few, many = ({int(ids[0]) for ids in limited(sets, n).train.ids} for n in (10, 30))
    assert len(few) == 10 and len(many) == 30 and few < many
    assert limited(sets, 10).train.labels.tolist() == sorted(few)
    train = limited(sets, 10).about["train"]
    assert train["limited_to"] == 10
    assert train["truncated"] == limited(sets, 10).train.truncated == sum(i % 3 == 0 for i in few) < 10


def test_a_schedule_of_epochs_is_counted_in_documents(files, monkeypatch):
    seen = []
    monkeypatch.setattr(finetune_module, "fit", lambda *a, **_: seen.append(a[3]) or 0.0)
    runs = load_text_runs((files["mlm"],), "trained", None)
    sets = open_sets(runs[0], files["tokens"], files["test"])
    text_finetune(runs, sets, CPU, (0,), TextFinetuneRecipe(epochs=3.0, batch_size=32), False)
    assert seen == [round(3 * 80 / 32)]


@pytest.mark.parametrize(
    "command, run, arguments, message",
    [
        ("text", "mlm", ["--train", "TRAIN"], "--train, --test: expected folders of shards with labels"),
        (
            "text",
            "short",
            ["--pool", "cls", "--train", "TRAIN", "--test", "TEST"],
            "--pool cls: the first token",
        ),
        ("text", "mlm", ["--train", "TRAIN", "--test", "TRAIN"], "holds the same samples as --train"),
        ("text", "mlm", ["--train", "TOKENS", "--test", "TRAIN"], "holds the same samples as --train"),
        ("text", "mlm", ["--train", "BARE", "--test", "TEST"], "of 20 samples have no label"),
        ("text", "mlm", ["--train", "BARE", "--test", "TEST"], 'or JSONL with a "label" a line'),
        ("text", "mlm", ["--train", "nope", "--test", "TEST"], "--train: no such folder: nope"),
        (
            "text-finetune",
            "mlm",
            ["--train", "TRAIN", "--test", "TEST", "--limit", "81"],
            "--limit: expected at most",
        ),
        (
            "text-finetune",
            "mlm",
            ["--train", "TRAIN", "--test", "TEST", "--batch-size", "99"],
            "--batch-size: expected",
        ),
        ("text-finetune", "mlm", ["--seeds", "1", "1"], "--seeds: expected one or more different seeds"),
        ("text-finetune", "mlm", ["--scratch", "--weights", "ema"], "--scratch: nothing of a run enters"),
        (
            "linear",
            "mlm",
            ["--train", "TRAIN", "--test", "TEST"],
            "a run of text (objective mlm), expected images",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(files, monkeypatch, capsys, command, run, arguments, message):
    bare = files["folder"] / "bare"
    if "BARE" in arguments and not bare.exists():
        text_shards(bare, 20, label=False)
    places = {"TRAIN": files["train"], "TEST": files["test"], "TOKENS": files["tokens"], "BARE": str(bare)}
    assert run_cli(monkeypatch, command, files[run], *(places.get(a, a) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("shards", ["train", "tokens"])
def test_features_of_images_are_not_for_text(files, tmp_path, shards):
    with pytest.raises(ValueError, match=r"a run of text \(objective mlm\), expected images; for text: "):
        embed(files["mlm"], files[shards], tmp_path / "x.npz", "cpu")


def test_labels_too_large_for_a_classifier_are_named(files, tmp_path):
    lines = [{"text": f"film {i}", "label": label} for i, label in enumerate([0, 99_999, 100_000, 2**40])]
    made = []
    for name, count in (("fits", 2), ("large", 4)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines[:count])))
        made.append(pack_text(tmp_path / f"{name}.jsonl", tmp_path / name).index)
    fits, large = made
    test = open_shards(files["test"], "text")
    assert check_labels(fits, test) == 100_000
    first = next(row for row in range(4) if large.label[row] >= 100_000)
    expected = f"--train .*expected labels below 100,000, got {large.label[first]} of {large.key(first)};"
    with pytest.raises(ValueError, match=expected):
        check_labels(large, test)
