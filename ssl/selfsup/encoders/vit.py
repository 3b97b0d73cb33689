"""The vision transformer (Dosovitskiy et al. 2021), pre-norm, with timm's state-dict names.

A state dict saved here loads in timm's VisionTransformer unchanged, and the other way round.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from pydantic import Field, model_validator
from torch import Tensor, nn

from selfsup import flops
from selfsup.attention.dispatch import AttentionName
from selfsup.config import Section
from selfsup.layers.block import LAYER_NORM_EPS, Block, BlockOptions
from selfsup.layers.patch_embed import PatchEmbed, sincos_2d
from selfsup.layers.rope import Rotation, rotation_2d


class ViTConfig(Section):
    """A vision transformer. embed_dim/depth/num_heads: tiny 192/12/3, small 384/12/6,
    base 768/12/12, large 1024/24/16, huge 1280/32/16."""

    reads: ClassVar[str] = "images"

    name: Literal["vit"] = "vit"
    img_size: Annotated[int, Field(ge=1)] = 224
    """Side of the square input in pixels."""
    patch_size: Annotated[int, Field(ge=1)] = 16
    """Side of a square patch in pixels; divides img_size."""
    in_chans: Literal[1, 3] = 3
    """1: images are read as grey; 3: as RGB."""
    embed_dim: Annotated[int, Field(ge=4)] = 192
    """Width of a token."""
    depth: Annotated[int, Field(ge=1)] = 12
    """Number of blocks."""
    num_heads: Annotated[int, Field(ge=1)] = 3
    """Attention heads; divides embed_dim."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of the MLP over embed_dim."""
    qkv_bias: bool = True
    """Bias in the fused query, key, value projection."""
    class_token: bool = True
    """Prepend a learned class token."""
    reg_tokens: Annotated[int, Field(ge=0)] = 0
    """Register tokens behind the class token (Darcet et al. 2024); no feature is read from them."""
    pos_embed: Literal["sincos", "learned", "rope"] = "sincos"
    """Fixed 2-D sine-cosine positions (MAE's layout), learned ones, or rotary ones in every block."""
    patch_bias: bool = True
    """Bias in the patch convolution; CLIP has none."""
    pre_norm: bool = False
    """A LayerNorm between the embeddings and the first block, as in CLIP."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Of the MLP: the exact GELU, or CLIP's x * sigmoid(1.702 x)."""
    layer_scale: Annotated[float, Field(gt=0)] | None = None
    """Initial value of a learned factor a channel on every residual branch; none: no such factors."""
    pool: Literal["cls", "mean"] = "cls"
    """What a feature is: the class token, or the mean over patch tokens; both after the last norm."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth at the last block; rises linearly from 0 at the first."""
    attention: AttentionName = "reference"
    """Attention kernel: our own (reference; tiled: O(l) memory), torch's (torch, flex), or by shape (auto)."""
    init: Literal["mae", "mocov3"] = "mae"
    """Initial weights: MAE's, or MoCo-v3's, whose queries, keys and values start larger."""
    frozen_patch_embed: bool = False
    """The patch convolution stays as it was drawn: against instability (MoCo-v3, sec. 4.2)."""

    @model_validator(mode="after")
    def _check(self) -> "ViTConfig":
        if self.img_size % self.patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of img_size {self.img_size}, got {self.patch_size}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim {self.embed_dim}, got {self.num_heads}"
            )
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise ValueError(
                f"mlp_ratio: expected at least one channel, 1 / embed_dim {self.embed_dim}, got {self.mlp_ratio:g}"
            )
        if self.pos_embed == "rope" and self.embed_dim // self.num_heads % 4:
            raise ValueError(
                f"pos_embed: rope needs a multiple of 4 channels a head, got {self.embed_dim // self.num_heads}"
            )
        if self.pos_embed == "sincos" and self.embed_dim % 4:
            raise ValueError(f"embed_dim: sincos positions need a multiple of 4, got {self.embed_dim}")
        if self.pool == "cls" and not self.class_token:
            raise ValueError("pool: cls needs class_token: true; or choose pool: mean")
        return self

    @property
    def num_patches(self) -> int:
        """Patch tokens per image."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token, then the registers."""
        return int(self.class_token) + self.reg_tokens

    @property
    def has_batch_norm(self) -> bool:
        """Never: a feature depends on its own image alone."""
        return False

    def flops_per_image(self) -> float:
        """FLOPs of one image, forward, over all tokens."""
        tokens = self.num_prefix_tokens + self.num_patches
        return self._patch_embed_flops() + self.depth * flops.block(tokens, self.embed_dim, self.mlp_ratio)

    def training_flops(self) -> float:
        """FLOPs of one image, forward and backward, over all tokens."""
        # The backward pass costs twice the forward one, but pixels and frozen weights need no gradient.
        return 3 * self.flops_per_image() - (1 + self.frozen_patch_embed) * self._patch_embed_flops()

    def _patch_embed_flops(self) -> float:
        return flops.linear(self.num_patches, self.patch_size**2 * self.in_chans, self.embed_dim)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values; peft asks the `config` of what it adapts for this."""
        return self.model_dump(mode="json")

    def build(self) -> "ViT":
        """The module, freshly initialised from torch's global generator."""
        return ViT(self)


