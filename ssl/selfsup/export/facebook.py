"""Export to facebookresearch/mae: `checkpoint.pth` with {"model": tensors}, named as in its `models_mae.py`.

Its scripts read a pickle, so this file is one, of tensors only; selfsup writes it and never reads it.
Its code is no package, so the tensors are verified before they are written: the encoder in timm's
VisionTransformer, which its `models_vit.py` derives from, and the whole in a model rebuilt here out
of timm's blocks, which its `models_mae.py` is made of.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.checkpoint import Weights, load_objective
from selfsup.encoders.vit import ViTConfig
from selfsup.export.card import AUTOENCODER, Usage, model_card
from selfsup.export.names import float_weights, with_qkv_bias
from selfsup.export.verify import (
    Check,
    Outputs,
    Reloaded,
    compare,
    example_images,
    example_noise,
    expect_mae,
    load_strictly,
    mae_outputs,
)
from selfsup.export.write import ExportReport, destination, read_state, refuse, staged, unlike_plain_vit
from selfsup.layers.block import LAYER_NORM_EPS
from selfsup.objectives.mae import MAE, MAEConfig

UNCHECKED = (
    "not checked in facebookresearch's own code: it is no package and asks for timm 0.3.2",
    "not checked by reading checkpoint.pth back: selfsup unpickles nothing, the tensors were compared before "
    "they were written",
)


def _refuse(encoder: ViTConfig) -> None:
    """The one place for what ViTConfig can say and facebookresearch/mae cannot."""
    refuse(
        "mae",
        {
            "encoder.class_token is false, models_mae.py always has one": not encoder.class_token,
            "encoder.in_chans is 1, models_mae.py cuts images of 3 into patches": encoder.in_chans != 3,
            **unlike_plain_vit(encoder),
        },
    )


def export_mae(source: Path, out: Path | None = None, weights: Weights = "trained") -> ExportReport:
    """Writes `checkpoint.pth` that facebookresearch/mae's scripts read, decoder included.

    Arguments, errors and the way it appears as in `export_timm`; default RUN/export/mae-step-N. Raises
    ValueError also where the objective is not mae, and for an encoder that `models_mae.py` cannot express.
    """
    model, recipe, checkpoint, passed_over = load_objective(source, weights)
    expect_mae("mae", model, recipe)
    _refuse(recipe.encoder)
    state, usage = read_state(checkpoint), _usage(model)
    final = destination("mae", checkpoint, state["step"], out, weights)
    with staged(final) as tmp:
        tensors = mae_weights(model)
        checks = verify(tmp, model, tensors)
        torch.save({"model": tensors}, tmp / "checkpoint.pth")
        (tmp / "README.md").write_text(model_card(recipe, state, weights, checks, UNCHECKED, usage))
    notes = (*passed_over, *UNCHECKED)
    return ExportReport(final, checkpoint, state["step"], checks, notes, usage.load)


def mae_weights(model: MAE) -> dict[str, Tensor]:
    """All tensors under the names of `models_mae.py`: ours, without the prefixes `encoder.` and `decoder.`;
    its encoder always has a query, key, value bias, so zeros where ours has none."""
    return with_qkv_bias(float_weights(model.encoder)) | float_weights(model.decoder)


def verify(folder: Path, model: MAE, weights: dict[str, Tensor]) -> tuple[Check, ...]:
    """Loads `weights` strictly into timm's VisionTransformer and into `_MaskedAutoencoder`; compares.

    All tokens of the first with the encoder's; predicted patches, mask and loss of the second, for a
    fixed noise. Raises ValueError where weights are missing or unexpected, or outputs differ (see
    `compare`). folder: named in errors.
    """
    images, noise = example_images(model.encoder.config), example_noise(model.encoder.config)

    def tokens(model: Any, images: Tensor) -> Outputs:
        return (model.encoder.forward_features(images),)

    def autoencoding(model: Any, images: Tensor) -> Outputs:
        return mae_outputs(model, images, noise)

    return (
        *compare(folder, model, tokens, [_reload_encoder(folder, model, weights)], images),
        *compare(folder, model, autoencoding, [_reload_whole(folder, model, weights, noise)], images),
    )


def _reload_encoder(folder: Path, model: MAE, weights: dict[str, Tensor]) -> Reloaded:
    import timm

    config, library = model.encoder.config, f"timm {timm.__version__} VisionTransformer"
    encoder = timm.models.VisionTransformer(
        img_size=config.img_size,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=0,
    )
    saved = {k: v for k, v in weights.items() if not k.startswith("decoder_") and k != "mask_token"}
    load_strictly(folder, library, saved, encoder)
    return Reloaded(library, encoder, lambda encoder, images: (encoder.forward_features(images),))


def _reload_whole(folder: Path, model: MAE, weights: dict[str, Tensor], noise: Tensor) -> Reloaded:
    import timm

    library = f"a masked autoencoder of timm {timm.__version__} blocks"
    whole = load_strictly(folder, library, weights, _MaskedAutoencoder(model.encoder.config, model.config))
    return Reloaded(library, whole, lambda whole, images: whole(images, noise))


class _MaskedAutoencoder(nn.Module):
    """What He et al. 2022 describe, with the names and the parts that `models_mae.py` has.

    Kept apart from objectives/mae.py so that the two can differ: here the visible patches stay in the
    order of the image, and masks are boolean.
    """

    def __init__(self, encoder: ViTConfig, mae: MAEConfig):
        from timm.models.vision_transformer import Block, PatchEmbed

        super().__init__()
        self.norm_pix_loss = mae.norm_pix_loss
        self.visible = int(encoder.num_patches * (1 - mae.mask_ratio))
        dim, decoder_dim, tokens = encoder.embed_dim, mae.decoder_embed_dim, 1 + encoder.num_patches
        norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        block = partial(Block, mlp_ratio=encoder.mlp_ratio, qkv_bias=True, norm_layer=norm)
        self.patch_embed = PatchEmbed(encoder.img_size, encoder.patch_size, encoder.in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.Sequential(*(block(dim, encoder.num_heads) for _ in range(encoder.depth)))
        self.norm = norm(dim)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, decoder_dim))
        self.decoder_blocks = nn.Sequential(
            *(block(decoder_dim, mae.decoder_num_heads) for _ in range(mae.decoder_depth))
        )
        self.decoder_norm = norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, encoder.patch_size**2 * encoder.in_chans)

    def forward(self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"]) -> Outputs:
        """(predicted patches (b, n, p), mask (b, n) with 1 = removed, loss ()); noise without ties."""
        least = noise.sort(dim=1).values[:, : self.visible]
        visible = noise <= least[:, -1:]  # (b, n)
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]  # (b, n, d)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        kept = rearrange(patches[visible], "(b k) d -> b k d", b=len(images))
        latent = self.norm(self.blocks(torch.cat([cls, kept], dim=1)))
        x = self.decoder_embed(latent)  # (b, 1 + k, d')
        grid = self.mask_token.repeat(len(images), noise.shape[1], 1)  # (b, n, d')
        grid[visible] = rearrange(x[:, 1:], "b k d -> (b k) d")
        x = torch.cat([x[:, :1], grid], dim=1) + self.decoder_pos_embed
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        size = self.patch_embed.patch_size[0]
        target = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)
        if self.norm_pix_loss:
            mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        loss = (pred - target)[~visible].square().mean()
        return pred, (~visible).float(), loss


def _usage(model: MAE) -> Usage:
    encoder, mae = model.encoder.config, model.config
    code = f"""
