from __future__ import annotations

import json
from typing import Any

import pytest

from testing.planned_runs import model_config


@pytest.fixture
def model(tmp_path):
    """model(name, layers) -> its path, with fewer layers where that is asked for."""

    def make(name: str, layers: int | None = None, **changes: Any) -> str:
        config = model_config(name) | changes
        config["num_hidden_layers"] = layers or config["num_hidden_layers"]
        directory = tmp_path / f"{name}-{layers}"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        return str(directory)

    return make
