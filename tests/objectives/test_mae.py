"""MAE's parts against closed forms and slow loops, and its initial state tensor by tensor."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selfsup.batch import ImageBatch, normalise
from selfsup.config import validate
from selfsup.encoders.vit import ViTConfig
from selfsup.objectives.mae import MAEConfig, mae_loss, patchify, unpatchify
from selfsup.objectives.masking import random_masking
from selfsup.optim import param_groups


def tiny(decoder=None, **encoder):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, **encoder}
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4, **(decoder or {})}
    torch.manual_seed(0)
    return validate(MAEConfig, decoder).build(validate(ViTConfig, sizes))


def batch_of(images, position=None):
    position = torch.arange(len(images)) if position is None else position
    return ImageBatch(images, 0, torch.zeros_like(position), position, position)


def test_patchify_against_a_loop():
    images = torch.randn(2, 3, 6, 6)
    patches = patchify(images, 2)
    for row in range(3):
        for column in range(3):
            for dy in range(2):
                for dx in range(2):
                    pixel = images[:, :, 2 * row + dy, 2 * column + dx]
                    at = (dy * 2 + dx) * 3
                    assert torch.equal(patches[:, 3 * row + column, at : at + 3], pixel)
    assert torch.equal(unpatchify(patches, 2, 3), images)


def test_masking():
    noise = torch.rand(5, 49)
    ids_keep, ids_restore, mask = random_masking(noise, 0.75)
    assert ids_keep.shape == (5, 12) and mask.sum(1).tolist() == [37.0] * 5
    for i in range(5):
        least = set(noise[i].argsort()[:12].tolist())
        assert set(ids_keep[i].tolist()) == least == set((mask[i] == 0).nonzero()[:, 0].tolist())
        shuffled = torch.cat(
            [ids_keep[i], torch.tensor(sorted(set(range(49)) - least, key=lambda j: noise[i, j]))]
        )
        assert torch.equal(shuffled[ids_restore[i]], torch.arange(49))


def test_masks_are_keyed_by_position_and_epoch():
    model, images = tiny(), torch.randn(4, 3, 32, 32)
    noise = model.noise(batch_of(images))
    assert torch.equal(noise[2:], model.noise(batch_of(images[2:], torch.arange(2, 4))))
    assert not torch.equal(
        noise, model.noise(batch_of(images)._replace(epoch=torch.ones(4, dtype=torch.long)))
    )
    assert not torch.equal(noise, model.noise(batch_of(images)._replace(seed=1)))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_against_a_loop(norm_pix_loss):
    torch.manual_seed(1)
    pred, target, mask = (
        torch.randn(3, 4, 6),
        torch.randn(3, 4, 6),
        torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0]]),
    )
    losses = []
    for i in range(3):
        terms = []
        for j in range(4):
            if mask[i, j] == 0:
                continue
            want = target[i, j].double()
            if norm_pix_loss:
                mean = want.sum() / 6
                want = (want - mean) / math.sqrt(float(((want - mean) ** 2).sum() / 5) + 1e-6)
            terms.append(((pred[i, j].double() - want) ** 2).sum() / 6)
        losses.append(sum(terms) / len(terms))
    assert torch.allclose(
        mae_loss(pred, target, mask, norm_pix_loss).double(), torch.stack(losses), atol=1e-6
    )


def test_visible_patches_do_not_enter_the_loss():
    pred, target, mask = torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.tensor([[1.0, 0, 0, 0]] * 2)
    changed = target.clone()
    changed[:, 1:] += 5
    assert torch.equal(mae_loss(pred, target, mask, True), mae_loss(pred, changed, mask, True))


def test_encoder_sees_visible_patches_only():
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    noise = model.noise(batch_of(images))
    pred, mask = model.predict(images, noise)
    pixels = unpatchify(mask[..., None].expand(-1, -1, 8 * 8 * 3), 8, 3)
    hidden_changed = images + 9 * pixels
    assert torch.equal(model.predict(hidden_changed, noise)[0], pred)
    assert not torch.equal(model.predict(images + 9 * (1 - pixels), noise)[0], pred)


def test_micro_batches_sum_to_the_global_loss():
    model, images = tiny(), torch.randn(6, 3, 32, 32)
    whole = model(batch_of(images), 6.0).loss
    parts = model(batch_of(images[:2]), 6.0).loss + model(batch_of(images[2:], torch.arange(2, 6)), 6.0).loss
    assert torch.allclose(whole, parts, rtol=1e-6)


def xavier(p, rows=None):
    """Standard deviation of xavier-uniform over (rows, columns)."""
    fan_out, fan_in = (p.shape[0], p[0].numel()) if rows is None else rows
    return math.sqrt(2 / (fan_in + fan_out))


def test_initial_state_tensor_by_tensor():
    model = tiny(embed_dim=192, depth=2, num_heads=3, decoder={"decoder_embed_dim": 128})
    checked = 0
    for name, p in model.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            assert abs(p.std() - 0.02) < 0.004 and p.shape[:2] == (1, 1), name
        elif name.endswith("pos_embed"):
            assert not p.requires_grad and (p[:, 0] == 0).all() and p[:, 1:].abs().max() <= 1, name
        elif ".norm" in name or "_norm" in name:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:  # every matrix, qkv as one (3d x d), the patch convolution flattened
            flat = p.flatten(1)
            expected = math.sqrt(2 / sum(flat.shape))
            assert abs(flat.std() / expected - 1) < 0.05, name
            assert flat.abs().max() <= expected * math.sqrt(3) * 1.0001, name  # uniform, not normal
        checked += 1
    assert checked == len(model.state_dict())


def test_weight_decay_groups_tensor_by_tensor():
    model = tiny()
    decayed, rest = param_groups(model, 0.05)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    names, others = ({name for name, _ in group["params"]} for group in (decayed, rest))
    matrices = {"patch_embed.proj.weight", "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight",
                "decoder_embed.weight", "decoder_pred.weight", "cls_token", "mask_token"}  # fmt: skip
    for name, p in model.named_parameters():
        if name.endswith("pos_embed"):
            assert name not in names | others, name
        elif any(name.endswith(m) for m in matrices):
            assert name in names, name
        else:
            assert name in others and (p.ndim == 1 or name.endswith("bias")), name


@pytest.mark.parametrize("encoder", [{}, {"class_token": False, "pool": "mean"}, {"in_chans": 1}])
def test_flops_equal_torchs_counter(encoder):
    model = tiny(**encoder)
    images = torch.randn(2, model.encoder.config.in_chans, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(batch_of(images), 2.0).loss.backward()
    assert counter.get_total_flops() == 2 * model.flops_per_sample()


def test_pictures_show_what_they_say():
    for norm_pix_loss in (False, True):
        model = tiny(decoder={"norm_pix_loss": norm_pix_loss})
        raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
        images = normalise(raw, mean, std)
        ((name, picture),) = model.pictures(batch_of(images), mean, std).items()
        assert picture.shape == (3, 4 * 32, 2 * 32) and 0 <= picture.min() and picture.max() <= 1
        assert ("TRUE patch mean" in name) == norm_pix_loss
        assert torch.allclose(picture[:, :32, :32], raw[0] / 255, atol=1e-5)
        pasted, masked = picture[:, 96:], picture[:, 32:64]
        visible = (masked == picture[:, :32]).all(0)
        assert visible.float().mean() > 0.2 and torch.allclose(
            pasted[:, visible], picture[:, :32][:, visible], atol=1e-5
        )


def test_normalise_against_torchvision():
    from torchvision.transforms.v2.functional import normalize

    raw = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert torch.allclose(normalise(raw, mean, std), normalize(raw / 255, list(mean), list(std)), atol=1e-6)
    with pytest.raises(ValueError, match="expected 3 values"):
        normalise(raw, (0.5,), (0.5,))
