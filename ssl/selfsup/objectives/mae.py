"""Masked autoencoding (He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners").

Three quarters of the patches are removed, the encoder sees the rest, a small decoder predicts the
pixels of the removed ones. Faithful to facebookresearch/mae, `models_mae.py`.
"""

from typing import Annotated, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Num
from pydantic import Field
from torch import Tensor, nn

from selfsup import flops
from selfsup.attention.dispatch import AttentionName
from selfsup.batch import ImageBatch
from selfsup.config import Section
from selfsup.encoders.timm import TimmConfig
from selfsup.encoders.vit import ViT, ViTConfig, init_linear_layers
from selfsup.keyed import Purpose, random_bits
from selfsup.layers.block import LAYER_NORM_EPS, Block, BlockOptions
from selfsup.layers.patch_embed import sincos_2d
from selfsup.objectives.base import Objective, Output, global_mean
from selfsup.objectives.masking import num_visible, random_masking


class MAEConfig(Section):
    """Masked autoencoding of images."""

    reads: ClassVar[str] = "images"
    views: ClassVar[int] = 1
    accumulates: ClassVar[bool] = True

    name: Literal["mae"] = "mae"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of patches removed."""
    norm_pix_loss: bool = True
    """Predict each patch minus its mean, over its standard deviation (the published setting)."""
    decoder_embed_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 512
    """Width of a decoder token."""
    decoder_depth: Annotated[int, Field(ge=0)] = 8
    """Number of decoder blocks."""
    decoder_num_heads: Annotated[int, Field(ge=1)] = 16
    """Attention heads in the decoder; divides decoder_embed_dim."""

    def check(self, encoder: ViTConfig | TimmConfig) -> None:
        """Raises ValueError where the encoder does not fit."""
        if not isinstance(encoder, ViTConfig):
            raise ValueError(
                f"encoder.name: mae removes patches before the first block, which only vit can do; got {encoder.name}"
            )
        if self.decoder_embed_dim % self.decoder_num_heads:
            raise ValueError(
                f"objective.decoder_num_heads: expected a divisor of decoder_embed_dim "
                f"{self.decoder_embed_dim}, got {self.decoder_num_heads}"
            )
        if int(self.decoder_embed_dim * encoder.mlp_ratio) < 1:
            raise ValueError(
                f"encoder.mlp_ratio: {encoder.mlp_ratio:g} of decoder_embed_dim {self.decoder_embed_dim} leaves no "
                f"channel in the decoder's MLP; raise one of them"
            )
        if self.norm_pix_loss and encoder.patch_size**2 * encoder.in_chans == 1:
            raise ValueError("objective.norm_pix_loss: a patch of one value has no variance; set it to false")
        if not 0 < num_visible(encoder.num_patches, self.mask_ratio) < encoder.num_patches:
            raise ValueError(
                f"objective.mask_ratio: {self.mask_ratio} of {encoder.num_patches} patches leaves none "
                f"visible or none masked; choose another ratio or a smaller encoder.patch_size"
            )

    def build(self, encoder: ViTConfig) -> "MAE":
        """The objective around a fresh encoder."""
        self.check(encoder)
        return MAE(self, encoder.build())


def patchify(images: Float[Tensor, "b c h w"], patch_size: int) -> Float[Tensor, "b n p"]:
    """Cuts images into flat patches, row by row, each laid out (row, column, channel)."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Float[Tensor, "b n p"], patch_size: int, in_chans: int) -> Float[Tensor, "b c h w"]:
    """Undoes `patchify` for square images."""
    side = round(patches.shape[1] ** 0.5)
    return rearrange(
        patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=patch_size, q=patch_size, c=in_chans
    )


def patch_statistics(target: Float[Tensor, "b n p"]) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n 1"]]:
    """Mean and standard deviation of each patch: unbiased variance, 1e-6 inside the root."""
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def mae_loss(
    pred: Float[Tensor, "b n p"],
    target: Float[Tensor, "b n p"],
    mask: Float[Tensor, "b n"],
    norm_pix_loss: bool,
) -> Float[Tensor, " b"]:
    """Mean squared error over the removed patches (mask 1) of each image (sec. 3), in the target's
    dtype: float32 under autocast."""
    pred = pred.to(target.dtype)
    if norm_pix_loss:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    per_patch = (pred - target).square().mean(dim=-1)  # (b, n)
    return (per_patch * mask).sum(dim=1) / mask.sum(dim=1)


