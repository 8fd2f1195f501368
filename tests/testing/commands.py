"""The command line, as tests start it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml


def train_command(*arguments: Any) -> list[str]:
    """`longgrpo train` with these arguments, of the package that the tests import."""
    return [sys.executable, "-m", "longgrpo.cli", "train", *map(str, arguments)]


def write_config(tree: dict[str, Any], file: Path) -> Path:
    file.write_text(yaml.safe_dump(tree))
    return file
