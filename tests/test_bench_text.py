"""The benchmarks against transformers and nanoGPT: they run, the sides do the same work, figures are what they say.

No timing is asserted. nanoGPT itself is not needed: a file with its names stands in.
"""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from running import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import bench_text
from bench_nanogpt import exact_loss
from bench_nanogpt import main as nanogpt_main
from bench_text import Options, main, take_turns
from bench_text_peers import IGNORED, Shape, batches_of, build, shape_of, takes_part

CPU = torch.device("cpu")
TINY = {
    "mlm-256": Shape("mlm", 32, 2, 2, 16, 4, 64),
    "clm-128": Shape("clm", 32, 2, 2, 16, 4, 64),
}
STAND_IN = """
from dataclasses import dataclass
import torch
from torch.nn import functional as F
@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.norm = torch.nn.LayerNorm(config.n_embd)
    def forward(self, idx, targets=None):
        logits = self.norm(self.wte(idx)) @ self.wte.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench_text, "shape_of", lambda model, vocab, batch: TINY[model])


def test_a_contest(tiny, tmp_path):
    report = tmp_path / "report.json"
    options = Options(("mlm-256", "clm-128"), ("bf16",), rounds=2, turn=0.0, report=report)
    assert main(options) == 0
    contests = json.loads(report.read_text())["contests"]
    assert [contest["model"] for contest in contests] == ["mlm-256", "clm-128"]
    for contest in contests:
        rows = contest["contestants"]
        assert (
            list(rows) == ["transformers-sdpa", "transformers-eager", "selfsup"] and contest["problems"] == []
        )
        shape = TINY[contest["model"]]
        flops = shape.objective.build(shape.encoder("auto")).flops_per_sample() / shape.length
        assert contest["flops_per_token"] == flops
        for row in rows.values():
            assert len(row["seconds"]) == 2 and len(row["losses"]) == 4
            seconds = sorted(row["seconds"])
            median = (seconds[0] + seconds[1]) / 2
            assert row["tokens_per_second"] == pytest.approx(shape.batch_size * shape.length / median)


def loaded(side: str, shape: Shape) -> torch.nn.Module:
    """A side with our weights of seed 0, in float64: so that equal work gives equal losses."""
    torch.manual_seed(0)
    ours = build("selfsup", shape, "reference", None).double().eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if side == "selfsup":
        return ours
    module = build(side, shape, "reference", None).double().eval()
    theirs, encoder = module.model, ours.objective.encoder
    for i, block in enumerate(encoder.blocks):
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        if shape.task == "mlm":
            layer = theirs.bert.encoder.layer[i]
            pairs = [
                (layer.attention.output.dense, block.attn.proj),
                (layer.attention.output.LayerNorm, block.norm1),
            ]
            pairs += [(layer.intermediate.dense, block.mlp.fc1), (layer.output.dense, block.mlp.fc2)]
            pairs += [(layer.output.LayerNorm, block.norm2)]
            part = layer.attention.self
            for linear, weight, bias in zip((part.query, part.key, part.value), weights, biases):
                linear.weight.data, linear.bias.data = weight.data, bias.data
        else:
            layer = theirs.transformer.h[i]
            pairs = [(layer.ln_1, block.norm1), (layer.ln_2, block.norm2)]
            convolutions = [(layer.attn.c_attn, block.attn.qkv), (layer.attn.c_proj, block.attn.proj)]
            convolutions += [(layer.mlp.c_fc, block.mlp.fc1), (layer.mlp.c_proj, block.mlp.fc2)]
            for conv, linear in convolutions:
                conv.weight.data, conv.bias.data = linear.weight.data.T.contiguous(), linear.bias.data
        for to, of in pairs:
            to.weight.data, to.bias.data = of.weight.data, of.bias.data
    words = encoder.token_embed.weight.data[: shape.vocab_size]
    if shape.task == "mlm":
        embeddings, head = theirs.bert.embeddings, theirs.cls.predictions
        embeddings.word_embeddings.weight.data.copy_(words)
        embeddings.position_embeddings.weight.data = encoder.pos_embed.weight.data
        embeddings.token_type_embeddings.weight.data = encoder.type_embed.weight.data
        mine = ours.objective.head
        pairs = [(embeddings.LayerNorm, encoder.embed_norm), (head.transform.dense, mine.dense)]
        for to, of in [*pairs, (head.transform.LayerNorm, mine.norm)]:
            to.weight.data, to.bias.data = of.weight.data, of.bias.data
        head.bias.data.copy_(mine.bias.data)
    else:
        theirs.transformer.wte.weight.data.copy_(words)
        theirs.transformer.wpe.weight.data = encoder.pos_embed.weight.data
        theirs.transformer.ln_f.weight.data = encoder.norm.weight.data
        theirs.transformer.ln_f.bias.data = encoder.norm.bias.data
    return module


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("side", ["transformers-sdpa", "transformers-eager"])
def test_sides_compute_the_same_loss(side, model):
    shape = TINY[model]
    theirs, ours = batches_of(shape, CPU)
    losses = [loaded("selfsup", shape)(ours), loaded(side, shape)(theirs)]
    assert abs(losses[0] - losses[1]) < 1e-7 * losses[0]  # transformers' loss of clm is in float32
    spoilt = ours._replace(labels=ours.labels.roll(1))
    assert abs(loaded("selfsup", shape)(spoilt) - losses[1]) > 1e-4


@pytest.mark.parametrize("model", TINY)
def test_both_batches_are_the_same(model):
    shape = TINY[model]
    (tokens, labels), ours = batches_of(shape, CPU)
    assert torch.equal(tokens, ours.tokens) and tokens.shape == labels.shape == (4, 16)
    if shape.task == "clm":
        assert torch.equal(labels.flatten(), ours.labels) and torch.equal(tokens[:, 1:], labels[:, :-1])
        return
    assert ((labels != IGNORED).sum(dim=1) == round(0.15 * 16)).all() and ours.targets == 4 * round(0.15 * 16)
    assert torch.equal(labels.flatten()[ours.where], ours.labels)
    assert (tokens.flatten()[ours.where] == shape.vocab_size - 1).all()


def test_shapes_are_those_in_the_help():
    bert, wide = shape_of("mlm-256", None, None), shape_of("mlm-512", 30522, 8)
    assert (bert.embed_dim, bert.depth, bert.num_heads, bert.length, bert.batch_size) == (256, 4, 4, 128, 32)
    assert (wide.embed_dim, wide.depth, wide.num_heads, wide.vocab_size, wide.batch_size) == (
        512,
        8,
        8,
        30522,
        8,
    )
    char = shape_of("clm-384", None, None)
    assert (char.depth, char.num_heads, char.length, char.batch_size, char.vocab_size) == (6, 6, 256, 64, 65)


def test_nanogpt_takes_part_where_it_is(tiny, tmp_path):
    (tmp_path / "model.py").write_text(STAND_IN)
    assert not takes_part("nanogpt", "clm-128", None) and not takes_part("nanogpt", "mlm-256", tmp_path)
    report = tmp_path / "report.json"
    options = Options(
        ("clm-128",), ("fp32",), ("nanogpt", "selfsup"), tmp_path, rounds=1, turn=0.0, report=report
    )
    assert main(options) == 1  # the stand-in is smaller: said, not hidden
    (contest,) = json.loads(report.read_text())["contests"]
    assert list(contest["contestants"]) == ["nanogpt", "selfsup"]
    assert any("parameters" in problem for problem in contest["problems"])


def test_who_begins_changes_and_turns_have_their_steps():
    class Runner:
        def __init__(self, name: str):
            self.name, self.seconds = name, []

        def step(self) -> None:
            order.append(self.name)

    class Nothing:
        def measure(self) -> None:
            order.append("|")

    order: list[str] = []
    take_turns({name: Runner(name) for name in "ab"}, Nothing(), rounds=3, seconds=0.0, device=CPU)
    assert "".join(order) == "aabb|ab|ba|ab"


@pytest.mark.parametrize(
    "options, message",
    [
        (Options(rounds=0), "--rounds"),
        (Options(only=("nanogpt",)), "needs --nanogpt"),
        (Options(nanogpt=ROOT), "no model.py"),
        (Options(profile=True, compile=True), "--profile"),
        (Options(report=ROOT / "no" / "such.json"), "--json"),
    ],
)
def test_faults_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        main(options)


def test_exact_loss_predicts_every_token_once():
    """A model that knows the token before: the mean over all bigrams, but for windows' contexts, by a slow loop."""
    torch.manual_seed(0)
    table, tokens = torch.randn(7, 7), torch.randint(7, (3 * 8 + 6,))
    slow = [F.cross_entropy(table[a].double(), b) for a, b in zip(tokens[:-1], tokens[1:])]
    assert exact_loss(lambda x: table[x], tokens, 8) == pytest.approx(
        torch.stack(slow).mean().item(), rel=1e-12
    )
    seen = []
    exact_loss(lambda x: seen.append(x) or table[x], tokens, 8)
    assert torch.equal(torch.cat([x.flatten() for x in seen]), tokens[:-1])
    assert [tuple(x.shape) for x in seen] == [(3, 8), (1, 5)]


def test_bench_nanogpt_names_what_it_lacks(tmp_path):
    from bench_nanogpt import Options as NanoOptions

    with pytest.raises(ValueError, match="needs --nanogpt CHECKOUT .git clone"):
        nanogpt_main(NanoOptions(tmp_path / "new"))
    with pytest.raises(ValueError, match="no train.py"):
        nanogpt_main(NanoOptions(tmp_path / "new", nanogpt=tmp_path, text=tmp_path))
    with pytest.raises(ValueError, match="exists"):
        nanogpt_main(NanoOptions(tmp_path))
    assert not (tmp_path / "new").exists()