class MAEDecoder(nn.Module):
    """Mask tokens put back in place, a few blocks, one linear layer to pixels."""

    def __init__(self, config: MAEConfig, encoder: ViTConfig):
        super().__init__()
        dim, prefix = config.decoder_embed_dim, encoder.num_prefix_tokens
        attention: AttentionName = encoder.attention
        self.num_prefix_tokens = prefix
        self.decoder_embed = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = torch.zeros(1, prefix + encoder.num_patches, dim)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(
                BlockOptions(
                    dim, config.decoder_num_heads, int(dim * encoder.mlp_ratio), attention=attention
                )
            )
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(dim, encoder.patch_size**2 * encoder.in_chans)
        self.init_weights(encoder.img_size // encoder.patch_size)

    @torch.no_grad()
    def init_weights(self, grid_size: int) -> None:
        """As the encoder's; the mask token from N(0, 0.02)."""
        init_linear_layers(self)
        nn.init.normal_(self.mask_token, std=0.02)
        positions = sincos_2d(self.mask_token.shape[-1], grid_size)
        self.decoder_pos_embed[:, self.num_prefix_tokens :] = positions

    def forward(
        self, latent: Float[Tensor, "b m d"], ids_restore: Num[Tensor, "b n"]
    ) -> Float[Tensor, "b n p"]:
        x = self.decoder_embed(latent)  # (b, prefix + visible, d)
        prefix, visible = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        hidden = ids_restore.shape[1] - visible.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), hidden, -1)
        shuffled = torch.cat([visible, mask_tokens], dim=1)  # (b, n, d)
        patches = take(shuffled, ids_restore)
        x = torch.cat([prefix, patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, self.num_prefix_tokens :]))


class MAE(Objective):
    """Encoder over the visible patches, decoder over all, loss on the removed ones."""

    projector = None

    def __init__(self, config: MAEConfig, encoder: ViT):
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = MAEDecoder(config, encoder.config)

    @property
    def readouts(self) -> tuple[nn.Module, ...]:
        return (self.decoder.decoder_pred,)

    def forward(self, batch: ImageBatch, total: float) -> Output:
        noise = self.noise(batch)
        pred, mask = self.predict(batch.images, noise)
        target = patchify(batch.images, self.encoder.config.patch_size)
        per_image = mae_loss(pred, target, mask, self.config.norm_pix_loss)
        return Output(global_mean(per_image.sum(), total), {})

    def noise(self, batch: ImageBatch) -> Num[Tensor, "b n"]:
        """int64 noise by which the patches of each sample are shuffled: keyed, the same anywhere."""
        n = self.encoder.config.num_patches
        return random_bits(batch.seed, batch.epoch, batch.position, Purpose.MASK, n)

    def predict(
        self, images: Float[Tensor, "b c h w"], noise: Num[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n p"], Float[Tensor, "b n"]]:
        """Predicted patches, and the mask (1 = removed)."""
        ids_keep, ids_restore, mask = random_masking(noise, self.config.mask_ratio)
        visible = take(self.encoder.embed(images), ids_keep)
        return self.decoder(self.encoder.encode(visible, ids_keep), ids_restore), mask

    def flops_per_sample(self) -> float:
        vit, config = self.encoder.config, self.config
        prefix = self.encoder.num_prefix_tokens
        visible = num_visible(vit.num_patches, config.mask_ratio) + prefix
        patch_dim = vit.patch_size**2 * vit.in_chans
        encoder = vit.depth * flops.block(visible, vit.embed_dim, vit.mlp_ratio)
        tokens, dim = vit.num_patches + prefix, config.decoder_embed_dim
        decoder = config.decoder_depth * flops.block(tokens, dim, vit.mlp_ratio)
        decoder += flops.linear(visible, vit.embed_dim, dim) + flops.linear(vit.num_patches, dim, patch_dim)
        patch_embed = flops.linear(vit.num_patches, patch_dim, vit.embed_dim)
        # The backward pass costs twice the forward one, but pixels and frozen weights need no gradient.
        return 3 * (encoder + decoder) + (2 - vit.frozen_patch_embed) * patch_embed

    @torch.no_grad()
    def pictures(
        self, batch: ImageBatch, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """Rows of input, masked, predicted, pasted, for the first eight images.

        With norm_pix_loss the model predicts normalised patches only; to show them they are scaled
        by the *true* mean and deviation of each patch, and the name says so.
        """
        patch_size, in_chans = self.encoder.config.patch_size, self.encoder.config.in_chans
        batch = batch._replace(
            images=batch.images[:8], epoch=batch.epoch[:8], position=batch.position[:8], index=batch.index[:8]
        )
        training = self.training
        pred, mask = self.eval().predict(batch.images, self.noise(batch))  # no drop path in a picture
        self.train(training)
        pred, target, hidden = pred.float(), patchify(batch.images, patch_size), mask[..., None]
        name = "reconstruction: input, masked, predicted, pasted"
        if self.config.norm_pix_loss:
            patch_mean, patch_std = patch_statistics(target)
            pred = pred * patch_std + patch_mean
            name += " (predicted patches borrow the TRUE patch mean and variance)"
        rows = torch.stack([target, target * (1 - hidden), pred, target * (1 - hidden) + pred * hidden])
        images = unpatchify(rows.flatten(0, 1), patch_size, in_chans)  # (4 b, c, h, w)
        scale, shift = images.new_tensor(std).view(-1, 1, 1), images.new_tensor(mean).view(-1, 1, 1)
        images = (images * scale + shift).clamp(0, 1).expand(-1, 3, -1, -1)
        return {name: rearrange(images, "(r b) c h w -> c (r h) (b w)", r=4)}


def take(x: Float[Tensor, "b n d"], ids: Num[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """x[i, ids[i]] for every sample i."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
