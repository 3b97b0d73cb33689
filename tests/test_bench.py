"""The benchmark against peers: it runs, its figures are what they say, and the contestants do the same work.

No timing is asserted.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from running import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from bench_mae import Options, main
from bench_mae_measure import WARMUP, Ceiling, Contestant, interleave, summarise, unfair
from bench_mae_peers import WORDS, build
from bench_mae_profile import GROUPS, REST, group_of, profile_steps

SIZES = {
    "img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 2, "batch_size": 8,
    "decoder_embed_dim": 48, "decoder_depth": 2, "decoder_num_heads": 3,
}  # fmt: skip
CPU = torch.device("cpu")


def bench(*arguments: object, path: str | None = None) -> subprocess.CompletedProcess:
    sizes = [word for key, value in SIZES.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, str(ROOT / "tools" / "bench_mae.py"), *sizes, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if path is None else {"PYTHONPATH": path})
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_contest(tmp_path):
    """All rows, valid JSON, and a contestant whose library is missing is said to be left out."""
    (tmp_path / "lightly.py").write_text("raise ModuleNotFoundError('lightly is missing here')\n")
    only = ("selfsup", "transformers", "timm", "lightly")
    report = tmp_path / "report.json"
    arguments = ("--rounds", 2, "--precision", "fp32", "--json", report, "--only", *only)
    done = bench(*arguments, path=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "left out: lightly: lightly is missing here" in lines
    for name in only[:3]:
        (row,) = [line for line in lines if line.startswith(WORDS[name])]
        assert "unknown" in row, "a CPU has no data-sheet peak"
    facts = json.loads(report.read_text())
    assert list(facts["contestants"]) == list(only[:3]) and list(facts["left_out"]) == ["lightly"]
    assert facts["encoder"]["embed_dim"] == 32 and facts["batch_size"] == 8
    assert facts["versions"]["torch"] and facts["options"]["rounds"] == 2 and facts["problems"] == []
    assert len(facts["ceiling"]["rounds"]) == WARMUP + 2
    assert facts["ceiling"]["flops_per_second"] == max(facts["ceiling"]["rounds"])
    for row in facts["contestants"].values():
        assert len(row["seconds"]) == len(row["ratios"]) == 2 and len(row["losses"]) == WARMUP + 2
        assert min(row["ratios"]) > 0 and row["ratio"] > 0 and row["mfu"] > 0 and row["mfu_of_peak"] is None
    assert facts["contestants"]["selfsup"]["ratios"] == [1.0, 1.0]


def test_profile_accounts_for_the_step(tmp_path):
    done = bench("--profile", "--rounds", 1, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    groups = json.loads((tmp_path / "report.json").read_text())["profile"]["selfsup"]
    assert set(groups) == {*GROUPS, REST}
    for group, operators in groups.items():
        assert sum(operators.values()) > 0, f"{group}: nothing in a step of MAE"
        assert any(line.startswith(group) for line in done.stdout.splitlines())
    assert "aten::bmm" in groups["attention"] and "aten::addmm" in groups["matrix products"]


@pytest.mark.parametrize(
    "operator, group",
    [
        ("aten::mm", "matrix products"),
        ("aten::convolution_backward", "matrix products"),
        ("aten::bmm", "attention"),
        ("aten::_softmax_backward_data", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::gelu_backward", "GELU"),
        ("aten::native_layer_norm", "norms"),
        ("aten::native_batch_norm_backward", "norms"),
        ("aten::add_", "element-wise, sums"),
        ("aten::copy_", "copies, casts, fills"),
        ("aten::scatter_add_", "gather, scatter, sort"),
        ("aten::_fused_adamw_", "optimizer"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("aten::matmul", REST),  # only calls mm or bmm
        ("aten::view", REST),
        ("AddmmBackward0", REST),
    ],
)
def test_groups(operator, group):
    assert group_of(operator) == group


def test_profile_adds_up():
    """Own times only: an operator inside another is not counted twice, and nothing is left out."""
    x = torch.randn(600, 600, requires_grad=True)
    clocked = []

    def step() -> None:
        began = time.perf_counter()
        (x @ x @ x @ x).softmax(dim=-1).sum().backward()
        clocked.append(time.perf_counter() - began)

    groups = profile_steps(step, 5, CPU)
    total, inside = sum(sum(operators.values()) for operators in groups.values()), sum(clocked[-5:]) / 5
    assert 0.9 * inside < total < 2 * inside  # the same steps by another clock, not a speed


def test_figures():
    """Worked by hand; the median of ratios (4) is not the ratio of medians (2)."""
    seconds = {"first": [4.0, 2.0, 8.0], "second": [1.0, 2.0, 2.0], "third": [4.0, 4.0, 4.0]}
    figures = summarise(seconds, ceiling=1000.0, peak=4000.0, batch_size=10, flops_per_image=100.0)
    assert figures["first"]["ratios"] == [1.0, 1.0, 1.0]
    assert figures["second"]["ratios"] == [4.0, 1.0, 4.0] and figures["second"]["ratio"] == 4.0
    assert figures["third"]["ratio"] == 1.0 and figures["third"]["images_per_second"] == 2.5
    assert figures["third"]["mfu"] == 0.25 and figures["third"]["mfu_of_peak"] == 0.0625
    assert summarise(seconds, 1000.0, None, 10, 100.0)["first"]["mfu_of_peak"] is None


def test_everyone_takes_turns_at_being_first():
    class Runner:
        def __init__(self, name: str):
            self.name, self.seconds = name, []

        def step(self) -> None:
            steps.append(self.name)

    class NoCeiling(Ceiling):
        def measure(self) -> None:
            steps.append("ceiling")

    steps: list[str] = []
    runners = {name: Runner(name) for name in "abc"}
    interleave(runners, NoCeiling("fp32", CPU), 4, CPU)
    rounds = "".join(steps).split("ceiling")[1:]
    assert rounds == ["abc", "bca", "cab"] * 2
    assert [len(runner.seconds) for runner in runners.values()] == [4, 4, 4]


def test_unfair_contests_are_called_so():
    fair = {"parameters": 1000, "losses": [2.0, 2.1, 1.0]}
    rows = {name: dict(fair) for name in "abc"}
    assert unfair(rows) == []
    for bug in ({"losses": [1.0, 0.5, 1.0]}, {"losses": [1.0, float("nan")]}, {"parameters": 900}):
        (problem,) = unfair({**rows, "b": {**fair, **bug}})
        assert problem.startswith("b: ")


def test_a_frozen_encoder_is_an_unfair_contest():
    mae, vit, _ = Options(**SIZES).configs()
    images, rows = torch.randn(4, 3, 16, 16), {}
    for name in ("selfsup", "timm", "frozen"):
        module = build("timm" if name == "frozen" else name, mae, vit)
        if name == "frozen":
            module.vit.blocks.requires_grad_(False)
        contestant = Contestant(module, lambda: images, "fp32")
        contestant.step()
        rows[name] = {"parameters": contestant.parameters, "losses": [2.0, 1.0]}
    assert rows["selfsup"]["parameters"] == rows["timm"]["parameters"]
    (problem,) = unfair(rows)
    assert problem.startswith("frozen: trains")


TIMM = {"vit.": "encoder.", "decoder_": "decoder.decoder_", "mask_token": "decoder.mask_token"}
LIGHTLY = {
    "backbone.vit.": "encoder.",
    "decoder_embed.": "decoder.decoder_embed.",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.": "decoder.decoder_",
    "head.": "decoder.decoder_pred.",
}


@pytest.mark.parametrize(
    "name, names", [("timm", TIMM), ("timm-eager", TIMM), ("lightly", LIGHTLY)], ids=lambda v: str(v)[:10]
)
def test_peers_compute_our_loss(name, names, monkeypatch):
    """With our weights and our mask: the same loss, in float64, and the same gradient of the first layer."""
    if name == "lightly":
        pytest.importorskip("lightly", reason="lightly is not installed")
    torch.manual_seed(0)
    mae, vit, batch = Options(**SIZES).configs()
    ours, peer = build("selfsup", mae, vit).double(), build(name, mae, vit).double()
    weights = ours.objective.state_dict()
    for key, value in weights.items():
        if "pos_embed" not in key:
            value += 0.05 * torch.randn_like(value)  # biases and norms that matter
    for key, value in peer.state_dict().items():
        if key == "backbone.mask_token":  # lightly's encoder has one that MAE leaves alone
            continue
        theirs = next(key.replace(old, new, 1) for old, new in names.items() if key.startswith(old))
        value.copy_(weights.pop(theirs))
    assert weights == {}
    images = torch.randn(batch, 3, 16, 16, dtype=torch.float64)
    noise = torch.rand(batch, vit.num_patches)
    monkeypatch.setattr(ours.objective, "noise", lambda _: noise)
    with_class_token = torch.cat([torch.zeros(batch, 1), noise], dim=1)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: with_class_token if name == "lightly" else noise)
    losses = [module(images) for module in (ours, peer)]
    assert abs(losses[0] - losses[1]) < 1e-9 * losses[0]
    for loss in losses:
        loss.backward()
    encoders = (ours.objective.encoder, peer.backbone.vit if name == "lightly" else peer.vit)
    grads = [encoder.patch_embed.proj.weight.grad for encoder in encoders]
    assert (grads[0] - grads[1]).norm() < 1e-7 * grads[0].norm()


@pytest.mark.parametrize("name", WORDS)
def test_attention_is_the_one_in_the_name(name):
    if name == "lightly":
        pytest.importorskip("lightly", reason="lightly is not installed")
    mae, vit, batch = Options(**SIZES).configs()
    images = torch.randn(batch, 3, 16, 16)
    step = Contestant(build(name, mae, vit), lambda: images, "bf16").step
    fused = [key for key in profile_steps(step, 1, CPU)["attention"] if "scaled_dot_product" in key]
    assert bool(fused) == (name in ("transformers", "lightly", "timm", "selfsup-torch"))


@pytest.mark.parametrize("name", ["selfsup", "transformers-eager", "timm-eager"])
def test_the_flops_of_the_mfu_are_those_of_every_contestant(name):
    mae, vit, batch = Options(**SIZES).configs()
    module = build(name, mae, vit)
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(batch, 3, 16, 16)).backward()
    counted, claimed = counter.get_total_flops(), batch * mae.build(vit).flops_per_sample()
    assert abs(counted / claimed - 1) < 0.03


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_heads": 5}, "num_heads: expected a divisor of embed_dim"),
        ({"rounds": 0}, "--rounds"),
        ({"shards": "x", "only": ("timm",)}, "--shards"),
        ({"profile": True, "compile": True}, "--profile"),
        ({"report": ROOT / "no such folder" / "x.json"}, "--json"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(ValueError, match=words):
        main(Options(**{**SIZES, **options}))


def test_presets_give_way_to_options():
    mae, vit, batch = Options(preset="small", embed_dim=192, num_heads=3).configs()
    assert (vit.img_size, vit.patch_size, vit.embed_dim, vit.depth, batch) == (224, 16, 192, 12, 16)
    assert (mae.decoder_embed_dim, mae.decoder_depth, mae.decoder_num_heads) == (512, 8, 16)
