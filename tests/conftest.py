"""Tests import the project from this clone, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest


@pytest.fixture(scope="session")
def builtin_cache(tmp_path_factory):
    """One directory for the built-in models of all tests."""
    return tmp_path_factory.mktemp("builtin")
