"""Conversations with tools and environments: how a rollout's turns are read and answered."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from longgrpo.config.run import TrainConfig
from longgrpo.errors import DataError, EpisodeError
from longgrpo.rollout.protocol import Completion, Turns
from longgrpo.tasks.between import Between
from longgrpo.tasks.calls import Call, parser_for
from longgrpo.tasks.chat import is_talk, plain_content
from longgrpo.tasks.data import Problem, Prompt
from longgrpo.tasks.environment import load_environment, offered
from longgrpo.tasks.event_loop import EventLoop, bounded
from longgrpo.tasks.own_random import Generators, redirected, using
from longgrpo.tasks.prompts import Prompts
from longgrpo.tasks.tools import Malformed, Tool, as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Message = dict[str, Any]
MOST_CALLS = 16  # of a turn that are answered
MALFORMED, RAISED, TIMEOUT = "malformed", "raised", "timeout"
FAILURES = (MALFORMED, RAISED, TIMEOUT)


@dataclass(frozen=True)
class Answered:
    """A call, or an environment's reply."""

    turn: int
    name: str
    arguments: dict[str, Any]
    seconds: float
    failure: str = ""
    """One of FAILURES, or ""."""


@dataclass
class Episode:
    """What is known of one on the host, besides its tokens. A model and its tools wrote the texts: they are data."""

    prompt: Prompt
    """With what the environment adds to it."""
    tools: dict[str, Tool]
    environment: Any = None
    generators: Generators | None = None
    messages: list[Message] = field(default_factory=list)
    """After the prompt: assistant, tool, assistant, ..."""
    answered: list[Answered] = field(default_factory=list)
    failed: str = ""
    """Why it is left out of its group, if it is."""
    _pending: list[Message] = field(default_factory=list)


