"""What stands between a sampled turn and the next: the messages of a reply, as the chat template writes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from longgrpo.errors import ConfigError, DataError
from longgrpo.tasks.chat import applied

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
ANSWER = "Zebra"
_CALL = {"type": "function", "id": "aaaaaaaaa", "function": {"name": "lookup", "arguments": {}}}
_TALKS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Question"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Another question"},
    ],
)
"""Conversations with which a template is tried: what it adds must not depend on them."""
_THOUGHT = "<think>\nHm.\n</think>\n\n"


class Between:
    """The tokens between turns. What the template writes around a reply is computed once for each kind of reply, and
    the sampled tokens are never written again. The content of a reply is data: in it no text becomes a special token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        template: Mapping[str, Any] | None = None,
    ) -> None:
        """ends: the tokens that end a turn; template: arguments of the chat template."""
        self._tokenizer, self._ends, self._template = tokenizer, set(ends), template or {}
        self._around: dict[tuple[Any, ...], tuple[str, list[str]]] = {}

    def check(self, role: str) -> None:
        """Raises ConfigError if the template cannot go on after a reply of this role, writes an earlier turn in another
        way once there is a later one, or says something between that depends on the conversation."""
        reply: list[dict[str, Any]] = [_probe(role)]
        for replies in (reply, reply * 2) if role == "tool" else (reply,):
            found = {self._look(replies, talk, thought) for talk in _TALKS for thought in ("", _THOUGHT)}
            if len(found) > 1:
                raise ConfigError(f"the chat template writes {role} messages in another way in each conversation")

    def ids(self, messages: Sequence[Message], last: int) -> list[int]:
        """The tokens after a turn whose last sampled token is `last`, up to where the next turn begins: the rest of
        what ends a turn, the messages, and what begins a reply."""
        end, pieces = self._pieces(messages)
        ids = self._tokens(pieces[0] if last in self._ends else end + pieces[0])
        for message, piece in zip(messages, pieces[1:], strict=True):
            ids += self.content(self._written(message))
            ids += self._tokens(piece)
        return ids

    def content(self, text: str) -> list[int]:
        """The tokens of data: no text in it becomes a special token."""
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return list(ids)

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _pieces(self, messages: Sequence[Message]) -> tuple[str, list[str]]:
        key = tuple(_kind(message) for message in messages)
        if key not in self._around:
            end, *pieces = self._look([dict(kind) for kind in key], _TALKS[0])
            self._around[key] = end, pieces
        return self._around[key]

    def _written(self, message: Message) -> str:
        """The content as the template writes it: trimmed, or as JSON."""
        content = str(message.get("content") or "")
        _, (before, after) = self._pieces([message])
        try:
            _, text = self._render([dict(message)], _TALKS[0])
        except DataError:
            return content
        inner = len(text) - len(after)
        if text.startswith(before) and text.endswith(after) and inner >= len(before):
            return text[len(before) : inner]
        return content

    def _look(self, messages: Sequence[Message], talk: list[dict[str, Any]], thought: str = "") -> tuple[str, ...]:
        """The text that ends a turn, and the pieces around the contents of `messages`. Raises ConfigError."""
        marks = [f"Quagga{i}q" for i in range(len(messages))]
        marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        try:
            end, text = self._render(marked, talk, thought)
        except DataError as error:
            raise ConfigError(
                f"{error}: set task.chat_template to one that takes {messages[0]['role']} messages"
            ) from error
        pieces = []
        for mark in marks:
            piece, found, text = text.partition(mark)
            if not found:
                raise ConfigError(
                    f"the chat template leaves out a {messages[0]['role']} message: the model would never read it; set "
                    "task.chat_template to one that writes it"
                )
            pieces.append(piece)
        return end, *pieces, text

    def _render(self, messages: list[dict[str, Any]], talk: list[dict[str, Any]], thought: str = "") -> tuple[str, str]:
        """The end token's text, and what the template writes from behind it up to the next reply."""
        answer: dict[str, Any] = {"role": "assistant", "content": thought + ANSWER}
        called = {**answer, "tool_calls": [_CALL for m in messages if m["role"] == "tool"]}
        turns = [called, answer] if called["tool_calls"] else [answer]
        refused: DataError | None = None
        for turn in turns:  # some templates want the call of a tool's result, and some refuse it
            try:
                prompt = applied(self._tokenizer, talk, {"add_generation_prompt": True}, self._template)
                before = applied(self._tokenizer, [*talk, turn], {}, self._template)
                whole = applied(
                    self._tokenizer, [*talk, turn, *messages], {"add_generation_prompt": True}, self._template
                )
                break
            except DataError as error:
                refused = refused or error
        else:
            assert refused
            raise refused
        if not whole.startswith(before):
            raise ConfigError(
                "the chat template writes an earlier turn in another way once a later one follows: the model would be "
                "trained on a conversation that nobody has with it. It often strips the thinking: set "
                "task.chat_template to one that keeps earlier turns, or answer with tools instead of user messages"
            )
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, before, strict=False)))
        names = [str(name) for name in self._tokenizer.convert_ids_to_tokens(sorted(self._ends))]
        place, name = max((before.rfind(name, shared), name) for name in names) if names else (-1, "")
        if place < 0:
            raise ConfigError(
                f"the chat template writes none of the tokens that end a turn ({', '.join(names)}) after a reply: "
                "correct task.chat_template, or eos_token_id in the model's generation_config.json"
            )
        return name, before[place + len(name) :] + whole[len(before) :]


def _probe(role: str) -> dict[str, Any]:
    message = {"role": role, "content": ""}
    return message | {"name": "lookup", "tool_call_id": _CALL["id"]} if role == "tool" else message


def _kind(message: Message) -> tuple[tuple[str, Any], ...]:
    """What the template may write of a message besides its content."""
    return tuple(sorted((name, str(value)) for name, value in message.items() if name != "content"))
