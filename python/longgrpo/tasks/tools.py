"""Tools: typed functions with docstrings that the model may call."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longgrpo.errors import ConfigError
from longgrpo.tasks.calls import Call
from longgrpo.tasks.user_code import load_function

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": (list, tuple),
    "object": dict,
    "null": type(None),
}


class Malformed(Exception):
    """A call that no tool can answer: the message tells the model what is wrong."""


class Tool:
    """A function with its schema. Raises ConfigError if its types or its docstring do not say what it takes."""

    def __init__(self, function: Callable[..., Any], what: str = "task.tools") -> None:
        from transformers.utils.chat_template_utils import get_json_schema

        self.function = function
        self.name: str = getattr(function, "__name__", type(function).__name__)
        try:
            self.schema: dict[str, Any] = get_json_schema(function)
        except Exception as error:  # transformers' own, and whatever evaluating the annotations raises
            raise ConfigError(
                f"{what}: {self.name} is no tool: {error}. A tool has a docstring that describes it and each argument "
                "(Google's style, a section Args:), and a type for each argument"
            ) from error
        self._parameters: dict[str, Any] = self.schema["function"]["parameters"]

    def of(self, owner: Any) -> Tool:
        """The same method of another object."""
        tool = copy.copy(self)
        tool.function = getattr(owner, self.name)
        return tool

    def arguments(self, call: Call) -> dict[str, Any]:
        """The call's arguments, checked by the schema; texts become numbers if numbers are asked for.

        Raises Malformed.
        """
        properties = self._parameters.get("properties", {})
        if unknown := [name for name in call.arguments if name not in properties]:
            takes = ", ".join(properties) or "none"
            raise Malformed(f"{self.name} has no argument {unknown[0]!r}; its arguments are: {takes}")
        if missing := [name for name in self._parameters.get("required", []) if name not in call.arguments]:
            raise Malformed(f"{self.name} needs the argument {missing[0]!r}")
        return {name: self._checked(name, value, properties[name]) for name, value in call.arguments.items()}

    def _checked(self, name: str, value: Any, schema: Mapping[str, Any]) -> Any:
        wanted = schema.get("type")
        kinds = [wanted] if isinstance(wanted, str) else wanted or []
        if not kinds or (value is None and schema.get("nullable")):
            return value
        if isinstance(value, str) and "string" not in kinds:
            value = _read(value, kinds)
        if not any(_is(value, kind) for kind in kinds):
            raise Malformed(f"{self.name}: the argument {name!r} is of type {' or '.join(kinds)}, not {value!r:.80}")
        if (allowed := schema.get("enum")) and value not in allowed:
            raise Malformed(f"{self.name}: the argument {name!r} is one of {', '.join(map(str, allowed))}")
        return value


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES.get(kind, object))


def _read(value: str, kinds: Sequence[str]) -> Any:
    """A text as the JSON value that it spells, if that is of one of the kinds."""
    try:
        read = json.loads(value.strip().lower() if "boolean" in kinds else value)
    except (ValueError, RecursionError):
        return value
    return read if any(_is(read, kind) for kind in kinds) else value


def load_tools(specs: Sequence[str], given: Mapping[str, Any] | None = None) -> list[Tool]:
    """The tools that task.tools names, or that were given as objects by these names. Raises ConfigError."""
    tools = [
        Tool(given[spec] if given and spec in given else load_function(spec, "task.tools"), f"task.tools {spec!r}")
        for spec in specs
    ]
    return distinct(tools)


def distinct(tools: Sequence[Tool]) -> list[Tool]:
    names = [tool.name for tool in tools]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"task.tools: two tools are called {twice[0]}; rename one")
    return list(tools)


def as_text(result: Any) -> str:
    """A tool's result as the model reads it: text as it is, other values as JSON, or as Python writes them."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(result)


def methods_of(environment: Any) -> list[Callable[..., Any]]:
    """The public methods that a TRL environment offers as tools."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    return [
        getattr(environment, name)
        for name in names
        if not name.startswith("_") and name not in ("reset", "get_reward", "close")
    ]
