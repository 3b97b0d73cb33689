"""Encoders: what is pretrained, exported and probed."""
