"""The contestants of bench_mae.py: each one a module that gives the MAE loss of a batch of images.

All have the same widths, depths, decoder and mask ratio and predict normalised pixels; beyond that
each is as its library makes it.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from selfsup.attention.dispatch import AttentionName
from selfsup.batch import ImageBatch
from selfsup.encoders.vit import ViTConfig, init_linear_layers
from selfsup.layers.patch_embed import sincos_2d
from selfsup.objectives.mae import MAE, MAEConfig

Name = Literal[
    "transformers", "transformers-eager", "lightly", "timm", "timm-eager", "selfsup", "selfsup-torch"
]
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
WORDS: dict[Name, str] = {
    "transformers": "transformers ViTMAE, sdpa (default)",
    "transformers-eager": "transformers ViTMAE, eager attention",
    "lightly": "lightly on timm, fused attention (default)",
    "timm": "MAE of timm blocks, fused attention (default)",
    "timm-eager": "MAE of timm blocks, plain attention",
    "selfsup": "selfsup, hand-written attention",
    "selfsup-torch": "selfsup, torch's attention",
}


def build(name: Name, mae: MAEConfig, vit: ViTConfig) -> nn.Module:
    """A module from images (b, c, h, w) to the loss. Raises ImportError where its library is missing."""
    match name:
        case "transformers":
            return TransformersMAE(mae, vit, "sdpa")
        case "transformers-eager":
            return TransformersMAE(mae, vit, "eager")
        case "lightly":
            return LightlyMAE(mae, vit)
        case "timm":
            return TimmMAE(mae, vit, fused=True)
        case "timm-eager":
            return TimmMAE(mae, vit, fused=False)
        case "selfsup":
            return Ours(mae, vit, "reference")
        case "selfsup-torch":
            return Ours(mae, vit, "torch")


class Ours(nn.Module):
    """selfsup's objective on samples 0 .. b-1."""

    def __init__(self, mae: MAEConfig, vit: ViTConfig, attention: AttentionName):
        super().__init__()
        self.objective: MAE = mae.build(vit.model_copy(update={"attention": attention}))

    def forward(self, images: Tensor) -> Tensor:
        rows = torch.arange(len(images), device=images.device)
        batch = ImageBatch(images, 0, torch.zeros_like(rows), rows, rows)
        return self.objective(batch, float(len(images))).loss


class TransformersMAE(nn.Module):
    """ViTMAEForPreTraining."""

    def __init__(self, mae: MAEConfig, vit: ViTConfig, attention: str):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        config = ViTMAEConfig(
            image_size=vit.img_size,
            patch_size=vit.patch_size,
            num_channels=vit.in_chans,
            hidden_size=vit.embed_dim,
            num_hidden_layers=vit.depth,
            num_attention_heads=vit.num_heads,
            intermediate_size=int(vit.embed_dim * vit.mlp_ratio),
            decoder_hidden_size=mae.decoder_embed_dim,
            decoder_num_hidden_layers=mae.decoder_depth,
            decoder_num_attention_heads=mae.decoder_num_heads,
            decoder_intermediate_size=int(mae.decoder_embed_dim * vit.mlp_ratio),
            mask_ratio=mae.mask_ratio,
            norm_pix_loss=mae.norm_pix_loss,
            attn_implementation=attention,
        )
        self.model = ViTMAEForPreTraining(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).loss


class LightlyMAE(nn.Module):
    """lightly's parts, joined as its examples and its ImageNet benchmark join them.

    The target is normalised by lightly's own `normalize_mean_var`.
    """

    def __init__(self, mae: MAEConfig, vit: ViTConfig):
        super().__init__()
        from lightly.models import modules, utils
        from lightly.models.modules.masked_vision_transformer_timm import init_weights

        self.tools = utils
        self.mask_ratio, self.norm_pix_loss = mae.mask_ratio, mae.norm_pix_loss
        self.patch_size = vit.patch_size
        self.backbone = modules.MaskedVisionTransformerTIMM(vit=timm_vit(vit))
        self.decoder_embed = nn.Linear(vit.embed_dim, mae.decoder_embed_dim)
        self.decoder = modules.MaskedVisionTransformerDecoderTIMM(
            num_patches=vit.num_patches,
            embed_dim=mae.decoder_embed_dim,
            depth=mae.decoder_depth,
            num_heads=mae.decoder_num_heads,
            mlp_ratio=vit.mlp_ratio,
        )
        self.head = nn.Linear(mae.decoder_embed_dim, vit.patch_size**2 * vit.in_chans)
        self.decoder_embed.apply(init_weights)
        self.head.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        size = (len(images), self.backbone.sequence_length)
        keep, hidden = self.tools.random_token_mask(size, self.mask_ratio, device=images.device)
        encoded = self.decoder_embed(self.backbone.encode(images, idx_keep=keep))
        tokens = self.tools.set_at_index(encoded.new_zeros(*size, encoded.shape[-1]), keep, encoded)
        decoded = self.decoder(tokens, idx_mask=hidden)
        pred = self.head(self.tools.get_at_index(decoded, hidden))  # hidden patches only
        patches = self.tools.patchify(images, self.patch_size)
        target = self.tools.get_at_index(patches, hidden - 1)  # token 0 is the class token
        if self.norm_pix_loss:
            target = self.tools.normalize_mean_var(target)
        return nn.functional.mse_loss(pred, target)


