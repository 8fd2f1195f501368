"""Problems: where they come from, in which order, which are held out, and how one becomes the tokens of a prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from longgrpo.config.task import TaskConfig
from longgrpo.errors import DataError
from longgrpo.rollout.protocol import Completion
from longgrpo.tasks.chat import is_talk, plain_content, render
from longgrpo.tasks.sources import ENDLESS, Row, Rows, Streamed, is_reasoning_gym
from longgrpo.tasks.user_code import load_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
Prompt = str | Messages
"""Plain text, or the messages of a conversation."""
Reply = str | Messages
"""As TRL has it: text for a prompt of text, [{"role": "assistant", "content": text}] for a conversation."""

NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # of a row: the trainer hands rewards its own
RESERVED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class Problem:
    """columns are passed to the reward functions by name; question is the text that identifies the problem."""

    question: str
    prompt: Prompt
    """As the model gets it."""
    columns: dict[str, Any]
    index: int = 0
    """Its place in the source."""
    text: str | None = None
    """The row's prompt, if it is text that is sent as a user's message."""

    def form(self, sent: bool = False) -> Prompt:
        """The prompt as rewards get it, TRL's rule: text if the row has text. sent: as the model gets it."""
        return self.prompt if sent or self.text is None else self.text

    def fields(self) -> dict[str, Any]:
        """What a template may name: the columns, and the entries of a column that is a mapping (metadata)."""
        nested = [value for value in self.columns.values() if isinstance(value, dict)]
        return {key: value for mapping in (*nested, self.columns) for key, value in mapping.items()}


# ---- problems


class Source(Protocol):
    """A sequence of problems: item i is always the same."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Problem: ...


class Problems:
    """The problems of rows. With `chat` a prompt of plain text becomes a user's message. A reply that is begun, by the
    template (`prefix`) or by a conversation's last message, has its beginning in the column reply_prefix."""

    def __init__(self, rows: Rows, task: TaskConfig, chat: bool, prefix: str = "") -> None:
        self._rows, self._task, self._prefix = rows, task, prefix
        self._chat = chat if task.chat is None else task.chat
        self._column = task.prompt_column or ("question" if is_reasoning_gym(task.name) else "prompt")

        self.streamed = isinstance(rows, Streamed)
        """Whether the rows can only be read in their order."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Problem:
        row: Row = self._rows[index]
        if self._column not in row:
            raise DataError(
                f"row {index} of the task has no {self._column!r}; its columns are {', '.join(row)}: "
                "name the prompt's in task.prompt_column"
            )
        content = row[self._column]
        columns = {name: value for name, value in row.items() if name not in NOT_COLUMNS}
        if taken := [name for name in columns if name in RESERVED]:
            raise DataError(
                f"row {index} of the task: a column must not be called {taken[0]!r}, an argument that rewards get"
            )
        question, prompt = _text(content, index), self._prompt(content)
        if not isinstance(prompt, str) and (prefix := self._begun(prompt)):
            columns = {"reply_prefix": prefix, **columns}
        text = content if isinstance(content, str) and not isinstance(prompt, str) else None
        return Problem(question, prompt, columns, index, text)

    def _begun(self, prompt: Messages) -> str:
        return str(prompt[-1]["content"]) if prompt[-1]["role"] == "assistant" else self._prefix

    def _prompt(self, content: str | Messages) -> Prompt:
        system = self._task.system_prompt
        if isinstance(content, str) and not self._chat:
            return f"{system}\n\n{content}" if system else content
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else _messages(content)
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return messages


def _text(content: Any, index: int) -> str:
    """The prompt as one text; raises DataError if it is neither text nor messages, or empty."""
    if is_talk(content):
        talk = "\n".join(str(plain_content(message.get("content")) or "") for message in content)
        _require_text(talk, index)
        return talk
    if not isinstance(content, str):
        raise DataError(f"row {index} of the task: a prompt is text or a list of messages with roles, not {content!r}")
    if not content.strip():
        raise DataError(f"row {index} of the task has an empty prompt")
    _require_text(content, index)
    return content


def _require_text(text: str, index: int) -> None:
    """JSON can hold half of a pair of surrogates, which is no text for a tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"row {index} of the task: its prompt has a lone surrogate at {error.start}: correct it"
        ) from None


def _messages(content: Messages) -> Messages:
    """Without empty keys, and with content as text."""
    return [
        {key: plain_content(v) if key == "content" else v for key, v in message.items() if v is not None}
        for message in content
    ]


# ---- their order


class Sampler:
    """Chooses the problem at each position of the run: in order, again and again.

    task.sampler names a subclass. It is created with the source and task.seed, and can choose the next problems by the
    earlier ones and their rewards. Whatever `index` depends on besides the position belongs in `state`.
    """

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed

    def index(self, position: int) -> int:
        """The index in the source of the problem at a position, from 0."""
        return position % len(self.source)

    def observe(self, problems: Sequence[Problem], rewards: Tensor) -> None:
        """Called after every rollout with its problems and their rewards [problems, num_generations]."""

    def state(self) -> Any:
        """What a resumed run needs, as JSON values."""
        return None

    def restore(self, state: Any) -> None:
        """Continues from a value of `state`."""


class Shuffled(Sampler):
    """Every problem once an epoch, each epoch in an order of its own."""

    _epoch, _order = -1, torch.empty(0)

    def index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self.source), self.seed + epoch)
        return int(self._order[place])


