"""muP against table 8 of Tensor Programs V done by hand in float64, and against what it is for: sizes that do not move
with width, and a best learning rate that does not."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from running import ROOT, Server, final_state, metrics
from selfsup import mup, optim, start
from selfsup.checkpoint import load_objective
from selfsup.config import validate
from selfsup.export.huggingface_text import export_hf_text
from selfsup.optim import build_optimizer, set_lr
from selfsup.recipe import Recipe
from selfsup.scaling.timing import random_batch
from selfsup.start import build_objective
from text_runs import make_token_shards, write_text_config

sys.path.insert(0, str(ROOT / "tools"))

from mup_check import best_rate, letters, make_recipe, slopes, trained_loss

CPU = torch.device("cpu")
NAMES = ("clm", "mlm", "mae")
HIDDEN = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "dense.weight", "decoder_embed.weight")


def with_sections(recipe, **changes):
    content = recipe.model_dump(mode="json")
    return validate(Recipe, {k: {**v, **changes[k]} if k in changes else v for k, v in content.items()})


def is_hidden(name):
    """By hand: every matrix of a block, and what leads to the decoder or the head."""
    return name.endswith(HIDDEN) and "patch_embed" not in name


def by_hand(objective, batches, rate, decay, ratio, loss_of, output):
    """Adam with table 8's rates, decay lr * wd whatever the rate, on losses that `loss_of` multiplies; eps 0.

    output: the head's matrix, whose rate is that of the base width."""
    params = {k: p for k, p in objective.named_parameters() if p.requires_grad}
    moments = {k: (0.0, 0.0) for k in params}
    for t, batch in enumerate(batches, 1):
        gradients = torch.autograd.grad(loss_of(objective, batch), list(params.values()))
        with torch.no_grad():
            for (name, p), g in zip(params.items(), gradients, strict=True):
                m, v = moments[name]
                m, v = moments[name] = (0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g)
                if p.ndim > 1:
                    p.mul_(1 - rate * decay)
                scale = ratio if is_hidden(name) and name != output else 1.0
                step = (m / (1 - 0.9**t)) / (v / (1 - 0.95**t)).sqrt()
                p.sub_(rate * scale * torch.nan_to_num(step))  # 0 / 0: embeddings of tokens that are not there


def clm_loss(ratio):
    def loss(objective, batch):
        states = objective.encoder.encode(batch).flatten(0, 1)
        return F.cross_entropy(ratio * states @ objective.word_weights.T, batch.labels)

    return loss


def mlm_loss(ratio):
    def loss(objective, batch):
        states = objective.head(objective.encoder.encode(batch).flatten(0, 1)[batch.where])
        return F.cross_entropy(ratio * states @ objective.word_weights.T + objective.head.bias, batch.labels)

    return loss