from functools import partial
import torch
from models_mae import MaskedAutoencoderViT  # of facebookresearch/mae

model = MaskedAutoencoderViT(
    img_size={encoder.img_size}, patch_size={encoder.patch_size}, embed_dim={encoder.embed_dim},
    depth={encoder.depth}, num_heads={encoder.num_heads}, mlp_ratio={encoder.mlp_ratio},
    decoder_embed_dim={mae.decoder_embed_dim}, decoder_depth={mae.decoder_depth},
    decoder_num_heads={mae.decoder_num_heads}, norm_pix_loss={mae.norm_pix_loss},
    norm_layer=partial(torch.nn.LayerNorm, eps={LAYER_NORM_EPS}),
)
# then load_state_dict with the entry "model" of DIR/checkpoint.pth; mask_ratio={mae.mask_ratio} when called
"""
    return Usage(
        tags=("pytorch",),
        contents=AUTOENCODER,
        code=(code,),
        load="main_finetune.py --finetune DIR/checkpoint.pth, of facebookresearch/mae",
        compared="Its tensors, before they were written: the encoder's loaded in timm's VisionTransformer, "
        "all tokens compared with the trained encoder's; all of them loaded in a masked autoencoder rebuilt "
        "out of timm's blocks, predicted patches, mask and loss compared under a fixed mask",
    )