class Conversations:
    """The tools and the environment of a run. Raises ConfigError for what cannot be loaded, or does not fit the model's
    chat template. close() is to be called."""

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        loop: EventLoop,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """ends: the tokens that end a turn; given: objects by their names in the config."""
        task = config.task
        self._task, self._rollout, self.loop, self._tokenizer = task, config.rollout, loop, tokenizer
        self._stack = ExitStack()
        self._environment = load_environment(task.environment, given)
        self._tools = offered(task.tools, self._environment, given)
        self._ends = {*ends, *config.rollout.request().stop_token_ids}
        template = {**task.chat_template_kwargs, **self.template}
        self.between = Between(tokenizer, self._ends, template)
        named = {tool.name: tool for tool in self._tools}
        self._parse = parser_for(tokenizer, task.tool_pattern, named) if named else _no_calls
        if tokenizer.chat_template is not None and task.chat is not False:
            if self._tools:
                self.between.check("tool")
            if self._environment and not self._environment.tools:
                self.between.check("user")
        self._begun = False

    @property
    def template(self) -> dict[str, Any]:
        """Arguments of the chat template: the tools' schemas."""
        return {"tools": [tool.schema for tool in self._tools]} if self._tools else {}

    def begin(self, problems: Sequence[Problem], seeds: Sequence[int]) -> list[Episode]:
        """An episode each, its environment made with its seed. Raises EpisodeError with task.on_error: raise."""
        if self._environment and not self._begun:
            self._begun = True
            self._stack.enter_context(redirected())
        work = [self._begin(problem, seed) for problem, seed in zip(problems, seeds, strict=True)]
        return self.loop.submit(_together(work)).result()

    def turns(self, episodes: Sequence[Episode]) -> Turns:
        rollout = self._rollout

        async def goes_on(i: int, completion: Completion) -> list[int] | None:
            with using(episodes[i].generators):
                return await self._goes_on(episodes[i], completion)

        return Turns(goes_on, self.loop.submit, rollout.max_turns, rollout.turn_tokens, rollout.turns_in_rounds)

    @contextmanager
    def closing_on_error(self, episodes: Sequence[Episode]) -> Iterator[None]:
        """Closes the environments if what is in here fails."""
        try:
            yield
        except BaseException:
            self.close_episodes(episodes)
            raise

    def end(self, episode: Episode, completion: Completion) -> None:
        """The episode has ended: its messages are those whose tokens it has."""
        episode._pending.clear()
        if sum(message["role"] == "assistant" for message in episode.messages) < len(completion.turns):
            episode.messages.append(self._read(completion)[0])  # a turn that was cut off

    def close_episodes(self, episodes: Sequence[Episode]) -> None:
        """Closes their environments: the rewards have seen them."""
        work = [self._close(episode) for episode in episodes if hasattr(episode.environment, "close")]
        if work:
            self.loop.submit(_together(work)).result()

    def close(self) -> None:
        self._stack.close()

    # ---- a turn
    async def _goes_on(self, episode: Episode, completion: Completion) -> list[int] | None:
        if episode.failed:
            return None
        episode.messages += episode._pending
        episode._pending.clear()
        message, calls = self._read(completion)
        episode.messages.append(message)
        turn = len(completion.turns) - 1
        replies = await (self._call(episode, calls, turn) if calls else self._reply(episode, message, turn))
        if replies is None or episode.failed:
            return None
        episode._pending += replies
        if isinstance(episode.prompt, str):
            return self.between.content("\n".join(str(reply["content"]) for reply in replies))
        return self.between.ids(replies, completion.token_ids[-1])

    def _read(self, completion: Completion) -> tuple[Message, list[Call]]:
        """The last turn as a message, and its calls."""
        begin, end, _ = completion.turns[-1]
        ids = completion.token_ids[begin:end]
        if ids and ids[-1] in self._ends:
            ids = ids[:-1]
        raw = str(self._tokenizer.decode(ids, skip_special_tokens=False))
        content, calls = self._parse(raw)
        if content == raw:
            content = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        message: Message = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
            ]
        return message, calls

    # ---- its answer
    async def _call(self, episode: Episode, calls: Sequence[Call], turn: int) -> list[Message]:
        """The results of the calls of one turn, one after the other: later ones see what earlier ones did."""
        results: list[Message] = []
        for place, call in enumerate(calls):
            text = await self._result(episode, call, turn, place)
            if episode.failed:
                break
            # A template takes no text of the model's.
            name = call.name if call.name in episode.tools else "unknown"
            number = call.id if re.fullmatch("[A-Za-z0-9]{9}", call.id) else f"call{place:05d}"
            results.append({"role": "tool", "name": name, "tool_call_id": number, "content": self._cut(text)})
        return results

    async def _result(self, episode: Episode, call: Call, turn: int, place: int) -> str:
        try:
            if place >= MOST_CALLS:
                raise Malformed(f"more than {MOST_CALLS} calls in one turn")
            if call.error:
                raise Malformed(call.error)
            if call.name not in episode.tools:
                raise Malformed(f"there is no tool {call.name!r:.80}; the tools are: {', '.join(episode.tools)}")
            tool = episode.tools[call.name]
            arguments = tool.arguments(call)
        except Malformed as error:
            episode.answered.append(Answered(turn, call.name[:80], call.arguments, 0.0, MALFORMED))
            return f"error: {error}"
        result, error_text = await self._timed(episode, turn, tool.name, arguments, partial(tool.function, **arguments))
        return error_text or as_text(result)

    async def _reply(self, episode: Episode, message: Message, turn: int) -> list[Message] | None:
        reply = getattr(episode.environment, "reply", None)
        if reply is None:
            return None
        answer, error_text = await self._timed(
            episode, turn, "reply", {}, partial(reply, message["content"], dict(message)), "drop"
        )
        answer = error_text or answer
        if answer is None:
            return None
        if isinstance(answer, str):
            return [{"role": "user", "content": self._cut(answer)}]
        if not is_talk(answer):
            self._fail(episode, f"reply returned {answer!r:.80}: must be text, messages or None", "drop")
            return None
        return [{**one, "content": self._cut(str(plain_content(one.get("content")) or ""))} for one in answer]

    async def _timed(
        self,
        episode: Episode,
        turn: int,
        name: str,
        arguments: dict[str, Any],
        call: Callable[[], Any],
        otherwise: str = "tell",
    ) -> tuple[Any, str]:
        """What `call` returns, and the error as the model is told it."""
        start, failure, result, text = time.perf_counter(), "", None, ""
        limit = self._task.call_timeout
        try:
            result = await bounded(call, limit)
        except (TimeoutError, asyncio.TimeoutError):
            failure, text = TIMEOUT, f"error: {name} took longer than {limit:g} s"
        except Exception as error:
            failure, text = RAISED, f"error: {type(error).__name__}: {error}"
        episode.answered.append(Answered(turn, name, arguments, time.perf_counter() - start, failure))
        if failure and not self._fail(episode, f"{name}: {text.removeprefix('error: ')}", otherwise):
            text = ""
        return result, text

    def _fail(self, episode: Episode, reason: str, otherwise: str) -> bool:
        """What task.on_error says about a failure; whether the model is told."""
        rule = self._task.on_error or otherwise
        if rule == "raise":
            raise EpisodeError(
                f"{reason}; correct it, or take task.on_error: drop, which leaves the episode out of its group, or "
                "tell, which tells the model"
            )
        if rule == "drop":
            log.warning("%s; the episode is left out of its group (task.on_error: drop)", reason)
            episode.failed = reason
        return rule == "tell"

    def _cut(self, text: str) -> str:
        """At most task.result_tokens of a result, and how much is left out."""
        most = self._task.result_tokens
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        ids = self.between.content(text[: 64 * most])  # nobody makes tokens of what is megabytes too long
        if len(ids) <= most and len(text) <= 64 * most:
            return text
        kept = str(self._tokenizer.decode(ids[:most], skip_special_tokens=False))
        return f"{kept} [cut: {len(text)} characters in all]"

    # ---- its environment
    async def _begin(self, problem: Problem, seed: int) -> Episode:
        tools = {tool.name: tool for tool in self._tools}
        episode = Episode(problem.prompt, tools)
        if self._environment is None:
            return episode
        episode.generators = Generators(seed)
        with using(episode.generators):
            make = partial(self._environment.make, seed, problem.columns, problem.prompt)
            made, _ = await self._timed(episode, 0, "environment", {}, make, "drop")
        episode.answered.clear()
        if made is None:
            episode.failed = episode.failed or "its environment could not be made"
            return episode
        episode.environment, opening, own = made
        episode.tools |= {tool.name: tool for tool in own}
        if opening is not None:
            episode.prompt = _opened(problem.prompt, opening)
        return episode

    async def _close(self, episode: Episode) -> None:
        try:
            with using(episode.generators):
                await bounded(episode.environment.close, self._task.call_timeout)
        except (Exception, asyncio.TimeoutError) as error:
            log.warning("closing an environment failed: %s: %s", type(error).__name__, error)


