"""Sizes and cells: what they count held against torch's counter and transformers' models, and where they land."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, ViTMAEConfig, ViTMAEForPreTraining

from selfsup.batch import ImageBatch
from selfsup.config import merge, validate
from selfsup.data.views import ViewBatch
from selfsup.recipe import Recipe
from selfsup.scaling import law
from selfsup.scaling.grid import make_cells
from selfsup.scaling.ladder import LadderConfig, account, nearest_divisor, sizes
from selfsup.scaling.mup_ladder import depths_of
from selfsup.scaling.sweep_config import Prior, SweepConfig
from text_runs import masked

TEXT = {"vocab_size": 128, "max_length": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
MAE = {"name": "mae", "decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2}
LADDER = LadderConfig(widths=(16, 32, 64, 96), depths=(2, 2, 3, 4), head_dim=16)


def recipe(name, **optim):
    text = name in ("clm", "mlm")
    data = {"shards": "nowhere"}
    if name in ("simclr", "byol"):
        data["views"] = {"simclr": "simclr-32", "byol": "byol"}[name]
    content = {
        "objective": MAE if name == "mae" else {"name": name},
        "encoder": {**TEXT, "causal": name == "clm"} if text else VIT,
        "data": data, "optim": {"base_lr": 1e-3, **optim}, "run": {"dir": "nowhere"},
    }  # fmt: skip
    return validate(Recipe, content)


def sweep(grid, rule=None, **rest):
    content = {
        "recipe": "base.yaml", "held_out": {"shards": "nowhere"}, "ladder": LADDER.model_dump(), "grid": grid,
        "rule": rule or {"name": "fixed", "lr": 1e-3, "batch": 256}, **rest,
    }  # fmt: skip
    return validate(SweepConfig, content)


def batch_for(made):
    encoder = made.encoder
    if encoder.reads == "text":
        length = encoder.max_length
        if made.objective.name == "mlm":
            targets = int(length * made.objective.mask_ratio)
            return masked([targets], length, encoder.vocab_size)
        tokens = torch.randint(5, encoder.vocab_size, (1, length + 1))
        plain = masked([length], length, encoder.vocab_size)
        return plain._replace(tokens=tokens[:, :-1], labels=tokens[:, 1:].flatten(), where=None)
    zero = torch.zeros(made.objective.views, dtype=torch.int64)  # two images: a batch norm takes no fewer
    images = torch.randn(len(zero), 3, encoder.img_size, encoder.img_size)
    if made.objective.views == 2:
        return ViewBatch((images, images.flip(3)), 0, zero, zero, zero)
    return ImageBatch(images, 0, zero, zero, zero)


@pytest.mark.parametrize("name", ["clm", "mlm", "mae", "simclr", "byol"])
def test_flops_of_every_size_equal_torchs_counter(name):
    base = recipe(name)
    if name == "mlm":  # a whole number of targets: the closed form has the mean
        base = base.model_copy(update={"objective": base.objective.model_copy(update={"mask_ratio": 0.25})})
    for size in sizes(base, LADDER):
        made = base.model_validate({
            **base.model_dump(), **{k: {**base.model_dump()[k], **v} for k, v in size.changes.items()}
        })  # fmt: skip
        objective = made.objective.build(made.encoder)
        with FlopCounterMode(display=False) as counter:
            objective(batch := batch_for(made), 1.0).loss.backward()
        images = len(batch.views[0]) if isinstance(batch, ViewBatch) else 1
        found = counter.get_total_flops()
        if name == "simclr":  # similarities of all pairs of a batch are of no one image
            found -= 6 * (2 * images) ** 2 * made.objective.out_dim
        assert size.account.counted == pytest.approx(found / images, rel=1e-6), size.name


def test_parameters_equal_transformers():
    clm, mlm, mae = (account(recipe(name)) for name in ("clm", "mlm", "mae"))
    with torch.device("meta"):
        gpt = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=16, n_embd=32, n_layer=2, n_head=2))
        bert = BertForMaskedLM(BertConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
            max_position_embeddings=16, type_vocab_size=1,
        ))  # fmt: skip
        vit = ViTMAEForPreTraining(ViTMAEConfig(
            image_size=16, patch_size=4, hidden_size=48, num_hidden_layers=4, num_attention_heads=3,
            intermediate_size=192, decoder_hidden_size=24, decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2, decoder_intermediate_size=96,
        ))  # fmt: skip
    assert clm.all == gpt.num_parameters()
    assert clm.no_embedding == gpt.num_parameters(exclude_embeddings=True)
    # transformers' Conv1D holds a layer's matrix: all that is two-dimensional, positions not among it.
    of_blocks = sum(p.numel() for n, p in gpt.transformer.h.named_parameters() if p.ndim == 2)
    assert clm.matrices == of_blocks + gpt.lm_head.weight.numel()
    # BERT's one token type and its norm over embeddings: ours has a last norm instead, and no types.
    assert mlm.all == bert.num_parameters() - 32
    trained = {n: p for n, p in vit.named_parameters() if p.requires_grad}
    assert mae.all == sum(p.numel() for p in trained.values())
    tokens = sum(p.numel() for n, p in trained.items() if n.endswith(("cls_token", "mask_token")))
    assert mae.no_embedding == mae.all - tokens
    weights = [p for n, p in trained.items() if p.ndim in (2, 4) and n.endswith(".weight")]
    assert mae.matrices == sum(p.numel() for p in weights)


def test_flops_by_parameters():
    """6 N_enc a visible patch and 6 N_dec a patch (MAE); 6 N a token; 12 N with two views, 16 N with a target."""
    mae = recipe("mae")
    with torch.device("meta"):
        model = mae.objective.build(mae.encoder)
    encoder = sum(p.numel() for n, p in model.encoder.named_parameters() if n.endswith("weight") and p.ndim > 1)
    decoder = sum(p.numel() for n, p in model.decoder.named_parameters() if n.endswith("weight") and p.ndim > 1)
    assert account(mae).parameters == 6 * (encoder * 4 + decoder * 16)
    clm = account(recipe("clm"))
    assert clm.parameters == 6 * clm.matrices * 16 and clm.unit == 16
    assert account(recipe("simclr")).parameters == 12 * encoder * 16
    assert account(recipe("byol")).parameters == 16 * encoder * 16
    with torch.device("meta"):
        byol = recipe("byol").objective.build(recipe("byol").encoder)
    once = sum(p.numel() for p in byol.parameters() if p.requires_grad)  # the target is trained by nobody
    assert account(recipe("byol")).all == once == sum(
        p.numel() for part in (byol.encoder, byol.projector, byol.predictor) for p in part.parameters() if p.requires_grad
    )  # fmt: skip


def test_the_stock_decoder_is_scaled_along():
    """At ViT-Tiny the stock 8 x 512 decoder is nearly all of MAE's FLOPs: it must shrink with the encoder."""
    base = validate(Recipe, {
        "encoder": {"embed_dim": 768, "depth": 12, "num_heads": 12}, "data": {"shards": "x"}, "run": {"dir": "x"},
    })  # fmt: skip
    tiny, whole = sizes(base, LadderConfig(widths=(192, 768), depths=(12, 12), head_dim=64))
    assert tiny.changes["objective"] == {"decoder_embed_dim": 128, "decoder_depth": 8, "decoder_num_heads": 4}
    assert whole.changes["objective"] == {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
    # Both parts scale alike, so that the decoder's share stays what it was to within the narrow ends.
    assert tiny.account.counted < whole.account.counted / 12


def test_isoflop_cells_are_on_target_above_the_floors_and_around_the_optimum():
    grid = {"name": "isoflop", "budgets": [3e11, 1e12], "per_budget": 3, "hold_out": [3e12], "hold_out_sizes": 1}
    floors = {"steps": 20, "ratio": 1.0}
    prior = {"E": 1.0, "A": 20.0, "B": 60.0, "alpha": 0.4, "beta": 0.4}
    for flops in ("counted", "parameters"):
        config = sweep(grid, floors=floors, flops=flops, repeat_seeds=[1, 2], probe_lr=[0.5, 2.0])
        made = make_cells(recipe("clm"), config, prior)
        assert made.cells and len({cell.id for cell in made.cells}) == len(made.cells)
        roles = [cell.role for cell in made.cells]
        assert [roles.count(r) for r in ("grid", "hold-out", "repeat", "probe")] == [6, 1, 2, 4]
        for cell in made.cells:
            assert cell.flops == pytest.approx(cell.budget, rel=0.01)
            assert cell.steps >= 20 and cell.samples >= cell.params
            assert cell.samples == cell.steps * cell.batch * 16
            assert cell.recipe["optim"]["steps"] == cell.steps and "dir" not in cell.recipe["run"]
        first = [cell for cell in made.cells if cell.role == "grid" and cell.budget == 3e11]
        losses = law.chinchilla(**prior, params=np.array([c.params for c in first]),
                                samples=np.array([c.samples for c in first]))  # fmt: skip
        assert losses.argmin() in (0, 1, 2)
    repeats = [cell for cell in made.cells if cell.role == "repeat"]
    assert [cell.recipe["seed"] for cell in repeats] == [cell.seed for cell in repeats] == [1, 2]
    probes = [cell for cell in made.cells if cell.role == "probe"]
    assert sorted(cell.lr for cell in probes) == [5e-4, 5e-4, 2e-3, 2e-3]


def test_what_is_left_out_is_counted():
    grid = {"name": "isoflop", "budgets": [3e9, 1e10], "per_budget": 4}
    made = make_cells(recipe("clm"), sweep(grid, floors={"steps": 200, "ratio": 1.0}), Prior().model_dump())
    below = sum(count for reason, count in made.left_out.items() if "floors" in reason and "cells" in reason)
    assert below and len(made.cells) + below == 8
    with pytest.raises(ValueError, match="no cell is left: .*floors.steps 100000"):
        make_cells(recipe("clm"), sweep(grid, floors={"steps": 100000}), Prior().model_dump())


def test_rules_set_rate_and_batch():
    grid = {"name": "product", "samples": [1e6, 4e6]}
    porian = make_cells(recipe("clm"), sweep(grid, {"name": "porian"}, floors={"steps": 1}), Prior().model_dump())
    one = porian.cells[0]
    assert one.lr == pytest.approx(0.0047 * (one.counts["params_matrices"] / 108e6) ** (-1 / 3))
    steplaw = make_cells(recipe("clm"), sweep(grid, {"name": "steplaw"}, floors={"steps": 1}), Prior().model_dump())
    one = steplaw.cells[0]
    assert one.lr == pytest.approx(1.79 * one.counts["params_no_embedding"] ** -0.713 * 1e6**0.307)
    power = {"name": "power", "lr_factor": 2.0, "lr_params": -0.5, "batch_factor": 160.0}
    one = make_cells(recipe("clm"), sweep(grid, power, floors={"steps": 1}), Prior().model_dump()).cells[0]
    assert one.lr == pytest.approx(2 * one.params**-0.5) and one.batch == 10
    with pytest.raises(ValueError, match="rule.name: porian is for language models"):
        make_cells(recipe("mae"), sweep(grid, {"name": "porian"}), Prior().model_dump())


def test_branches_leave_where_their_decay_begins():
    grid = {"name": "trunk", "samples": [1e5, 2e5, 4e5]}
    base = recipe("clm", schedule="wsd", warmup_fraction=0.05, decay_fraction=0.2)
    made = make_cells(base, sweep(grid, floors={"steps": 100}), Prior().model_dump())
    assert len(made.cells) == 12
    for trunk in (cell for cell in made.cells if cell.trunk is None):
        branches = [cell for cell in made.cells if cell.trunk == trunk.id]
        assert len(branches) == 2
        long = validate(Recipe, {**trunk.recipe, "run": {**trunk.recipe["run"], "dir": "x"}}).optim
        for branch in branches:
            short = validate(Recipe, {**branch.recipe, "run": {**branch.recipe["run"], "dir": "x"}}).optim
            rates = [(short.lr(step), long.lr(step)) for step in range(branch.steps)]
            same = [a == b for a, b in rates]
            assert all(same[: branch.branch_step + 1]) and not any(same[branch.branch_step + 1 :])
            assert branch.branch_step % trunk.recipe["run"]["checkpoint_every"] == 0
    with pytest.raises(ValueError, match="trunk needs optim.schedule wsd"):
        make_cells(recipe("clm"), sweep(grid), Prior().model_dump())


def test_names_are_of_the_content():
    grid = {"name": "product", "samples": [1e6]}
    floors = {"floors": {"steps": 1}}
    names = [c.id for c in make_cells(recipe("clm"), sweep(grid, **floors), Prior().model_dump()).cells]
    again = [c.id for c in make_cells(recipe("clm"), sweep(grid, **floors), Prior().model_dump()).cells]
    other = make_cells(recipe("clm", weight_decay=0.2), sweep(grid, **floors), Prior().model_dump()).cells
    moved = sweep(grid, **floors, held_out={"shards": "elsewhere"})
    assert names == again and not set(names) & {c.id for c in other}
    assert not set(names) & {c.id for c in make_cells(recipe("clm"), moved, Prior().model_dump()).cells}
    # What y depends on, of each objective its own: a temperature renames cells of simclr only.
    warmer = sweep(grid, **floors, held_out={"shards": "nowhere", "temperature": 0.2, "neighbour_samples": 500})
    same = {name: [{c.id for c in make_cells(recipe(name), config, Prior().model_dump()).cells}
                   for config in (sweep(grid, **floors), warmer)] for name in ("clm", "simclr", "byol")}  # fmt: skip
    assert same["clm"][0] == same["clm"][1] == set(names)
    assert not same["simclr"][0] & same["simclr"][1] and not same["byol"][0] & same["byol"][1]


def test_nearest_divisor_and_faults():
    assert [nearest_divisor(96, 96 / 16), nearest_divisor(24, 24 / 16), nearest_divisor(7, 3.0)] == [6, 2, 7]
    with pytest.raises(ValueError, match="widths: expected different ones, ascending"):
        validate(LadderConfig, {"widths": [32, 16], "aspect": 8, "head_dim": 16})
    with pytest.raises(ValueError, match="depths: expected depths, one a width, or aspect"):
        validate(LadderConfig, {"widths": [16, 32], "head_dim": 16})


MUP = {"name": "mup", "lr": 4e-3, "batch": 160, "base_width": 32}


@pytest.mark.parametrize("name", ["clm", "mlm", "mae"])
def test_mup_is_in_every_cell_at_one_rate(name):
    grid = {"name": "product", "samples": [1e5]}
    ladder = {"widths": [32, 64, 96], "depths": [2, 2, 2], "head_dim": 16}
    base = recipe(name)
    if name == "mae":  # half the encoder's width, heads of 8 channels, at every width
        base = base.model_validate(merge(base.model_dump(), {"objective": {"decoder_num_heads": 3}}))
    config = sweep(grid, MUP, floors={"steps": 1}, ladder=ladder, probe_lr=[0.5], repeat_seeds=[1])
    cells = make_cells(base, config, Prior().model_dump()).cells
    assert [cell.role for cell in cells] == ["grid"] * 3 + ["repeat", "probe", "probe"][: len(cells) - 3]
    assert len(cells) >= 5 and {cell.recipe["optim"]["mup_base_width"] for cell in cells} == {32}
    assert {cell.lr for cell in cells if cell.role != "probe"} == {4e-3} and {cell.batch for cell in cells} == {
        10 if name != "mae" else 160
    }  # fmt: skip
    fixed = make_cells(base, sweep(grid, floors={"steps": 1}, ladder=ladder), Prior().model_dump()).cells
    assert {cell.recipe["optim"]["mup_base_width"] for cell in fixed} == {None}


@pytest.mark.parametrize(
    "name,changes,ladder,line",
    [
        ("clm", {}, {"heads": [2, 2, 4]}, "ladder.head_dim: muP needs the same number of channels a head at every width, "
                                          r"got \[16, 32, 24\]"),
        ("clm", {"encoder": {"activation": "swiglu"}}, {}, "encoder.hidden_dim: muP needs it in one proportion"),
        ("mae", {"objective": {"decoder_num_heads": 2}}, {"widths": [32, 64, 80]},
         "objective.decoder_num_heads: muP needs the same number of channels a head"),
        ("clm", {"optim": {"name": "lars"}}, {}, "rule.name: mup is for optim.name adamw, got lars"),
        ("simclr", {}, {}, "optim.mup_base_width: expected none, muP is here for clm, mlm, mae, got"),
    ],
)  # fmt: skip
def test_where_mup_does_not_hold_the_sweep_is_refused(name, changes, ladder, line):
    grid = {"name": "product", "samples": [1e5]}
    widths = {"widths": [32, 64, 96], "depths": [2, 2, 2]}
    ladder = {**widths, **({} if "heads" in ladder else {"head_dim": 16}), **ladder}
    content = recipe(name).model_dump(mode="json")
    content["optim"] = {"base_lr": 1e-3}
    base = validate(Recipe, merge(content, changes))
    with pytest.raises(ValueError, match=line):
        make_cells(base, sweep(grid, MUP, floors={"steps": 1}, ladder=ladder), Prior().model_dump())


def test_a_recipe_with_mup_is_checked_under_any_rule():
    grid = {"name": "product", "samples": [1e5]}
    ladder = {"widths": [32, 64], "depths": [2, 2], "heads": [2, 2]}
    with pytest.raises(ValueError, match="ladder.head_dim: muP needs the same number"):
        make_cells(recipe("clm", mup_base_width=32), sweep(grid, ladder=ladder), Prior().model_dump())


def test_depths_under_mup_are_warned_of():
    assert depths_of(LadderConfig(widths=(32, 64), depths=(2, 2), head_dim=16)) == []
    (found,) = depths_of(LadderConfig(widths=(32, 64), depths=(2, 6), head_dim=16))
    assert (found.check, found.value, found.refuses) == ("depth under muP", 3, False) and "2 to 6" in found.text
