"""Conversations as a chat template writes them, up to where the reply goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from longgrpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any] | None = None
) -> str:
    """The text of a conversation, up to the reply. One that ends with the assistant is continued. `template`: arguments
    of the chat template.

    Raises DataError if the template refuses the conversation, or rewrites the message that the reply goes on from.
    """
    last = messages[-1]
    begun = last["role"] == "assistant"
    text = applied(
        tokenizer, messages, dict(add_generation_prompt=not begun, continue_final_message=begun), template
    )  # fmt: skip
    kept = str(last.get("content") or "").strip()
    if not begun or not kept:
        return text
    if not text.rstrip().endswith(kept):
        raise DataError(
            f"the chat template rewrites the beginning of a reply: its text ends with {text[-60:]!r}, and should with "
            f"{kept[-60:]!r}; set task.chat_template to one that keeps the last message"
        )
    return text[: text.rindex(kept)] + str(last["content"]).lstrip()  # some trim what it ends with


def reply_prefix(tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any] | None = None) -> str:
    """The text with which the chat template begins every reply, such as <think>: what a generation prompt has more
    than an answer within a conversation."""
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}
    try:
        prompt = applied(tokenizer, [question], dict(add_generation_prompt=True), template)
        before, found, _ = applied(tokenizer, [question, answer, question], {}, template).partition("ANSWER")
    except DataError:  # it takes no such conversation, and does not say how a reply begins
        return ""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, before, strict=False)))
    return prompt[shared:] if found else ""


class Unfilled:
    """Rows whose messages have only the keys that were written: a column has one type, and gives every dictionary of it
    the keys of all, with None."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return unfilled(self._rows[index])


def unfilled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _without_none(value) if is_talk(value) else value for name, value in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def is_talk(value: Any) -> bool:
    """Whether a value is the messages of a conversation."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def plain_content(content: Any) -> Any:
    """Content parts of text as one text: a text model's template would print the list."""
    if not isinstance(content, list):
        return content
    if others := [part for part in content if not _is_text(part)]:
        raise DataError(f"a message has content of another type than text: {str(others[0])[:80]}")
    return "\n".join(part["text"] for part in content)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def applied(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    template: Mapping[str, Any] | None,
) -> str:
    arguments: Any = {"conversation": list(messages), "tokenize": False, **options, **(template or {})}
    try:
        text = str(tokenizer.apply_chat_template(**arguments))
        text.encode()  # half of a pair of surrogates is no text for a tokenizer
        return text
    except Exception as error:  # whatever a template's own expressions raise
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(f"the chat template refuses a conversation of {roles}: {error}") from error