def make_conversations(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    loop: EventLoop,
    given: Mapping[str, Any] | None = None,
) -> Conversations | None:
    """None for a run without tools and environment."""
    if not config.task.takes_turns:
        return None
    return Conversations(config, tokenizer, [] if config.rollout.request().ignore_eos else ends, loop, given)


def prompts_for(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, context: int, conversations: Conversations | None
) -> Prompts:
    """How a problem of the run becomes tokens."""
    template = conversations.template if conversations else {}
    return Prompts(tokenizer, config.task, context, config.rollout.max_completion_length, template)


def group_prompt(problem: Problem, members: Sequence[Episode]) -> Problem:
    """The problem with the one prompt of its group. Raises DataError if environments of one row begin in different
    ways: completions of different prompts are no group."""
    prompts = [episode.prompt for episode in members if not episode.failed]
    if any(prompt != prompts[0] for prompt in prompts):
        raise DataError(
            "task.environment: two environments of one row begin differently, and a group has one prompt: draw what "
            "the beginning depends on by a column of the row, such as a seed"
        )
    return replace(problem, prompt=prompts[0]) if prompts else problem


def _opened(prompt: Prompt, opening: Any) -> Prompt:
    text = str(plain_content(opening))
    if isinstance(prompt, str):
        return prompt + text
    last = prompt[-1]
    return [*prompt[:-1], {**last, "content": str(last.get("content") or "") + text}]


def _no_calls(text: str) -> tuple[str, list[Call]]:
    return text, []


async def _together(work: Sequence[Coroutine[Any, Any, Any]], most: int = 64) -> list[Any]:
    """The results of all, `most` at a time: a plain function takes a thread."""
    room = asyncio.Semaphore(most)

    async def one(part: Coroutine[Any, Any, Any]) -> Any:
        async with room:
            return await part

    return list(await asyncio.gather(*map(one, work)))
