"""Encoders: what is pretrained, exported and probed."""

from typing import Annotated

from pydantic import Field

from selfsup.encoders.text import TextConfig, TextEncoder
from selfsup.encoders.timm import TimmConfig, TimmEncoder, has_batch_norm
from selfsup.encoders.vit import ViT, ViTConfig

__all__ = ["AnyEncoder", "AnyEncoderConfig", "Encoder", "EncoderConfig", "has_batch_norm"]

Encoder = ViT | TimmEncoder
"""Of images: both take them normalised (b, c, h, w) and give one feature each (b, embed_dim)."""

EncoderConfig = Annotated[ViTConfig | TimmConfig, Field(discriminator="name")]
"""Our vision transformer, or any backbone of timm's by name."""

AnyEncoder = ViT | TimmEncoder | TextEncoder

AnyEncoderConfig = Annotated[ViTConfig | TimmConfig | TextConfig, Field(discriminator="name")]
"""An encoder of images, or our transformer over tokens."""
