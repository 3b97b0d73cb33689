"""The benchmark against lightly: it runs, both sides compute the same losses, and its figures are what they say.

No timing is asserted. What needs lightly is skipped where it is not installed.
"""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from running import ROOT
from selfsup.data.images import ImageData
from selfsup.data.index import open_shards
from selfsup.data.pack import pack_arrays
from selfsup.encoders.timm import TimmConfig
from selfsup.encoders.vit import ViTConfig
from selfsup.objectives.byol import BYOLConfig, byol_loss
from selfsup.objectives.simclr import SimCLRConfig, nt_xent

sys.path.insert(0, str(ROOT / "tools"))

import bench_simclr
from bench_simclr import Turn, main, take_turns, view_batch
from bench_simclr_learn import planned_steps
from bench_simclr_peers import INSTALL, build, open_batches, timm_backbone

CPU = torch.device("cpu")
VIT = ViTConfig(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
OBJECTIVES = {
    "simclr": SimCLRConfig(temperature=0.5, hidden_dim=24, out_dim=12),
    "byol": BYOLConfig(hidden_dim=24, out_dim=12),
}
RECIPE = """
objective: {name: simclr, temperature: 0.5, hidden_dim: 24, out_dim: 12}
encoder: {img_size: 16, patch_size: 4, embed_dim: 32, depth: 1, num_heads: 2}
data: {views: simclr-32}
optim: {batch_size: 8, base_lr: 1.0e-2, clip_grad_norm: 1.0}
run: {dir: unused}
"""


def lightly():
    return pytest.importorskip("lightly", reason="lightly is not installed")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """64 and 32 small images of two classes: dark and bright."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for split, samples in (("train", 64), ("test", 32)):
        labels = np.arange(samples) % 2
        images = rng.integers(0, 128, (samples, 20, 20, 3)) + 127 * labels[:, None, None, None]
        pack_arrays(images.astype(np.uint8), labels, ["dark", "bright"], folder / split, 32)
    return folder / "train"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_of_ours(objective, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_simclr, "encoder_of", lambda _: VIT)
    report = tmp_path / "report.json"
    words = f"speed --objectives {objective} --models vit --precisions bf16 --inputs ready --only selfsup"
    assert main([*words.split(), "--batch-size", "4", "--rounds", "1", "--json", str(report)]) == 0
    (contest,) = json.loads(report.read_text())["contests"]
    row = contest["contestants"]["selfsup"]
    assert contest["problems"] == [] and len(row["seconds"]) == 1 and row["ratios"] == [1.0]
    trained = [p for p in OBJECTIVES[objective].build(VIT).parameters() if p.requires_grad]
    assert row["parameters"] > sum(p.numel() for p in trained)  # its heads are lightly's, larger than these
    assert contest["flops_per_image"] == bench_simclr.OBJECTIVES[objective].build(VIT).flops_per_sample()


def test_every_model_is_the_one_in_the_help():
    vit, resnet = bench_simclr.encoder_of("vit"), bench_simclr.encoder_of("resnet18")
    assert (vit.img_size, vit.num_patches, vit.embed_dim, vit.depth) == (64, 64, 192, 12)
    assert resnet.build().forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)  # 1/8, not 1/32


def test_turns_with_a_loader(shards):
    """A turn starts a loader, takes one step that does not count, and ends the loader's process."""
    index, data = open_shards(str(shards)), ImageData(shards=str(shards), views="simclr-32")
    batches = open_batches("selfsup", data, index, VIT, 8, 1, CPU)
    first = next(batches)
    batches.close()
    second = next(batches)  # goes on where it was
    batches.close()
    assert first.views[0].shape == first.views[1].shape == (8, 3, 16, 16)
    assert first.position.tolist() == list(range(8)) and second.position.tolist() == list(range(8, 16))
    side = Turn(build("selfsup", OBJECTIVES["simclr"], VIT), batches, "fp32")
    take_turns({"selfsup": side}, rounds=2, steps=2, device=CPU)
    assert len(side.seconds) == 2 and len(side.losses) == 2 * (1 + 2) and batches._running is None


def test_who_begins_changes_every_round():
    class Runner:
        def __init__(self, name: str):
            self.name = name

        def turn(self, steps: int, device: torch.device) -> None:
            order.append(self.name)

    order: list[str] = []
    take_turns({name: Runner(name) for name in "ab"}, rounds=3, steps=1, device=CPU)
    assert "".join(order) == "abbaab"


def test_byol_target_moves_with_the_step():
    torch.manual_seed(0)
    module = build("selfsup", OBJECTIVES["byol"], VIT)
    batch = view_batch([torch.randn(4, 3, 16, 16) for _ in range(2)])
    before = module.objective.target_projector[0].weight.clone()
    turn = Turn(module, iter([batch] * 2), "fp32")
    turn.step()
    assert not torch.equal(module.objective.target_projector[0].weight, before)


@pytest.mark.parametrize("side", ["selfsup", "lightly"])
def test_learn(side, shards, tmp_path, capsys):
    if side == "lightly":
        lightly()
    config, out = tmp_path / "recipe.yaml", tmp_path / "out"
    config.write_text(RECIPE)
    words = f"learn {config} --minutes 0.002 --out {out} --side {side} --measure-seconds 0 --workers 0"
    assert main([*words.split(), "--data.shards", str(shards), "--optim.warmup-fraction", "0.1"]) == 0
    report = json.loads((out / "report.json").read_text())
    steps = report["recipe"]["optim"]["steps"]
    assert steps == planned_steps(0.002, report["measured_seconds_per_step"]) == len(report["losses"])
    assert report["epochs"] == steps * 8 / 64 and report["recipe"]["optim"]["warmup_fraction"] == 0.1
    assert report["final_loss"] == pytest.approx(np.mean(report["losses"][-50:]))
    assert report["knn"] > 0.9 and report["logreg"]["accuracy"] > 0.9  # dark from bright
    assert f"{steps} steps" in capsys.readouterr().out
    encoder = ViTConfig(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2).build()
    encoder.load_state_dict(load_file(out / "encoder.safetensors"))


def test_planned_steps():
    assert planned_steps(30, 1.5) == 1200 and planned_steps(1, 7.0) == 8 and planned_steps(0.001, 60) == 1


def test_lightly_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lightly", None)
    for words in ("speed", f"learn x.yaml --minutes 1 --out {tmp_path / 'out'}"):
        with pytest.raises(ValueError, match="lightly cannot be imported") as error:
            main(words.split())
        assert INSTALL in str(error.value)


@pytest.mark.parametrize(
    "words, message",
    [
        ("speed --rounds 0", "--rounds"),
        ("speed --only selfsup --json /no/such/folder/x.json", "--json"),
        ("speed --only selfsup --optim.steps 3", "no such option: --optim.steps 3"),
        ("learn x.yaml --minutes 0 --out x --side selfsup", "--minutes"),
        ("learn x.yaml --minutes 1 --out . --side selfsup", "already exists"),
    ],
)
def test_faults_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        main(words.split())


def test_lightly_starts_from_our_weights():
    """The same names, shapes, values and outputs; what we do not train is not trained."""
    for encoder in (
        VIT,
        VIT.model_copy(update={"pool": "mean", "pos_embed": "learned"}),
        TimmConfig(model="resnet18", img_size=32, stem="cifar"),
    ):
        torch.manual_seed(0)
        ours = encoder.build().eval()
        torch.manual_seed(0)
        theirs = timm_backbone(encoder).eval()
        images = torch.randn(2, 3, encoder.img_size, encoder.img_size)
        assert (ours(images) - theirs(images)).abs().max() < 1e-5
        frozen = [
            {n.removeprefix("model.") for n, p in m.named_parameters() if not p.requires_grad}
            for m in (ours, theirs)
        ]
        assert frozen[0] == frozen[1] == ({"pos_embed"} if encoder == VIT else set())


def test_simclr_losses_agree():
    """With float64 embeddings of one batch: value and gradient."""
    lightly()
    from lightly.loss import NTXentLoss

    torch.manual_seed(0)
    z = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)

    def gap(temperature: float, mine) -> float:
        losses = (mine(z[0], z[1], 0.2).mean(), NTXentLoss(temperature)(z[0], z[1]))
        grads = [torch.autograd.grad(loss, z)[0] for loss in losses]
        return max((losses[0] - losses[1]).abs().item(), (grads[0] - grads[1]).abs().max().item())

    assert gap(0.2, nt_xent) < 1e-12
    assert gap(0.3, nt_xent) > 1e-2  # another temperature
    assert gap(0.2, lambda a, b, t: nt_xent(a, b.roll(1, 0), t)) > 1e-2  # a neighbour for the partner
    assert gap(0.2, lambda a, b, t: nt_xent(a, b, t)[:6]) > 1e-3  # one direction only