class ViT(nn.Module):
    """Vision transformer without a head; `forward` gives one feature per image."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        dim, grid = config.embed_dim, config.img_size // config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim, config.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.reg_tokens, dim)) if config.reg_tokens else None
        if config.pos_embed == "rope":
            self.pos_embed = None
            rotation = rotation_2d(dim // config.num_heads, grid)
            self.register_buffer("rotation", torch.stack(rotation), persistent=False)  # (2, n, c)
        else:
            positions = torch.zeros(1, config.num_prefix_tokens + config.num_patches, dim)
            self.pos_embed = nn.Parameter(positions, requires_grad=config.pos_embed == "learned")
        self.norm_pre = nn.LayerNorm(dim, eps=LAYER_NORM_EPS) if config.pre_norm else nn.Identity()
        drops = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(
            Block(
                BlockOptions(
                    dim,
                    config.num_heads,
                    int(dim * config.mlp_ratio),
                    qkv_bias=config.qkv_bias,
                    activation=config.activation,
                    layer_scale=config.layer_scale,
                    drop_path=drop,
                    attention=config.attention,
                )
            )
            for drop in drops
        )
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.init_weights()
        self.patch_embed.requires_grad_(not config.frozen_patch_embed)

    @torch.no_grad()
    def init_weights(self) -> None:
        """MAE's initialisation (`models_mae.py`, initialize_weights), every bias zero; or MoCo-v3's
        (Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers";
        `vits.py`), which differs in queries, keys, values and class token."""
        mocov3 = self.config.init == "mocov3"
        init_linear_layers(self)
        for block in self.blocks if mocov3 else ():
            for part in block.attn.qkv.weight.chunk(3):  # each (d, d): bound sqrt(6 / 2d), not sqrt(6 / 4d)
                nn.init.xavier_uniform_(part)
        # The convolution as the linear layer it is: xavier over (embed_dim, c*p*p).
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.embed_dim, -1))
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6 if mocov3 else 0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)
        if self.config.pos_embed == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)
        elif self.config.pos_embed == "sincos":
            grid = self.config.img_size // self.config.patch_size
            self.pos_embed[:, self.num_prefix_tokens :] = sincos_2d(self.config.embed_dim, grid)

    @property
    def embed_dim(self) -> int:
        """Width of a feature."""
        return self.config.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token, then the registers."""
        return self.config.num_prefix_tokens

    def embed(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Patch tokens with their positions, no prefix tokens. Raises ValueError for another image size."""
        size = self.config.img_size
        if images.shape[-2:] != (size, size):
            raise ValueError(f"images: expected {size}x{size} pixels, got {tuple(images.shape[-2:])}")
        patches = self.patch_embed(images)
        return patches if self.pos_embed is None else patches + self.pos_embed[:, self.num_prefix_tokens :]

    def encode(
        self, patches: Float[Tensor, "b k d"], ids: Num[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """All blocks and the last norm over embedded patches; prefix tokens first.

        ids: int64, which patches of the image these are; none: all of them, in order.
        """
        x, rotation = self.norm_pre(self.prepend_prefix(patches)), self.rotation_of(ids)
        for block in self.blocks:
            x = block(x, rotation)
        return self.norm(x)

    def intermediates(self, patches: Float[Tensor, "b n d"]) -> list[Float[Tensor, "b m d"]]:
        """The output of every block over all patches, before the last norm; prefix tokens first."""
        x, rotation = self.norm_pre(self.prepend_prefix(patches)), self.rotation_of(None)
        outputs = []
        for block in self.blocks:
            x = block(x, rotation)
            outputs.append(x)
        return outputs

    def prepend_prefix(self, patches: Float[Tensor, "b k d"]) -> Float[Tensor, "b m d"]:
        """The class token and the registers, with their positions, before the patches."""
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if not tokens:
            return patches
        prefix = torch.cat(tokens, dim=1)
        if self.pos_embed is not None:
            prefix = prefix + self.pos_embed[:, : self.num_prefix_tokens]
        return torch.cat([prefix.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1)

    def rotation_of(self, ids: Num[Tensor, "b k"] | None) -> Rotation | None:
        """The rotation of every token of a sequence: none without rotary positions; prefix tokens stay."""
        if self.pos_embed is not None:
            return None
        cos, sin = self.rotation if ids is None else self.rotation[:, ids]  # each (n, c) or (b, k, c)
        still = cos.new_ones(*cos.shape[:-2], self.num_prefix_tokens, cos.shape[-1])
        return Rotation(torch.cat([still, cos], dim=-2), torch.cat([still * 0, sin], dim=-2))

    def forward_features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b m d"]:
        """All tokens after the last norm (timm's `forward_features`)."""
        return self.encode(self.embed(images))

    def pool(self, tokens: Float[Tensor, "b m d"]) -> Float[Tensor, "b d"]:
        """One feature per image out of normed tokens, as `config.pool` says."""
        return tokens[:, 0] if self.config.pool == "cls" else tokens[:, self.num_prefix_tokens :].mean(dim=1)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.pool(self.forward_features(images))


def init_linear_layers(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear, ones and zeros for every LayerNorm.

    A fused qkv counts as one (3d x d) matrix, as in MAE.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