@pytest.mark.parametrize("name,tied", [("clm", True), ("clm", False), ("mlm", True), ("mlm", False)])
@pytest.mark.parametrize("post_norm", [False, True])
def test_folded_into_the_weights_it_is_the_multiplier_of_table_8(name, tied, post_norm):
    """Same losses and weights as a model whose logits are multiplied by r, with the rates of the base width there."""
    ratio, rate, decay = 0.25, 1e-2, 0.3
    recipe = make_recipe(name, 64, False, base_lr=rate, weight_decay=decay, eps=1e-30)
    recipe = with_sections(recipe, objective={"tied": tied}, encoder={"post_norm": post_norm})
    torch.manual_seed(0)
    batches = [random_batch(recipe) for _ in range(4)]
    ours = build_objective(with_sections(recipe, optim={"mup_base_width": 16}), CPU).double()
    theirs = recipe.objective.build(recipe.encoder).double()
    theirs.load_state_dict(ours.state_dict())
    last = {"clm": lambda m: m.encoder.blocks[-1].norm2 if post_norm else m.encoder.norm, "mlm": lambda m: m.head.norm}
    with torch.no_grad():  # undo the folding: the multiplier stands in the forward pass
        for p in last[name](theirs).parameters() if tied else (head_of(theirs),):
            p.div_(ratio)
    loss_of = {"clm": clm_loss, "mlm": mlm_loss}[name](ratio)
    output = None if tied else next(k for k, p in theirs.named_parameters() if p is head_of(theirs))
    optimizer = build_optimizer(with_sections(recipe, optim={"mup_base_width": 16}).optim, ours)
    assert loss_of(theirs, batches[0]).item() == pytest.approx(ours(batches[0], float(batches[0].targets)).loss.item())
    for batch in batches:
        ours(batch, float(batch.targets)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    by_hand(theirs, batches, rate, decay, ratio, loss_of, output)
    with torch.no_grad():
        for p in last[name](theirs).parameters() if tied else (head_of(theirs),):
            p.mul_(ratio)
    expected = theirs.state_dict()
    for key, value in ours.state_dict().items():
        if not key.endswith("qkv.bias"):  # of keys: its gradient is rounding, which Adam without eps makes steps of
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8, msg=lambda m: f"{key}: {m}")


def head_of(objective):
    return objective.decoder.weight if objective.config.name == "clm" else objective.head.decoder.weight


@pytest.mark.parametrize("name,tied", [("clm", True), ("clm", False), ("mlm", True), ("mae", None)])
def test_sizes_at_the_start_and_rates_are_table_3s(name, tied):
    """Standard deviations over those of the base width's own model: 1, sqrt(r) and r."""
    ratio = 0.125
    recipe = make_recipe(name, 256, True)
    recipe = recipe if tied is None else with_sections(recipe, objective={"tied": tied})
    small = make_recipe(name, 32, False)
    small = small if tied is None else with_sections(small, objective={"tied": tied})
    wide, base = build_objective(recipe, CPU), build_objective(small, CPU)
    theirs, scales = dict(base.named_parameters()), mup.lr_scales(wide, 32)
    outputs = {"clm": "decoder.weight", "mlm": "head.decoder.weight", "mae": "decoder.decoder_pred.weight"}[name]
    norm = {"clm": "encoder.norm.", "mlm": "head.norm.", "mae": "-"}[name] if tied else "-"
    for key, p in wide.named_parameters():
        if not p.requires_grad:
            continue
        expected = ratio if is_hidden(key) or key == outputs or key.startswith(norm) else 1.0
        assert scales[key] == expected, key
        if p.ndim > 1:
            size = np.sqrt(ratio) if is_hidden(key) else ratio if key == outputs else 1.0
            got = (p.std() / theirs[key].std()).item()
            assert got == pytest.approx(size, rel=0.25 if "token" in key and p.numel() < 1000 else 0.08), key
        elif key.endswith("norm.weight") or "norm" in key and key.endswith("weight"):
            assert torch.equal(p, torch.full_like(p, ratio if key.startswith(norm) else 1.0)), key
        else:
            assert not p.any(), key


def trained(recipe, steps=3):
    torch.manual_seed(1)
    batch = random_batch(recipe)
    objective = build_objective(recipe, CPU)
    optimizer = build_optimizer(recipe.optim, objective)
    for step in range(steps):
        set_lr(optimizer, recipe.optim.lr(step))
        objective(batch, float(batch.targets)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_at_its_base_width_it_changes_no_bit(name):
    plain = make_recipe(name, 32, False, weight_decay=0.1)
    (ours, groups), (theirs, their_groups) = trained(make_recipe(name, 32, True, weight_decay=0.1)), trained(plain)
    assert groups["param_groups"] == their_groups["param_groups"] and len(groups["param_groups"]) == 2
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs) and ours.keys() == theirs.keys()
    wider, _ = trained(make_recipe(name, 64, True, weight_decay=0.1))
    other, _ = trained(make_recipe(name, 64, False, weight_decay=0.1))
    assert not all(torch.equal(wider[k], other[k]) for k in other)


