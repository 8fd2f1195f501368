"""The problems of a run: what it trains on and in which order, and what is held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longgrpo.config.run import TrainConfig
from longgrpo.errors import ConfigError
from longgrpo.tasks.chat import reply_prefix
from longgrpo.tasks.data import Problem, Problems, PromptStream, held_out_problems, make_sampler
from longgrpo.tasks.prompts import Prompts
from longgrpo.tasks.sources import load_rows


def problems_of(
    config: TrainConfig, prompts: Prompts, given: Mapping[str, Any] | None = None
) -> tuple[dict[str, list[Problem]], PromptStream]:
    """The held-out problems of each set, and the training ones without them. prompts: how one becomes tokens; given:
    data sets by name. Prompts that are too long are counted here: later none of them stops the run."""
    task, tokenizer = config.task, prompts.tokenizer
    chat = tokenizer.chat_template is not None
    prefix = reply_prefix(tokenizer, task.chat_template_kwargs) if chat else ""
    held_out = {
        name: held_out_problems(Problems(load_rows(own, True, given), own, chat, prefix), own)
        for name, own in task.held_out.items()
    }
    source = Problems(load_rows(task, given=given), task, chat, prefix)
    if not chat and not isinstance(source[0].prompt, str):
        raise ConfigError(
            "the task's prompts are conversations and the model has no chat template: set task.chat_template"
        )
    never_trained = {problem.question for problems in held_out.values() for problem in problems}
    stream = PromptStream(source, never_trained, make_sampler(task, source), prompts.usable)
    train = config.train
    prompts.select(stream.ahead(train.steps * train.prompts_per_step * (1 + train.max_refills)), "training prompts")
    used = {name: prompts.select(problems, "held-out prompts") for name, problems in held_out.items()}
    return used, stream