def permutation(count: int, seed: int) -> Tensor:
    """[count] int64, the same on every machine."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def make_sampler(task: TaskConfig, source: Source) -> Sampler:
    if task.sampler:
        sampler: Sampler = load_function(task.sampler, "task.sampler")(source, task.seed)
        return sampler
    return (Shuffled if task.shuffle and not _stays_in_order(task, source) else Sampler)(source, task.seed)


def _stays_in_order(task: TaskConfig, source: Source) -> bool:
    """reasoning_gym's problems are random already, and a stream has no other order."""
    return is_reasoning_gym(task.name) or getattr(source, "streamed", False)


class PromptStream:
    """The training problems, without the held-out ones, again and again. `state` is its whole position: a new stream
    that is given it continues with the same problems."""

    def __init__(
        self,
        source: Source,
        held_out: set[str],
        sampler: Sampler | None = None,
        usable: Callable[[Problem], bool] = lambda problem: True,
    ) -> None:
        self._source, self._held_out, self._usable = source, held_out, usable
        self._sampler, self.position = sampler or Sampler(source, 0), 0

    @property
    def state(self) -> dict[str, Any]:
        return {"position": self.position, "sampler": copy.deepcopy(self._sampler.state())}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self._sampler.restore(state["sampler"])

    @property
    def epoch(self) -> float:
        """How often the source has been gone through; 0 of a stream whose end has not been seen."""
        size = len(self._source)
        return self.position / size if size < ENDLESS else 0.0

    def observe(self, problems: Sequence[Problem], rewards: Tensor) -> None:
        self._sampler.observe(copy.deepcopy(problems), rewards.clone())  # what it changes is not trained on

    def ahead(self, count: int) -> list[Problem]:
        """The problems that the next `count` may be, without those held out: all of them if a curriculum chooses, none
        of a stream."""
        size = len(self._source)
        if getattr(self._source, "streamed", False):
            return []  # nobody knows what comes
        if type(self._sampler) in (Sampler, Shuffled):
            positions = range(self.position, self.position + min(size, count + len(self._held_out)))
            indices = [self._sampler.index(position) for position in positions]
        else:
            indices = list(range(size))
        problems = (self._source[index] for index in indices)
        return [problem for problem in problems if problem.question not in self._held_out]

    def peek(self, count: int) -> list[Problem]:
        """What take() would return, without taking it."""
        state = self.state
        problems = self.take(count)
        self.state = state
        return problems

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems. Raises DataError if every problem of the task is held out."""
        problems: list[Problem] = []
        skipped = 0
        while len(problems) < count:
            problem = self._source[self._sampler.index(self.position)]
            self.position += 1
            if problem.question not in self._held_out and self._usable(problem):
                problems.append(problem)
                skipped = 0
                continue
            skipped += 1
            if skipped >= len(self._source):
                raise DataError(
                    f"all {len(self._source)} problems of the task are held out: no prompts are left to train on; "
                    "lower task.eval_n or widen task.parameters"
                )
        return problems


def held_out_problems(source: Source, task: TaskConfig) -> list[Problem]:
    """task.eval_n problems of different question text; those of a data set are drawn by task.eval_seed."""
    count = min(len(source), 20 * task.eval_n)
    order = range(count) if _stays_in_order(task, source) else permutation(len(source), task.eval_seed).tolist()
    problems: dict[str, Problem] = {}
    for index in order[:count]:
        if len(problems) == task.eval_n:
            break
        problem = source[index]
        problems.setdefault(problem.question, problem)
    if len(problems) < task.eval_n:
        raise DataError(
            f"the task gives only {len(problems)} different problems in {count}, "
            f"task.eval_n = {task.eval_n}: lower it or widen task.parameters"
        )
    return list(problems.values())


# ---- tokens


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: Mapping[str, Any] | None = None, prefix: str = ""
) -> list[int]:
    """The token ids of a prompt, up to where the reply begins (after `prefix`). `template`: arguments of the chat
    template. A conversation that ends with the assistant is continued."""
    if not isinstance(prompt, str):
        text = render(tokenizer, prompt, template) + prefix
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote them
    text = prompt + prefix
    templated = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not templated)["input_ids"])


def as_reply(prompt: Prompt, text: str) -> Reply:
    """A completion in the form of its prompt: text, or an assistant's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def columns_of(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """The columns of the problems, each a list with one entry per problem (None if it has no such column)."""
    names = dict.fromkeys(name for problem in problems for name in problem.columns)
    return {name: [problem.columns.get(name) for problem in problems] for name in names}


def decode(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[Completion], skip_special_tokens: bool = True
) -> list[str]:
    """The texts of completions, by default without the end token and other special ones."""
    return [str(tokenizer.decode(c.token_ids, skip_special_tokens=skip_special_tokens)) for c in completions]


def check_length(prompt_ids: list[int], problem: Problem, context: int) -> None:
    """Raises DataError for a prompt that leaves no room for a completion within `context` tokens."""
    if len(prompt_ids) >= context:
        raise DataError(
            f"a prompt has {len(prompt_ids)} tokens, the context {context}: no room for a completion; "
            f"shorten the task's prompts or raise rollout.max_model_len (it begins {problem.question[:60]!r})"
        )