def test_groups_take_off_the_same_at_every_width():
    """lr * weight_decay of a step, and nothing of biases and norms; `set_lr` keeps the proportions."""
    recipe = make_recipe("clm", 128, True, weight_decay=0.1, base_lr=0.5)
    optimizer = build_optimizer(recipe.optim, build_objective(recipe, CPU))
    for rate in (0.5, 0.02):
        set_lr(optimizer, rate)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([rate, rate / 4, rate, rate / 4])
        taken_off = [g["lr"] * g["weight_decay"] for g in optimizer.param_groups]
        assert taken_off == pytest.approx([rate * 0.1, rate * 0.1, 0, 0])
    names = [g["param_names"] for g in optimizer.param_groups]
    assert names[0] == ["encoder.token_embed.weight", "encoder.pos_embed.weight"]
    assert names[3] == ["encoder.norm.weight", "encoder.norm.bias"]


@pytest.mark.parametrize(
    "changes,line",
    [
        ({"optim": {"name": "lars", "mup_base_width": 32}},
         "optim.mup_base_width: unknown key; it belongs to optim.name adamw"),
        ({"optim": {"mup_base_width": 24}}, "optim.mup_base_width: expected a multiple of 16, the channels of a head"),
        ({"optim": {"mup_base_width": 32}}, "optim.mup_base_width: at width 32 the decoder would have 8 channels, which are "
         "no heads of 16"),
        ({"optim": {"mup_base_width": 0}}, "optim.mup_base_width: expected 1 <= x, got 0"),
        ({"objective": {"name": "simclr"}, "data": {"shards": "x", "views": "simclr-32"},
          "optim": {"mup_base_width": 32}}, "optim.mup_base_width: expected none, muP is here for clm, mlm, mae"),
    ],
)  # fmt: skip
def test_where_it_does_not_hold_it_is_refused(changes, line):
    encoder = {"embed_dim": 64, "num_heads": 4, "depth": 1, "img_size": 32, "patch_size": 8}
    decoder = {"decoder_embed_dim": 16, "decoder_num_heads": 1}
    content = {"encoder": encoder, "objective": decoder, "data": {"shards": "x"}, "run": {"dir": "x"}, **changes}
    with pytest.raises(ValueError) as fault:
        validate(Recipe, content)
    assert str(fault.value).startswith(line)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_its_model_is_transformers(tmp_path):
    """A tied GPT-2: stopped and resumed it ends as it would have, and its export needs no word about muP."""
    import transformers  # takes seconds

    shards = make_token_shards(tmp_path / "tokens")
    config = write_text_config(tmp_path / "clm.yaml", shards, "{name: clm}", "causal: true")
    server = Server()
    try:
        options = ["--optim.mup-base-width", 16, "--optim.steps", 6]
        for name, more in (("whole", []), ("cut", ["--run.max-hours", 1e-9])):
            codes = server.wait(server.start([config, *options, "--run.dir", tmp_path / name, *more], tmp_path / "log"))
            assert codes == [0 if name == "whole" else 75], (tmp_path / "log").read_text()
        server.run(["--resume", tmp_path / "cut", "--run.max-hours", "none"], tmp_path / "log")
    finally:
        server.close()
    assert final_state(tmp_path / "whole") == final_state(tmp_path / "cut")
    rates = [line["lr"] for line in metrics(tmp_path / "whole")]
    assert rates[0] == pytest.approx(1e-2)  # the learning rate of the recipe, whatever the first group's
    groups = json.loads(next((tmp_path / "whole" / "checkpoints").glob("step-*6/state.json")).read_text())["optimizer"]
    assert [g.get("lr_scale") for g in groups] == [1.0, 0.5, 1.0, 0.5]

    folder = export_hf_text(tmp_path / "whole").folder
    model, recipe, *_ = load_objective(tmp_path / "whole")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokens = torch.randint(recipe.encoder.vocab_size, (2, 20))
    with torch.no_grad():
        states = model.encoder(tokens)
        assert (theirs(tokens).logits - model.logits(states)).abs().max() < 1e-5
    assert model.encoder.norm.weight.mean().item() == pytest.approx(0.5, abs=0.05)


