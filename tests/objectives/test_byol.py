"""BYOL's loss against a loop, the target against the closed form, and where no gradient may flow."""

import math

import pytest
import torch

from joint import batch_of, recipe
from mutants import exec_changed
from selfsup.objectives import byol
from selfsup.objectives.byol import BYOL, byol_loss, target_momentum


def built(momentum: float = 0.9) -> BYOL:
    torch.manual_seed(0)
    small = recipe(objective={"name": "byol", "momentum": momentum})
    return small.objective.build(small.encoder).double()


def by_loop(p, z):
    """Equation 2 of the paper, image by image: squared distance of the normalised vectors."""
    unit = [[row / sum(v * v for v in row) ** 0.5 for row in rows] for rows in (p.double(), z.double())]
    return torch.stack([sum((a - b) ** 2 for a, b in zip(*pair)) for pair in zip(*unit)])


def test_the_loss_against_a_loop():
    p, z = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(6, dtype=torch.float64)
    ours, theirs = byol_loss(p, z), by_loop(p, z.detach())
    assert torch.allclose(ours, theirs, atol=1e-12)
    gradients = [torch.autograd.grad((loss * weights).sum(), p)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-12)
    same = torch.randn(3, 4)
    assert byol_loss(same, 2 * same).abs().max() < 1e-6 and (byol_loss(same, -same) - 4).abs().max() < 1e-6


def test_the_loss_is_symmetric_and_each_view_has_its_own_statistics():
    objective, batch = built(), batch_of(5, dtype=torch.float64)
    a, b = batch.views
    loss = objective(batch, 5.0).loss
    p_a, p_b = (objective.predictor(objective.projector(objective.encoder(v))) for v in (a, b))
    z_a, z_b = (objective.target_projector(objective.target_encoder(v)) for v in (a, b))
    assert torch.allclose(loss, (by_loop(p_a, z_b) + by_loop(p_b, z_a)).mean(), atol=1e-12)
    assert torch.allclose(objective(batch._replace(views=(b, a)), 5.0).loss, loss, atol=1e-12)
    both = objective.predictor(objective.projector(objective.encoder(torch.cat([a, b]))))
    assert not torch.allclose(both[:5], p_a, atol=1e-3)  # one batch norm over both views is something else


def gradients(objective: BYOL) -> list[torch.Tensor | None]:
    objective.zero_grad()
    torch.manual_seed(3)
    objective(batch_of(5, dtype=torch.float64), 5.0).loss.backward()
    return [p.grad for p in objective.parameters()]


def test_no_gradient_reaches_the_target():
    objective = built()
    gradients(objective)
    for name, p in objective.named_parameters():
        fixed = name.startswith("target_") or name == "encoder.pos_embed"
        assert (p.grad is None) == fixed, name


def test_a_target_with_gradient_is_caught(monkeypatch):
    """The planted bug: the online network's own projection as the target, gradient and all."""
    objective = built()
    right = gradients(objective)
    monkeypatch.setattr(byol, "byol_loss", exec_changed(byol, "byol_loss", "z.detach()", "z"))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(right, gradients(objective)))
    monkeypatch.setattr(BYOL, "target", lambda self, x: self.projector(self.encoder(x)))
    leaking = gradients(objective)
    monkeypatch.undo()
    monkeypatch.setattr(BYOL, "target", lambda self, x: self.projector(self.encoder(x)))  # the loss alone stops it
    stopped = gradients(objective)
    assert max((a - b).abs().max() for a, b in zip(leaking, stopped) if a is not None) > 1e-6


def test_the_target_starts_from_weights_of_its_own():
    objective = built()
    assert not torch.equal(objective.encoder.blocks[0].mlp.fc1.weight, objective.target_encoder.blocks[0].mlp.fc1.weight)
    assert [tuple(p.shape) for p in objective.encoder.parameters()] == [
        tuple(p.shape) for p in objective.target_encoder.parameters()
    ]


def test_momentum_rises_from_its_value_to_one():
    assert target_momentum(0.0, 0.97) == 0.97 and target_momentum(1.0, 0.97) == 1.0
    assert target_momentum(0.5, 0.9) == pytest.approx(0.95)
    for progress in (0.1, 0.3, 0.8):
        assert target_momentum(progress, 0.9) == pytest.approx(1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2)


def after(steps: int, objective: BYOL) -> dict[str, float]:
    """The largest error of the target against the closed form after some changes of the online weights."""
    torch.manual_seed(1)
    online = {k: v for k, v in objective.named_parameters() if k.split(".")[0] in ("encoder", "projector")}
    start = {k: objective.get_parameter(f"target_{k}").detach().clone() for k in online}
    seen = []
    for step in range(steps):
        with torch.no_grad():
            for p in online.values():
                p += torch.randn_like(p)
        seen.append({k: v.detach().clone() for k, v in online.items()})
        objective.after_step(step / steps)
    keep = [1 - 0.1 * (math.cos(math.pi * step / steps) + 1) / 2 for step in range(steps)]
    errors = {}
    for k in online:
        expected = math.prod(keep) * start[k]
        for i, weights in enumerate(seen):
            expected = expected + (1 - keep[i]) * math.prod(keep[i + 1 :]) * weights[k]
        errors[k] = (objective.get_parameter(f"target_{k}") - expected).abs().max().item()
    return errors


def test_the_target_is_the_closed_form():
    assert max(after(5, built()).values()) < 1e-12


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1 - keep", "keep"),
        ("(target, online", "(target[:30], online[:30]"),
        ("target_momentum(progress,", "target_momentum(0.0,"),
    ],
    ids=["weights_swapped", "projector_forgotten", "constant_momentum"],
)
def test_a_wrong_average_is_caught(monkeypatch, old, new):
    monkeypatch.setattr(BYOL, "after_step", exec_changed(byol, "BYOL.after_step", old, new))
    assert max(after(5, built()).values()) > 1e-3


def test_buffers_are_not_averaged():
    objective = built()
    before = {k: v.clone() for k, v in objective.named_buffers()}
    objective.after_step(0.0)
    assert all(torch.equal(v, before[k]) for k, v in objective.named_buffers())
    objective(batch_of(5, dtype=torch.float64), 5.0)
    moved = {k for k, v in objective.named_buffers() if not torch.equal(v, before[k])}
    assert any(k.startswith("target_projector") for k in moved)  # its own statistics, in training mode
