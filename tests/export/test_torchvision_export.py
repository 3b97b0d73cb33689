"""torchvision's VisionTransformer gives, from our folder, our class token."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import VisionTransformer

from selfsup.checkpoint import load_encoder
from selfsup.export.torchvision import export_torchvision

VARIANTS = {
    "cls": {},
    "learned positions": {"encoder": {"pos_embed": "learned"}},
    "no qkv bias, wide mlp, drop path": {"encoder": {"qkv_bias": False, "mlp_ratio": 3.5, "drop_path": 0.2}},
    "one head, one block": {"encoder": {"patch_size": 8, "depth": 1, "num_heads": 1}},
}


def close(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_vision_transformer(make_run, run_card, changes):
    run = make_run(changes)
    encoder, *_ = load_encoder(run)
    encoder.requires_grad_(False)
    report = export_torchvision(run)
    assert report.folder == run / "export" / "torchvision-step-7"
    assert {p.name for p in report.folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert [c.dtype for c in report.checks] == ["float32", "float64"]
    assert all(c.library.startswith("torchvision ") for c in report.checks)
    config = json.loads((report.folder / "config.json").read_text())
    model = VisionTransformer(**config["arguments"]).eval()  # its default epsilon is ours
    assert model.encoder.ln.eps == config["layer_norm_eps"] == 1e-6
    model.heads = torch.nn.Identity()
    model.load_state_dict(load_file(report.folder / "model.safetensors"))
    images = torch.randn(3, 3, 16, 16)
    tokens = []
    model.encoder.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    assert close(model(images), encoder(images))
    assert close(tokens[0], encoder.forward_features(images))
    (variables,) = run_card(report.folder, images)
    assert close(variables["features"], encoder(images))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"encoder": {"pool": "mean", "class_token": False}}, "class_token is false"),
        ({"encoder": {"pool": "mean"}}, "pool is mean"),
        ({"encoder": {"in_chans": 1}, "data": {"mean": [0.4], "std": [0.2]}}, "in_chans is 1"),
    ],
)
def test_what_torchvision_cannot_express_is_refused(make_run, changes, reason):
    run = make_run(changes)
    with pytest.raises(ValueError, match=f"--to torchvision: .*{reason}.*NOT exported, try --to timm"):
        export_torchvision(run)
    assert not (run / "export").exists()