def test_byol_losses_agree():
    """Ours for one direction is 2 + 2 times the negative cosine; for both, 4 + 4 times lightly's half sum."""
    lightly()
    from lightly.loss import NegativeCosineSimilarity

    torch.manual_seed(0)
    p, z = torch.randn(2, 6, 5, dtype=torch.float64)
    theirs = 2 + 2 * NegativeCosineSimilarity()(p, z)
    assert (byol_loss(p, z).mean() - theirs).abs() < 1e-12
    assert (byol_loss(p, z.roll(1, 0)).mean() - theirs).abs() > 1e-2
    assert (F.mse_loss(p, z) - theirs).abs() > 1e-2  # not normalised


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_whole_steps_agree(objective):
    """With our weights, in float64: the loss, and the gradient of the first layer.

    SimCLR in eval mode: lightly's batch norm sees a view at a time, ours both, as the publication's does.
    """
    lightly()
    torch.manual_seed(0)
    ours, theirs = (build(side, OBJECTIVES[objective], VIT).double() for side in ("selfsup", "lightly"))
    theirs.encoder.load_state_dict(ours.encoder.state_dict())
    heads = {"projection_head": "projector", "prediction_head": "predictor"}
    if objective == "byol":
        heads["momentum_projection_head"] = "target_projector"
        theirs.momentum_encoder.load_state_dict(ours.objective.target_encoder.state_dict())
    for name, mine in heads.items() if objective == "byol" else [("projection_head", "projector")]:
        weights = ours.objective.get_submodule(mine).state_dict()
        head = getattr(theirs, name).layers
        for key, value in head.state_dict().items():
            # BYOL's biases stand elsewhere: ours before the batch norm, which takes them out again; theirs after all.
            value.copy_(weights.get(key, torch.zeros_like(value)))
    if objective == "simclr":
        ours.eval(), theirs.eval()
    views = list(torch.randn(2, 6, 3, 16, 16, dtype=torch.float64))
    losses = [ours(view_batch(views)), theirs(views)]
    scale = 4 if objective == "byol" else 1
    shift = 4 if objective == "byol" else 0
    assert (losses[0] - (shift + scale * losses[1])).abs() < 1e-9
    for loss in losses:
        loss.backward()
    grads = [module.encoder.patch_embed.proj.weight.grad for module in (ours, theirs)]
    assert (grads[0] - scale * grads[1]).norm() < 1e-7 * grads[0].norm()


def test_lightly_reads_the_same_images(shards):
    """Without its transform: the pixels that our reader gives; with it: two views of the right shape, normalised."""
    lightly()
    from bench_simclr_peers import EncodedImages

    from selfsup.data.images import eval_batches

    index = open_shards(str(shards))
    images = EncodedImages(index, lambda image: np.asarray(image))
    pixels, labels, _ = next(eval_batches(index, 20, 3, len(index)))
    for row in range(len(index)):
        image, label = images[row]
        assert np.array_equal(image, pixels[row].permute(1, 2, 0).numpy()) and label == labels[row]
    data = ImageData(shards=str(shards), views="simclr-32", mean=(0.5,) * 3, std=(0.25,) * 3)
    batches = open_batches("lightly", data, index, VIT, 8, 0, CPU)
    views = next(batches)
    assert [view.shape for view in views] == [(8, 3, 16, 16)] * 2 and not torch.equal(*views)
    assert -2 <= min(view.min() for view in views) < 0 < max(view.max() for view in views) <= 2
    with pytest.raises(ValueError, match="data.views"):
        open_batches("lightly", data.model_copy(update={"views": "byol"}), index, VIT, 8, 0, CPU)
