"""The objectives. A new one is a file here, a member of this union, a YAML and a test."""

from selfsup.objectives.mae import MAEConfig

ObjectiveConfig = MAEConfig
