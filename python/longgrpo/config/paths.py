"""Relative paths in a config: a file's are relative to the file, the command line's to the folder that it runs in.

A run keeps them absolute, so that it is resumed and exported from anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Keys whose value may be a file, a directory, or path/to/file.py:function; `*` is each entry of a list or a mapping.
KEYS = (
    "model.path",
    "task.name",
    "task.eval_name",
    "task.eval_reward",
    "task.eval_sets.*.name",
    "task.eval_sets.*.reward",
    "task.sampler",
    "task.tools.*",
    "task.environment",
    "task.chat_template",
    "rewards.*.function",
    "rewards.*.model",
    "lora.path",
    "lora.merged",
    "loss.function",
    "train.optimizer",
    "train.callbacks.*",
)


def make_absolute(tree: Any, folder: Path) -> None:
    """Every path of the tree that exists from `folder`. What does not exist there stays as it is: a hub id, the name of
    a built-in, or a path that is refused later by its name."""
    for key in KEYS:
        _walk(tree, key.split("."), folder)


def _walk(tree: Any, keys: list[str], folder: Path) -> None:
    key, *rest = keys
    places: dict[Any, Any] = dict(enumerate(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else {}
    for place in list(places) if key == "*" else [key]:
        value = places.get(place)
        if rest:
            _walk(value, rest, folder)
        elif isinstance(value, str):
            tree[place] = _absolute(value, folder)


def _absolute(value: str, folder: Path) -> str:
    """`value` from `folder` on, if it is there."""
    where, colon, function = value.rpartition(".py:")
    path = folder / Path(f"{where}.py" if colon else value).expanduser()
    return f"{os.path.abspath(path)}{f':{function}' if colon else ''}" if value and path.exists() else value
