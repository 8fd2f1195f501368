"""Keys of a config by their dotted names: overrides on the command line, errors that name the key and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from longgrpo.config.document import read_yaml
from longgrpo.config.from_trl import answer
from longgrpo.errors import ConfigError

# Former names of keys.
RENAMED = {"train.passes": "train.num_iterations", "train.max_nonfinite": "train.max_skipped_updates"}


def parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """["--train.steps", "5"] or ["--train.steps=5"] -> [("train.steps", 5)]; a value is read as YAML."""
    overrides, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"{flag!r}: expected --group.key VALUE, for example --train.steps 5")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key}: needs a value, for example --{key} 5")
            text = rest.pop(0)
        try:
            overrides.append((key, read_yaml(text)))
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key} {text}: the value is not YAML: {error}") from error
    return overrides


def set_key(tree: Any, key: str, value: Any) -> None:
    """Sets tree[a][b] for the key "a.b"; a number indexes a list."""
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(tree, dict):
            if tree.get(part) is None:
                tree[part] = {}
            tree = tree[part]
        else:
            tree = tree[_index(tree, part, key)]
    if isinstance(tree, dict):
        tree[last] = value
    else:
        tree[_index(tree, last, key)] = value


def _index(tree: Any, part: str, key: str) -> int:
    if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
        return int(part)
    what = f"a list of {len(tree)}: take a number below {len(tree)}" if isinstance(tree, list) else "not a group"
    raise ConfigError(f"--{key}: what {part!r} points into is {what}")


def explain(problem: dict[str, Any], root: type) -> str:
    """One line for one of pydantic's errors: the dotted key, the value, what is wrong and the nearest key."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "unexpected_keyword_argument":
        if key in RENAMED:
            return f"{key!r} is now {RENAMED[key]!r}"
        if theirs := answer(location[-1]):
            return f"unknown key {key!r}; {theirs}"
        known = field_names(_class_at(root, location[:-1]))
        near = difflib.get_close_matches(location[-1], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
        return f"unknown key {key!r}; {remedy}"
    if problem["type"] == "missing":
        return f"{key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own checks name the value themselves
        return f"{key}: {message}" if location else message
    return f"{key} = {problem['input']!r}: {message}"


def _class_at(root: type, location: list[str]) -> Any:
    """The dataclass that holds the keys at a location such as ["rewards", "0"]."""
    current: Any = root
    for part in location:
        if part.isdecimal():
            continue  # the index of a list; `current` is already the class of its elements
        current = typing.get_type_hints(current)[part]
        while typing.get_args(current):  # list[X], X | None
            current = typing.get_args(current)[0]
    return current


def keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key below a dataclass; those of lists and mappings are not named."""
    hints = typing.get_type_hints(cls)
    for name in field_names(cls):
        yield f"{prefix}{name}"
        nested = [hint for hint in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(hint)]
        if nested and typing.get_origin(hints[name]) not in (list, dict):
            yield from keys(nested[0], f"{prefix}{name}.")


def field_names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]