class TimmMAE(nn.Module):
    """The published MAE (facebookresearch/mae) rebuilt from timm's present blocks.

    fused: timm's default, torch's scaled_dot_product_attention; else timm's plain matrix products,
    which is what the publication's timm (0.3.2) had.
    """

    def __init__(self, mae: MAEConfig, vit: ViTConfig, fused: bool):
        super().__init__()
        from timm.models.vision_transformer import Block

        dim, self.config, self.patch_size = mae.decoder_embed_dim, mae, vit.patch_size
        self.vit = timm_vit(vit)
        self.decoder_embed = nn.Linear(vit.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_blocks = nn.Sequential(
            *(
                Block(dim, mae.decoder_num_heads, vit.mlp_ratio, qkv_bias=True, norm_layer=LAYER_NORM)
                for _ in range(mae.decoder_depth)
            )
        )
        self.decoder_norm = LAYER_NORM(dim)
        self.decoder_pred = nn.Linear(dim, vit.patch_size**2 * vit.in_chans)
        init_linear_layers(self)
        grid, prefix = vit.img_size // vit.patch_size, torch.zeros(1, 1, dim)
        positions = torch.cat([prefix, sincos_2d(dim, grid)[None]], dim=1)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        with torch.no_grad():
            self.vit.pos_embed[:, 0] = 0
            self.vit.pos_embed[:, 1:] = sincos_2d(vit.embed_dim, grid)
        self.vit.pos_embed.requires_grad_(False)
        for block in (*self.vit.blocks, *self.decoder_blocks):
            block.attn.fused_attn = fused

    def forward(self, images: Tensor) -> Tensor:
        patches = self.vit.patch_embed(images) + self.vit.pos_embed[:, 1:]  # (b, n, d)
        b, n, _ = patches.shape
        shuffle = torch.rand(b, n, device=images.device).argsort(dim=1)
        restore, visible = shuffle.argsort(dim=1), int(n * (1 - self.config.mask_ratio))
        kept = patches.gather(1, shuffle[:, :visible, None].expand(-1, -1, patches.shape[-1]))
        cls = (self.vit.cls_token + self.vit.pos_embed[:, :1]).expand(b, -1, -1)
        x = self.decoder_embed(self.vit.norm(self.vit.blocks(torch.cat([cls, kept], dim=1))))
        full = torch.cat([x[:, 1:], self.mask_token.repeat(b, n - visible, 1)], dim=1)  # (b, n, d)
        full = full.gather(1, restore[..., None].expand(-1, -1, full.shape[-1]))
        x = torch.cat([x[:, :1], full], dim=1) + self.decoder_pos_embed
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        target = self.target(images)
        hidden = (restore >= visible).float()
        return ((pred - target).square().mean(dim=-1) * hidden).sum() / hidden.sum()

    def target(self, images: Tensor) -> Tensor:
        b, c, side, p = *images.shape[:3], self.patch_size
        x = images.reshape(b, c, side // p, p, side // p, p)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)  # (b, n, p)
        if not self.config.norm_pix_loss:
            return x
        return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def timm_vit(vit: ViTConfig) -> nn.Module:
    """timm's encoder without a head."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=vit.img_size,
        patch_size=vit.patch_size,
        in_chans=vit.in_chans,
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=vit.num_heads,
        mlp_ratio=vit.mlp_ratio,
        num_classes=0,
    )
