from __future__ import annotations

import os
from pathlib import Path

import pytest

from testing.models import write_tiny_llama

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk: what TRL and verl load is a path."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
