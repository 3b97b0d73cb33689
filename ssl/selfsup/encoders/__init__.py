"""Encoders: what is pretrained, exported and probed."""

from typing import Annotated

from pydantic import Field

from selfsup.encoders.timm import TimmConfig
from selfsup.encoders.vit import ViTConfig

EncoderConfig = Annotated[ViTConfig | TimmConfig, Field(discriminator="name")]
