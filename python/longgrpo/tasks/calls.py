"""The calls in a turn's text, in the format of the model's chat template or by a pattern of the user's.

Model output is untrusted: it is parsed as JSON or by a regular expression, and never executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longgrpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Call:
    """A call as the model wrote it."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    """What is wrong with it, if it cannot be read."""
    id: str = ""


Parser = Callable[[str], tuple[str, list[Call]]]
"""The text of a turn, special tokens included and the end token not -> the text outside of the calls, and the calls."""


def parser_for(
    tokenizer: PreTrainedTokenizerBase, pattern: str | None, tools: Mapping[str, Any], template: str | None = None
) -> Parser:
    """How calls of `tools` (by name) are read: by `pattern` (task.tool_pattern) if there is one, else as the chat
    template writes them. Raises ConfigError if neither says how."""
    if pattern:
        return by_pattern(pattern, tools)
    if response := getattr(tokenizer, "response_template", None):
        return _by_response_template(tokenizer, response)
    written = template if template is not None else _template_of(tokenizer)
    for sign, parse in FORMATS.items():
        if sign in written:
            return parse
    raise ConfigError(
        "task.tools: the model's chat template has no format for calls that is known (Hermes and Qwen, Llama 3, "
        "Mistral, Phi-4): say in the prompt how a call is written and set task.tool_pattern, a regular expression with "
        "a named group for each argument"
    )


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template
    return " ".join(template.values()) if isinstance(template, dict) else template or ""


# ---- by a pattern


def by_pattern(pattern: str, tools: Mapping[str, Any]) -> Parser:
    """Named groups are arguments; the group `tool` is the tool's name, which a single tool does not need.

    Raises ConfigError for a pattern that is no regular expression or names no argument.
    """
    try:
        call = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"task.tool_pattern = {pattern!r}: is no regular expression: {error}") from error
    arguments = [name for name in call.groupindex if name != "tool"]
    if "tool" not in call.groupindex and len(tools) != 1:
        raise ConfigError(
            f"task.tool_pattern = {pattern!r} does not say which of {', '.join(tools)} is called: "
            "add a group, (?P<tool>...)"
        )
    only = next(iter(tools))

    def parse(text: str) -> tuple[str, list[Call]]:
        found = [
            Call(
                match["tool"] if "tool" in call.groupindex else only,
                {name: match[name] for name in arguments if match[name] is not None},
            )
            for match in call.finditer(text)
        ]
        return text, found

    return parse


# ---- by the template's own format


def hermes(text: str) -> tuple[str, list[Call]]:
    """Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""
    return _between(text, "<tool_call>", "</tool_call>")


def phi4(text: str) -> tuple[str, list[Call]]:
    """Phi-4: <|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>."""
    return _between(text, "<|tool_call|>", "<|/tool_call|>")


def mistral(text: str) -> tuple[str, list[Call]]:
    """Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], and since version 11 [TOOL_CALLS]name[ARGS]{...}
    for each call."""
    content, *parts = text.split("[TOOL_CALLS]")
    calls: list[Call] = []
    for part in parts:
        name, named, arguments = part.partition("[ARGS]")
        if named:
            calls += _read(arguments, name.partition("[CALL_ID]")[0].strip())
        else:
            calls += _read(part)
    return content.strip(), calls


def llama3(text: str) -> tuple[str, list[Call]]:
    """Llama 3: the turn is {"name": ..., "parameters": {...}}, several of them behind each other or between
    semicolons."""
    body = text.replace("<|python_tag|>", "").strip()
    if not (body.startswith("{") and ('"name"' in body or "<|python_tag|>" in text)):
        return text, []
    return "", list(_read(body))


FORMATS: dict[str, Parser] = {
    "<tool_call>": hermes,
    "<|tool_call|>": phi4,
    "[TOOL_CALLS]": mistral,
    '"parameters": ': llama3,
}
"""By what only a template of that format has in it, the first that is found."""


def _between(text: str, opening: str, closing: str) -> tuple[str, list[Call]]:
    content, *parts = text.split(opening)
    calls: list[Call] = []
    for part in parts:
        body, closed, rest = part.partition(closing)
        if closed:
            calls += _read(body)
            content += rest
        else:
            calls.append(Call("", error=f"the call has no {closing} behind it"))
    return content.strip(), calls


_DECODER = json.JSONDecoder()


def _read(text: str, name: str | None = None) -> Iterator[Call]:
    """The calls in JSON: objects, or lists of them. With a name, the object is its arguments."""
    rest = text.strip()
    if not rest:
        yield Call(name or "", error="the call is empty")
    while rest:
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError) as error:
            yield Call(name or "", error=f"the call is not JSON: {error}")
            return
        for entry in value if isinstance(value, list) else [value]:
            yield _call({"name": name, "arguments": entry} if name is not None else entry)
        rest = rest[end:].lstrip("; \n\t\r")


def _call(value: Any) -> Call:
    """From an object with name and arguments (or parameters), perhaps within one with `function`."""
    if not isinstance(value, dict):
        return Call("", error=f"a call is an object with name and arguments, not {type(value).__name__}")
    inner = value.get("function", value)
    inner = inner if isinstance(inner, dict) else value
    name, arguments = inner.get("name"), inner.get("arguments", inner.get("parameters", {}))
    if not isinstance(name, str) or not name:
        return Call("", error="the call has no name")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return Call(name, error=f"its arguments are an object by name, not {type(arguments).__name__}")
    return Call(name, arguments, id=value["id"] if isinstance(value.get("id"), str) else "")


def _by_response_template(tokenizer: PreTrainedTokenizerBase, template: Any) -> Parser:
    """As the tokenizer's own response template says (transformers)."""

    def parse(text: str) -> tuple[str, list[Call]]:
        try:
            message: Any = tokenizer.parse_response(text, template, prefix="")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            return text, [Call("", error=f"the call cannot be read: {error}")]
        calls = message.get("tool_calls") or []
        return str(message.get("content") or ""), [_call(one) for one in calls]

    return parse
