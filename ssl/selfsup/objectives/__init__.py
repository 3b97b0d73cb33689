"""The objectives. A new one is a file here, a member of this union, a YAML and a test."""

from typing import Annotated

from pydantic import Field

from selfsup.objectives.byol import BYOLConfig
from selfsup.objectives.clm import CLMConfig
from selfsup.objectives.mae import MAEConfig
from selfsup.objectives.mlm import MLMConfig
from selfsup.objectives.simclr import SimCLRConfig

__all__ = ["BYOLConfig", "CLMConfig", "MAEConfig", "MLMConfig", "ObjectiveConfig", "SimCLRConfig"]

ObjectiveConfig = Annotated[
    MAEConfig | SimCLRConfig | BYOLConfig | MLMConfig | CLMConfig, Field(discriminator="name")
]
