"""What the tests share, a module each: tiny models and their tokenizer, engines, runs, and code as a user writes it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OWN_REWARDS = Path(__file__).with_name("own_rewards.py")
OWN_DATA = Path(__file__).with_name("own_data.py")
OWN_TOOLS = "testing.own_tools"


def load(path: Path) -> Any:
    """The module in this file, a script or a library, wherever it is."""
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
