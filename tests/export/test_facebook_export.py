"""checkpoint.pth holds what facebookresearch/mae reads: a masked autoencoder built here, from the
description and timm's blocks, gives our prediction and loss out of it."""

import pickletools
import sys
import types
import zipfile
from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, PatchEmbed
from torch import nn

from selfsup.checkpoint import load_encoder, load_objective
from selfsup.export import facebook
from selfsup.export.facebook import export_mae
from selfsup.objectives.mae import mae_loss, patchify

VARIANTS = {
    "cls": {},
    "mean": {"encoder": {"pool": "mean"}},
    "learned positions": {"encoder": {"pos_embed": "learned"}},
    "no qkv bias, wide mlp, drop path": {"encoder": {"qkv_bias": False, "mlp_ratio": 3.5, "drop_path": 0.2}},
    "pixels, half": {"objective": {"norm_pix_loss": False, "mask_ratio": 0.5}},
    "deep decoder": {"objective": {"decoder_depth": 3, "decoder_num_heads": 4}},
}


def close(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


class SmallMAE(nn.Module):
    """Shuffle by noise, encode the first, append mask tokens, unshuffle, decode, mean over the removed."""

    def __init__(
        self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio,
        decoder_embed_dim, decoder_depth, decoder_num_heads, norm_layer, norm_pix_loss,
    ):  # fmt: skip
        super().__init__()
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        n = (img_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, n + 1, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, n + 1, decoder_embed_dim))

        def stack(width, blocks, heads):
            return nn.ModuleList(
                [Block(width, heads, mlp_ratio, True, norm_layer=norm_layer) for _ in range(blocks)]
            )

        self.blocks = stack(embed_dim, depth, num_heads)
        self.decoder_blocks = stack(decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.norm, self.decoder_norm = norm_layer(embed_dim), norm_layer(decoder_embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * patch_size**2)

    def forward(self, images, noise, mask_ratio):
        rows = torch.arange(len(images))[:, None]
        order = noise.argsort(dim=1)
        k = int(noise.shape[1] * (1 - mask_ratio))
        kept, removed = order[:, :k], order[:, k:]
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + self.pos_embed
        x = torch.cat([x[:, :1], x[:, 1:][rows, kept]], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        shuffled = torch.cat([x[:, 1:], self.mask_token.expand(len(x), removed.shape[1], -1)], dim=1)
        x = torch.cat([x[:, :1], shuffled[rows, order.argsort(dim=1)]], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        squares = []
        for image, prediction, hidden in zip(images, pred, removed, strict=True):
            for i in hidden.tolist():
                side, p = images.shape[-1] // self.patch_size, self.patch_size
                row, column = i // side * p, i % side * p
                patch = image[:, row : row + p, column : column + p].permute(1, 2, 0).flatten()
                if self.norm_pix_loss:
                    patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                squares.append((prediction[i] - patch).square().mean())
        return torch.stack(squares).mean(), pred


def built(recipe):
    encoder, mae = recipe.encoder, recipe.objective
    return SmallMAE(
        encoder.img_size, encoder.patch_size, encoder.embed_dim, encoder.depth, encoder.num_heads,
        encoder.mlp_ratio, mae.decoder_embed_dim, mae.decoder_depth, mae.decoder_num_heads,
        partial(nn.LayerNorm, eps=1e-6), mae.norm_pix_loss,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_prediction_and_loss_out_of_the_file(make_run, changes):
    run = make_run(changes)
    ours, recipe, *_ = load_objective(run)
    ours.requires_grad_(False)
    report = export_mae(run)
    assert report.folder == run / "export" / "mae-step-7"
    assert {p.name for p in report.folder.iterdir()} == {"README.md", "checkpoint.pth"}
    assert [c.dtype for c in report.checks] == ["float32", "float64"] * 2
    content = torch.load(report.folder / "checkpoint.pth", weights_only=True)
    assert content.keys() == {"model"}
    model = built(recipe).requires_grad_(False)
    model.load_state_dict(content["model"], strict=True)
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    ratio = recipe.objective.mask_ratio
    loss, pred = model(images, noise, ratio)
    expected, mask = ours.predict(images, noise)
    assert close(pred, expected)
    target = patchify(images, recipe.encoder.patch_size)
    assert close(loss, mae_loss(expected, target, mask, recipe.objective.norm_pix_loss).mean())
    assert not close(model(images, noise.flip(1), ratio)[1], expected)  # the comparison can tell


def test_the_encoder_loads_where_their_fine_tuning_loads_it(make_run):
    """models_vit.py is timm's VisionTransformer; its loader is not strict and misses the head alone."""
    run = make_run()
    encoder, *_ = load_encoder(run)
    encoder.requires_grad_(False)
    weights = torch.load(export_mae(run).folder / "checkpoint.pth", weights_only=True)["model"]
    model = timm.models.VisionTransformer(16, 4, embed_dim=32, depth=3, num_heads=4, num_classes=5).eval()
    model.requires_grad_(False)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) == {"head.weight", "head.bias"}
    assert all(name.startswith("decoder_") or name == "mask_token" for name in unexpected)
    images = torch.randn(3, 3, 16, 16)
    assert close(model.forward_features(images), encoder.forward_features(images))


def test_the_file_holds_tensors_only(make_run):
    """The pickle inside names nothing but torch's own ways to make a tensor."""
    with zipfile.ZipFile(export_mae(make_run()).folder / "checkpoint.pth") as file:
        (name,) = [name for name in file.namelist() if name.endswith("data.pkl")]
        code = file.read(name)
    called = {argument for operation, argument, _ in pickletools.genops(code) if operation.name == "GLOBAL"}
    assert called <= {
        "torch._utils _rebuild_tensor_v2",
        "torch FloatStorage",
        "collections OrderedDict",
    }
    assert "torch._utils _rebuild_tensor_v2" in called


def test_the_card_builds_their_model(make_run, run_card, monkeypatch):
    run = make_run()
    module = types.ModuleType("models_mae")
    module.MaskedAutoencoderViT = SmallMAE
    monkeypatch.setitem(sys.modules, "models_mae", module)
    folder = export_mae(run).folder
    (variables,) = run_card(folder, torch.zeros(1, 3, 16, 16))
    weights = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    variables["model"].load_state_dict(weights, strict=True)
    text = (folder / "README.md").read_text()
    assert "mask_ratio=0.75" in text
    assert "not checked in facebookresearch's own code" in text and "unpickles nothing" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"encoder": {"pool": "mean", "class_token": False}}, "class_token is false"),
        ({"encoder": {"in_chans": 1}, "data": {"mean": [0.4], "std": [0.2]}}, "in_chans is 1"),
    ],
)
def test_what_models_mae_cannot_express_is_refused(make_run, changes, reason):
    run = make_run(changes)
    with pytest.raises(ValueError, match=f"--to mae: .*{reason}.*NOT exported, try --to timm"):
        export_mae(run)
    assert not (run / "export").exists()


def test_only_a_masked_autoencoder_is_one(make_run, monkeypatch):
    run = make_run()
    _, *rest = load_objective(run)
    monkeypatch.setattr(facebook, "load_objective", lambda *_: (nn.Identity(), *rest))
    with pytest.raises(ValueError, match="--to mae: expected objective.name mae"):
        export_mae(run)
    assert not (run / "export").exists()
