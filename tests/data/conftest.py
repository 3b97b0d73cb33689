from pathlib import Path

import pytest

from data.making import write_shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four unequal shards, 40 samples, not indexed."""
    return write_shards(tmp_path / "shards", [7, 20, 1, 12])