# Slopes of log mean |activation| on log width 32 to 256. Wanted is 0; at such widths what falls as a power is not gone.
FLAT = (-0.25, 0.25)
OUTPUT = (-0.6, 0.25)
"""An output changes by what its own weights and what the layers below them have learned, the latter seen through
initial weights: that part falls as the root of the width."""


def moved(found):
    """The layers whose size, at the start or of the change, is not flat."""
    named = []
    for layer, (begin, change) in found.items():
        low, high = OUTPUT if layer == "output" else FLAT
        if not low < change < high or (layer != "output" and not FLAT[0] < begin < FLAT[1]):
            named.append(layer)
    return named


def check(name, with_mup=True):
    return moved(slopes(name, with_mup, widths=(32, 64, 128, 256), seeds=1))


@pytest.mark.parametrize("name", NAMES)
def test_coordinates_stay_with_mup_and_move_without(name):
    assert check(name) == []
    assert len(check(name, False)) > 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["hidden rate", "hidden init", "head"])
def test_a_wrong_scaling_is_caught(monkeypatch, name, fault):
    scales, init = optim.lr_scales, start.scale_init

    def wrong_scales(objective, base):
        found = scales(objective, base)
        heads = {id(p) for layer in objective.readouts for p in layer.parameters()}
        of_head = {k for k, p in objective.named_parameters() if id(p) in heads}
        if fault == "hidden rate":
            return {k: 1.0 if is_hidden(k) else v for k, v in found.items()}
        return {k: 1.0 if k in of_head else v for k, v in found.items()} if fault == "head" else found

    @torch.no_grad()
    def wrong_init(objective, base):
        init(objective, base)
        ratio = base / objective.encoder.embed_dim
        for layer_name, layer in objective.named_modules():
            if fault == "head" and layer in objective.readouts:
                layer.weight.div_(ratio)
            if fault == "hidden init" and is_hidden(f"{layer_name}.weight") and isinstance(layer, nn.Linear):
                layer.weight.div_(ratio**0.5)

    monkeypatch.setattr(optim, "lr_scales", wrong_scales)
    monkeypatch.setattr(start, "scale_init", wrong_init)
    found = check(name)
    assert found == ["output"] if fault == "head" else len(found) > 5


@pytest.mark.slow
def test_the_best_rate_stays_with_mup_and_moves_without():
    """Letters, widths 32 and 128, rates by factors of 2 and a parabola through the best three. Without muP the rate
    falls, here by less than the width grows: the table in docs/scaling.md."""
    text = letters()

    def best(width, with_mup, exponents):
        rates = [2.0**i for i in exponents]
        return best_rate(rates, [trained_loss(width, with_mup, lr, text, 150, 8) for lr in rates])

    narrow = best(32, True, (-8, -7, -6, -5))  # at its base width: with muP and without
    wide, plain = best(128, True, (-9, -8, -7, -6)), best(128, False, (-9, -8, -7, -6))
    assert abs(wide - narrow) < 1 and plain < wide - 0.25


def test_the_vertex_of_a_parabola():
    rates = [2.0**i for i in range(-9, -3)]
    assert best_rate(rates, [(i + 6.3) ** 2 for i in range(-9, -3)]) == pytest.approx(-6.3)
    assert best_rate(rates, [1.0, 2.0, 3.0, np.inf, np.inf, np.inf]) == -9
    assert best_rate(rates, [3.0, 1.0, np.inf, np.inf, np.inf, np.inf]) == -8
