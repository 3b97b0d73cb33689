"""Encoders: what is pretrained, exported and probed."""

from typing import Annotated

from pydantic import Field

from selfsup.encoders.timm import TimmConfig, TimmEncoder, has_batch_norm
from selfsup.encoders.vit import ViT, ViTConfig

__all__ = ["Encoder", "EncoderConfig", "has_batch_norm"]

Encoder = ViT | TimmEncoder
"""Both take normalised images (b, c, h, w) and give one feature each (b, embed_dim)."""

EncoderConfig = Annotated[ViTConfig | TimmConfig, Field(discriminator="name")]
"""Our vision transformer, or any backbone of timm's by name."""
