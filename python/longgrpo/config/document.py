"""YAML as configs are written in it: each key once, no value beyond what can be a config's."""

from __future__ import annotations

from typing import Any

import yaml

MOST = 100_000  # values, those behind aliases counted each time


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Mark] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if isinstance(name, str | int | float | bool | None) and name in seen:
                line, again = seen[name].line + 1, key.start_mark.line + 1
                raise yaml.YAMLError(f"the key {name!r} stands twice, in line {line} and in line {again}: take one out")
            if isinstance(name, str | int | float | bool | None):
                seen[name] = key.start_mark
        return super().construct_mapping(node, deep=deep)


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text. Raises yaml.YAMLError if it has none."""
    try:
        value = yaml.load(text, _Loader)
        _count(value, {}, ())
    except (ValueError, OverflowError, RecursionError) as error:  # of a date, a number, a depth
        raise yaml.YAMLError(str(error)) from error
    return value


def _count(value: Any, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values it is, with each alias written out. Raises ValueError if they are more than MOST, or endless."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in above:
        raise ValueError("an alias names what it stands in: a value without an end")
    if id(value) not in known:
        entries = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(entry, known, (*above, id(value))) for entry in entries)
        if known[id(value)] > MOST:
            raise ValueError(f"more than {MOST:,} values, aliases written out")
    return known[id(value)]
