"""run.activation_checkpointing: the same numbers to the last bit, the same names, less memory."""

import copy

import pytest
import torch

from selfsup import start
from selfsup.batch import ImageBatch
from selfsup.config import merge, validate
from selfsup.layers import block
from selfsup.recipe import Recipe

CONTENT = {
    "objective": {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2},
    "encoder": {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 3,
        "drop_path": 0.3,
    },
    "data": {"shards": "d"},
    "run": {"dir": "r"},
}


def built(checkpointing: bool, **encoder):
    content = merge(CONTENT, {"run": {"activation_checkpointing": checkpointing}, "encoder": encoder})
    return start.build_objective(validate(Recipe, content), torch.device("cpu"))


def batch(n: int = 8) -> ImageBatch:
    images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    position = torch.arange(n)
    return ImageBatch(images, 0, torch.zeros_like(position), position, position)


def gradients(objective, bf16: bool = False) -> dict:
    """Loss, every gradient, and where the generator stands afterwards."""
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = objective(batch(), 8.0).loss
    loss.backward()
    found = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    assert len(found) > 40 and all(g is not None for g in found.values())
    return {**found, "loss": loss.detach(), "generator": torch.get_rng_state()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_bitwise_the_same(bf16):
    plain, kept = built(False), built(True)
    assert [m.checkpoint for m in kept.modules() if isinstance(m, block.Block)] == [True] * 6
    assert list(plain.state_dict()) == list(kept.state_dict())
    whole = gradients(plain, bf16)
    assert same(whole, gradients(kept, bf16))
    assert not same(whole, gradients(built(False, drop_path=0.0), bf16))  # drop path was on


def test_forgetting_the_random_numbers_is_caught(monkeypatch):
    right = block.checkpoint

    def forgetful(function, *arguments, use_reentrant, preserve_rng_state):
        return right(function, *arguments, use_reentrant=use_reentrant, preserve_rng_state=False)

    monkeypatch.setattr(block, "checkpoint", forgetful)
    assert not same(gradients(built(False)), gradients(built(True)))


def saved_bytes(objective) -> int:
    """What autograd keeps for the backward pass, every storage once, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = objective(batch(), 8.0).loss
    assert loss.requires_grad
    return sum(kept.values())


def test_less_is_kept_for_the_backward_pass():
    plain, kept = saved_bytes(built(False, depth=12)), saved_bytes(built(True, depth=12))
    assert kept < plain / 4


def test_nothing_is_kept_or_drawn_in_evaluation(monkeypatch):
    def called(*arguments, **options):
        raise AssertionError("checkpointed without a backward pass to come")

    monkeypatch.setattr(block, "checkpoint", called)
    encoder = built(True).encoder.eval()
    with torch.no_grad():
        encoder(batch().images)


def test_a_copy_of_a_model_is_its_own():
    """As an EMA target is copied: its blocks compute with its own weights."""
    encoder = built(True).encoder.eval()
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert not torch.equal(twin(batch().images), encoder(batch().images))


def test_a_model_without_blocks_is_refused(monkeypatch):
    class Other(torch.nn.Module):
        pass

    monkeypatch.setattr(start, "Block", Other)
    built(False)
    with pytest.raises(
        ValueError, match=r"run\.activation_checkpointing: expected a model with transformer blocks"
    ):
        built(True)
