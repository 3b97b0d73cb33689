import pytest

from cloned import copy_repository


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh copy of the repository that shares the installed .venv."""
    return copy_repository(tmp_path_factory.mktemp("clone"))
