"""Relative paths in a config: a file's are relative to the file, the command line's to the folder that it runs in.

A run keeps them absolute, so that it is resumed and exported from anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Keys whose value may be a file, a directory, or path/to/file.py:function; `*` is each entry of a list.
KEYS = (
    "model.path",
    "task.name",
    "task.eval_name",
    "task.sampler",
    "task.chat_template",
    "rewards.*.function",
    "loss.function",
)


def make_absolute(tree: Any, folder: Path) -> None:
    """Every path of the tree that exists from `folder`. What does not exist there stays as it is: a hub id, the name of
    a built-in, or a path that is refused later by its name."""
    for key in KEYS:
        _walk(tree, key.split("."), folder)


def _walk(tree: Any, keys: list[str], folder: Path) -> None:
    key, *rest = keys
    if key == "*":
        for entry in tree if isinstance(tree, list) else []:
            _walk(entry, rest, folder)
    elif isinstance(tree, dict) and rest:
        _walk(tree.get(key), rest, folder)
    elif isinstance(tree, dict) and isinstance(tree.get(key), str):
        tree[key] = _absolute(tree[key], folder)


def _absolute(value: str, folder: Path) -> str:
    """`value` from `folder` on, if it is there."""
    where, colon, function = value.rpartition(".py:")
    path = folder / Path(f"{where}.py" if colon else value).expanduser()
    return f"{os.path.abspath(path)}{f':{function}' if colon else ''}" if value and path.exists() else value
