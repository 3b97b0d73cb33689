"""NT-Xent against a slow float64 loop and closed forms, the projector, chunks, and what is refused."""

import math

import pytest
import torch

from joint import RECIPE, batch_of, recipe
from mutants import exec_changed
from selfsup import start
from selfsup.config import validate
from selfsup.objectives import simclr
from selfsup.objectives.simclr import nt_xent
from selfsup.recipe import Recipe


def by_loop(z_a, z_b, temperature):
    """Equation 1, anchor by anchor, in float64."""
    z = [row / sum(v * v for v in row) ** 0.5 for row in [*z_a.double(), *z_b.double()]]
    n, losses = len(z) // 2, []
    for i in range(2 * n):
        similar = [(z[i] * z[k]).sum() / temperature for k in range(2 * n)]
        positive = i + n if i < n else i - n
        rest = sum(torch.exp(s) for k, s in enumerate(similar) if k != i)
        losses.append(-torch.log(torch.exp(similar[positive]) / rest))
    return torch.stack(losses)


def drawn(n: int = 6, d: int = 5, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(n, d, dtype=dtype, requires_grad=True) for _ in range(2)]


def error_of(loss) -> float:
    """The largest difference to the loop, in values and gradients."""
    z, weights = drawn(), torch.randn(12, dtype=torch.float64)
    worst = 0.0
    for temperature in (0.1, 0.5):
        ours, theirs = loss(*z, temperature), by_loop(*z, temperature)
        worst = max(worst, (ours - theirs).abs().max().item())
        gradients = [torch.autograd.grad((value * weights).sum(), z) for value in (ours, theirs)]
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(*gradients)))
    return worst


def test_against_the_loop():
    assert error_of(nt_xent) < 1e-12


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scatter(1, own[:, None]", "scatter(1, (own[:, None] + 1) % len(z)"),  # diagonal off by one
        ("logits.scatter(1, own[:, None], -torch.inf)", "logits"),  # a view is its own negative
        ("here.roll(len(z_a))", "here.roll(1)"),  # another image's view as the positive
        ("/ temperature", "* temperature"),
    ],
    ids=["diagonal_off_by_one", "own_negative", "wrong_positive", "times_temperature"],
)
def test_planted_bugs_are_caught(old, new):
    assert error_of(exec_changed(simclr, "nt_xent", old, new)) > 1e-2


@pytest.mark.parametrize("n", [1, 2, 64])
def test_equal_projections_cost_exactly_the_log_of_all_others(n):
    z = torch.full((n, 3), 0.7, dtype=torch.float64)
    assert torch.allclose(nt_xent(z, z, 0.1), torch.tensor(math.log(2 * n - 1), dtype=torch.float64), atol=1e-12)


def test_half_precision_is_widened():
    z = [part.detach().to(torch.bfloat16) for part in drawn()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(*z, 0.1)
    assert loss.dtype == torch.float32
    assert (loss - by_loop(*z, 0.1)).abs().max() < 1e-5


def test_forward_is_the_mean_over_anchors():
    torch.manual_seed(0)
    objective, batch = recipe().objective.build(recipe().encoder), batch_of(4)
    output = objective(batch, 4.0)
    z_a, z_b = objective.projector(objective.encoder(torch.cat(batch.views))).chunk(2)
    assert torch.allclose(output.loss.double(), by_loop(z_a, z_b, 0.1).mean(), atol=1e-5)
    cosine = torch.cosine_similarity(z_a, z_b).mean()
    assert torch.allclose(output.metrics["positive_cos"], cosine, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_projector_is_the_published_one(layers):
    """Linear-BN-ReLU, the last BN without a learned centre; by hand from the state dict."""
    torch.manual_seed(0)
    projector = simclr.simclr_projector(6, 7, 3, layers).double()
    x = h = torch.randn(9, 6, dtype=torch.float64)
    state = list(projector.state_dict().items())
    for i in range(layers):
        values = {k.split(".")[1]: v for k, v in state if k.split(".")[0] == str(3 * i + 1)}
        h = h @ projector[3 * i].weight.T
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * values["weight"] + values["bias"]
        h = h.clamp_min(0) if i < layers - 1 else h
    assert torch.allclose(projector(x), h, atol=1e-12)
    trained = [name for name, p in projector.named_parameters() if p.requires_grad]
    last = str(3 * layers - 2)
    assert f"{last}.weight" in trained and f"{last}.bias" not in trained
    assert (projector[3 * layers - 2].bias == 0).all() and len(projector) == 3 * layers - 1


def test_chunks_change_nothing_but_memory():
    torch.manual_seed(0)
    batch = batch_of(8, dtype=torch.float64)
    gradients, kept = [], []
    for chunk in (None, 3, 16):
        torch.manual_seed(1)
        objective = recipe(objective={"chunk": chunk}).objective.build(recipe().encoder).double()
        saved = [0]

        def note(tensor, saved=saved):
            saved[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = objective(batch, 8.0).loss
        loss.backward()
        gradients.append([p.grad for p in objective.parameters() if p.requires_grad])
        kept.append(saved[0])
    for whole, *chunked in zip(*gradients):
        assert all(torch.allclose(whole, part, rtol=1e-10, atol=1e-12) for part in chunked)
    assert kept[1] < kept[0] / 4  # what is kept for the backward pass


def test_chunks_are_refused_with_batch_norm_in_the_encoder():
    resnet = {"name": "timm", "model": "resnet10t", "img_size": 32}
    with pytest.raises(ValueError, match=r"objective\.chunk: .*BatchNorm.*leave it out"):
        validate(Recipe, {**RECIPE, "objective": {"name": "simclr", "chunk": 4}, "encoder": resnet})


def test_accumulation_is_refused():
    with pytest.raises(ValueError, match=r"run\.micro_batch: simclr contrasts .* only 4 of 8; .*objective\.chunk"):
        start.batch_plan(recipe(run={"micro_batch": 4}))
    assert start.batch_plan(recipe(run={"micro_batch": 8})).accumulation == 1


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_one_image_is_refused(name):
    with pytest.raises(ValueError, match=rf"^optim\.batch_size: {name} learns .* at least 2 .* got 1"):
        start.batch_plan(recipe(objective={"name": name}, optim={"batch_size": 1}))
    with pytest.raises(ValueError, match=r"^run\.micro_batch: "):
        start.batch_plan(recipe(objective={"name": name}, run={"micro_batch": 1}))
    assert start.batch_plan(recipe(objective={"name": "byol"}, run={"micro_batch": 2})).accumulation == 4


@pytest.mark.parametrize("views", ["none", [{}], [{"count": 3}], [{}, {"size": 8}]])
def test_other_views_are_refused(views):
    with pytest.raises(ValueError, match=r"data\.views: expected 2 views of 16 px, .*simclr-32"):
        recipe(data={"views": views})


def test_mae_takes_one_view():
    with pytest.raises(ValueError, match=r"data\.views: expected none, mae takes one view"):
        validate(Recipe, {**RECIPE, "objective": {"name": "mae"}})

