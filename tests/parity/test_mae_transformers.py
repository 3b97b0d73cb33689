"""The same weights and the same noise as Hugging Face's ViTMAEForPreTraining give the same numbers."""

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from selfsup.config import validate
from selfsup.encoders.vit import ViTConfig
from selfsup.objectives.mae import MAEConfig, mae_loss, patchify

LAYER = {
    "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    "norm1": "layernorm_before", "norm2": "layernorm_after",
}  # fmt: skip


def legacy_names(weights: dict) -> dict:
    """Our names to the ones both major versions of transformers read."""
    out = {}
    for name, w in weights.items():
        name = name.replace("encoder.cls_token", "vit.embeddings.cls_token").replace(
            "encoder.pos_embed", "vit.embeddings.position_embeddings"
        )
        name = name.replace("encoder.patch_embed.proj", "vit.embeddings.patch_embeddings.projection").replace(
            "encoder.norm.", "vit.layernorm."
        )
        name = name.replace("decoder.decoder_blocks", "decoder.decoder_layers").replace(
            "encoder.blocks", "vit.encoder.layer"
        )
        for ours, theirs in LAYER.items():
            name = name.replace(ours, theirs)
        if "attn.qkv" in name:
            for part, value in zip(("query", "key", "value"), w.chunk(3), strict=True):
                out[name.replace("attn.qkv", f"attention.attention.{part}")] = value
        else:
            out[name] = w
    return {k.replace("decoder.decoder_embed", "decoder.decoder_embed"): v for k, v in out.items()}


def models(norm_pix_loss: bool, tmp_path):
    encoder = validate(
        ViTConfig, {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    )
    decoder = {
        "decoder_embed_dim": 64,
        "decoder_depth": 2,
        "decoder_num_heads": 4,
        "norm_pix_loss": norm_pix_loss,
    }
    torch.manual_seed(0)
    ours = validate(MAEConfig, decoder).build(encoder)
    with torch.no_grad():
        for p in ours.parameters():  # nothing at a special value: biases, norms and positions too
            p.add_(0.02 * torch.randn_like(p))
    config = ViTMAEConfig(
        image_size=48, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=384,
        decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=256,
        layer_norm_eps=1e-6, mask_ratio=0.75, norm_pix_loss=norm_pix_loss, attn_implementation="eager",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    from safetensors.torch import save_file

    config.architectures = ["ViTMAEForPreTraining"]
    config.save_pretrained(tmp_path)
    save_file(
        {k: v.contiguous().clone() for k, v in legacy_names(ours.state_dict()).items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    theirs, report = ViTMAEForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_prediction_mask_loss_and_gradients(norm_pix_loss, tmp_path):
    ours, theirs = models(norm_pix_loss, tmp_path)
    images, noise = torch.randn(4, 3, 48, 48), torch.rand(4, 36)
    out = theirs(images, noise=noise)
    pred, mask = ours.predict(images, noise)
    loss = mae_loss(pred, patchify(images, 8), mask, norm_pix_loss).mean()
    largest = out.logits.abs().max()
    assert torch.equal(mask, out.mask)
    assert (pred - out.logits).abs().max() <= 1e-6 * largest
    assert abs(loss - out.loss) <= 1e-6 * largest
    loss.backward()
    out.loss.backward()
    for ours_name, their_name in (
        ("encoder.patch_embed.proj.weight", "vit.embeddings.patch_embeddings.projection.weight"),
        ("decoder.mask_token", "decoder.mask_token"),
    ):
        a, b = ours.get_parameter(ours_name).grad, theirs.get_parameter(their_name).grad
        assert (a - b).norm() <= 1e-5 * b.norm(), ours_name


def test_planted_bugs_are_caught(tmp_path):
    ours, theirs = models(True, tmp_path)
    images, noise = torch.randn(4, 3, 48, 48), torch.rand(4, 36)
    out = theirs(images, noise=noise)
    largest = out.logits.abs().max()
    target = patchify(images, 8)
    pred, mask = ours.predict(images, noise)
    biased = (target - target.mean(-1, keepdim=True)) / (
        target.var(-1, keepdim=True, unbiased=False) + 1e-6
    ).sqrt()
    per_patch = (pred - biased).square().mean(-1)
    assert abs((per_patch * mask).sum() / mask.sum() - out.loss) > 1e-6 * largest  # biased variance
    assert (
        abs(mae_loss(pred, target, torch.ones_like(mask), True).mean() - out.loss) > 1e-6 * largest
    )  # all patches
    grid = ours.encoder.pos_embed.data[:, 1:].view(1, 6, 6, -1)
    ours.encoder.pos_embed.data[:, 1:] = grid.transpose(1, 2).flatten(1, 2).clone()  # h first
    assert (ours.predict(images, noise)[0] - out.logits).abs().max() > 1e-6 * largest
