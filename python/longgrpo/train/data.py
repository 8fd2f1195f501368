"""Problems: where they come from, which are held out, and how one becomes the tokens of a prompt."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from longgrpo.rollout.engine import Completion
from longgrpo.train.config import TaskConfig
from longgrpo.train.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]
"""Plain text, or the messages of a conversation."""
Reply = str | list[dict[str, str]]
"""What TRL hands to rewards: text for a plain prompt, [{"role": "assistant", "content": text}] for a conversation."""

DEFAULT_SIZE = 100_000


@dataclass(frozen=True)
class Problem:
    """columns are handed to the reward functions by name."""

    question: str
    prompt: Prompt
    columns: dict[str, Any]

    def fields(self) -> dict[str, Any]:
        """What a template may name: the columns, and the entries of a column that is a mapping (metadata)."""
        nested = [value for value in self.columns.values() if isinstance(value, dict)]
        return {key: value for mapping in (*nested, self.columns) for key, value in mapping.items()}


class Source(Protocol):
    """A sequence of problems: item i is always the same."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


class ReasoningGymSource:
    """A task of reasoning_gym. The columns of a problem are question, answer and metadata."""

    def __init__(self, task: TaskConfig, seed: int, chat: bool) -> None:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if task.name not in DATASETS:
            near = difflib.get_close_matches(task.name, DATASETS, n=3)
            remedy = f"did you mean {' or '.join(near)}?" if near else "see reasoning_gym's gallery for the names"
            raise DataError(f"task.name = {task.name!r}: reasoning_gym has no such task; {remedy}")
        if "seed" in task.parameters:
            raise DataError("task.parameters.seed: set task.seed (training) and task.eval_seed (held out) instead")
        parameters = {"size": DEFAULT_SIZE, **task.parameters, "seed": seed}
        try:
            self._items = reasoning_gym.create_dataset(task.name, **parameters)
        except (TypeError, ValueError, AssertionError) as error:
            raise DataError(f"task.parameters = {task.parameters}: {task.name} refuses them: {error}") from error
        if len(self._items) == 0:
            raise DataError(f"task {task.name} with {task.parameters} has no prompts; set task.parameters.size above 0")
        self._system_prompt, self._chat = task.system_prompt, chat

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Problem:
        item = self._items[index]
        question = item["question"]
        if not question.strip():
            raise DataError(f"problem {index} of the task has an empty question")
        columns = {"question": question, "answer": item["answer"], "metadata": item["metadata"]}
        return Problem(question, self._prompt(question), columns)

    def _prompt(self, question: str) -> Prompt:
        if self._chat:
            system = [{"role": "system", "content": self._system_prompt}] if self._system_prompt else []
            return [*system, {"role": "user", "content": question}]
        return f"{self._system_prompt}\n\n{question}" if self._system_prompt else question


class PromptStream:
    """The training problems in order, without the held-out ones, over and over. `position` says all about where it is:
    a stream made anew and set to it goes on with the same problems."""

    def __init__(self, source: Source, held_out: set[str], position: int = 0) -> None:
        self._source, self._held_out, self.position = source, held_out, position

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems. Raises DataError where every problem of the task is held out."""
        problems: list[Problem] = []
        skipped = 0
        while len(problems) < count:
            problem = self._source[self.position % len(self._source)]
            self.position += 1
            if problem.question not in self._held_out:
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


def held_out_problems(source: Source, count: int) -> list[Problem]:
    """`count` problems of different question text, the first that `source` gives."""
    problems: dict[str, Problem] = {}
    for problem in _first(source, 20 * count):
        problems.setdefault(problem.question, problem)
        if len(problems) == count:
            break
    if len(problems) < count:
        raise DataError(
            f"the task gives only {len(problems)} different problems in {min(len(source), 20 * count)}, "
            f"task.eval_n = {count}: lower it or widen task.parameters"
        )
    return list(problems.values())


def _first(source: Source, count: int) -> Iterator[Problem]:
    return (source[i] for i in itertools.islice(range(len(source)), count))


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, reply_prefix: str = "") -> list[int]:
    """The token ids of a prompt, up to where the reply begins (after `reply_prefix`)."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt + reply_prefix)["input_ids"])
    text = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    return list(tokenizer(text + reply_prefix, add_special_tokens=False)["input_ids"])  # the template wrote them


def as_reply(prompt: Prompt, text: str) -> Reply:
    """A completion in the form of its prompt: text, or an assistant's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def columns_of(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """The columns of the problems, each a list with one entry a problem."""
    return {name: [problem.columns[name] for problem in problems] for name in problems[0].columns} if problems else {}


def decode(tokenizer: PreTrainedTokenizerBase, completions: Sequence[Completion]) -> list[str]:
    """The texts of completions, without the end token and other special ones."""
    return [str(tokenizer.decode(c.token_ids, skip_special_tokens=True)) for c in completions]


def check_length(prompt_ids: list[int], problem: Problem, context: int) -> None:
    """Raises DataError for a prompt that leaves no room for a completion within `context` tokens."""
    if len(prompt_ids) >= context:
        raise DataError(
            f"a prompt has {len(prompt_ids)} tokens, the context {context}: no room for a completion; "
            f"shorten the task's prompts or raise rollout.max_model_len (it begins {problem.question[:60]!r})"
        )
