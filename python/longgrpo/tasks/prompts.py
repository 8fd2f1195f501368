"""Prompts as tokens, and what happens to those that leave no room for a completion."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longgrpo.config.task import TaskConfig
from longgrpo.errors import DataError
from longgrpo.tasks.data import Problem, check_length, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompts:
    """context: tokens of prompt and completion together; room: of the longest completion; template: arguments of the
    chat template besides the task's."""

    tokenizer: PreTrainedTokenizerBase
    task: TaskConfig
    context: int
    room: int
    template: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, problem: Problem, prefix: str = "") -> list[int]:
        """The tokens of a problem's prompt, and of the beginning of its reply. With task.long_prompts: cut, one that
        fills the context keeps its end, so that a whole completion fits; otherwise it raises DataError."""
        ids = encode(self.tokenizer, problem.prompt, {**self.task.chat_template_kwargs, **self.template}, prefix)
        if self.task.long_prompts == "cut" and len(ids) >= self.context:
            return ids[-max(1, self.context - self.room) :]
        check_length(ids, problem, self.context)
        return ids

    def fits(self, problem: Problem) -> bool:
        """Whether it leaves room for a completion as it is."""
        template = {**self.task.chat_template_kwargs, **self.template}
        return len(encode(self.tokenizer, problem.prompt, template)) < self.context

    def usable(self, problem: Problem) -> bool:
        """Whether it is trained and evaluated on."""
        return self.task.long_prompts == "cut" or self.fits(problem)

    def select(self, problems: Sequence[Problem], which: str) -> list[Problem]:
        """Counts the problems that do not fit, and returns those that are used. which: what the problems are.

        Raises DataError for task.long_prompts: refuse, if there are any, and if none is left.
        """
        long = [problem for problem in problems if not self.fits(problem)]
        if not long:
            return list(problems)
        rule = self.task.long_prompts
        found = f"{len(long)} of {len(problems)} {which} have {self.context} tokens or more, the context"
        if rule == "refuse":
            raise DataError(
                f"{found} {self.context}: no room for a completion; task.long_prompts: drop leaves them out and cut "
                f"keeps their ends, or raise rollout.max_model_len (the first begins {long[0].question[:60]!r})"
            )
        log.warning("%s: %s (task.long_prompts)", found, "dropped" if rule == "drop" else "cut to their ends")
        left = [problem for problem in problems if self.usable(problem)]
        if not left:
            raise DataError(f"{found}: none of them is left; raise rollout.max_model_len, or take long_prompts: cut")
        return left
