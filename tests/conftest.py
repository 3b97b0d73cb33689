"""Shapes and types at public boundaries are enforced in tests: jaxtyping's hook with beartype."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two torch threads on a busy machine are slower than one

from jaxtyping import install_import_hook

install_import_hook("selfsup", "beartype.beartype")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _float32_matmul_precision():
    """Exact fp32 products in every test, whatever a tested function set."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")
