"""Reward functions in the shapes that TRL's users write, on rows of both forms: a text prompt gives them text, a
conversation gives messages."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from transformers import TrainerState

from longgrpo.config.task import RewardConfig, TaskConfig
from longgrpo.errors import RewardError
from longgrpo.rollout.protocol import Completion
from longgrpo.run.trainer import Trainer
from longgrpo.tasks.data import Problems
from longgrpo.tasks.load_reward import load_reward
from longgrpo.tasks.rewards import Reward, Rewarding
from longgrpo.tasks.sample import Sample

REPLIES = ["<think>two and two</think>4", "5"]
TEXT = {"prompt": "What is 2 + 2?", "solution": "4", "task": "math"}
TALK = {**TEXT, "prompt": [{"role": "user", "content": "What is 2 + 2?"}]}


# ---- the shapes, for text


def length(completions, **kwargs):
    """Of TRL's quick start: the closer to 20 characters, the better."""
    return [-abs(20 - len(completion)) for completion in completions]


def ends_right(prompts, completions, solution, **kwargs):
    """A column of the data by its name."""
    return [float(c.endswith(s) and "?" in p) for p, c, s in zip(prompts, completions, solution, strict=True)]


async def judged(completions, **kwargs):
    """Waits for a service."""
    await asyncio.sleep(0)
    return [float("4" in completion) for completion in completions]


class Tagged:
    """An object with a name; it logs, and reads the state of the run."""

    __name__ = "tagged"

    def __call__(self, prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("ids", [len(ids) for ids in completion_ids])
        log_metric("tagged_share", 0.5)
        assert trainer_state.global_step == 0
        return [1.0 if re.match(r"<think>.*</think>", completion) else 0.0 for completion in completions]


def only_code(prompts, completions, task, **kwargs):
    """None for the rows of another task."""
    return [float("def " in c) if kind == "code" else None for c, kind in zip(completions, task, strict=True)]


SHAPES = {length: [-7.0, -19.0], ends_right: [1.0, 0.0], judged: [1.0, 0.0], Tagged(): [1.0, 0.0],
          only_code: [None, None]}  # fmt: skip


# ---- the same for conversations, as the functions of TRL's own package are written


def of_messages(function):
    def plain(completions):
        assert all([message["role"] for message in completion] == ["assistant"] for completion in completions)
        return [completion[0]["content"] for completion in completions]

    def first(prompts):
        return [prompt[-1]["content"] for prompt in prompts]

    def called(prompts, completions, **kwargs):
        return function(prompts=first(prompts), completions=plain(completions), **kwargs)

    async def awaited(prompts, completions, **kwargs):
        return await function(prompts=first(prompts), completions=plain(completions), **kwargs)

    return awaited if asyncio.iscoroutinefunction(function) else called


def scored(row, function, chat=True):
    """What the function gives to REPLIES, as a step asks it."""
    problem = Problems([row], TaskConfig("rows.jsonl"), chat)[0]
    samples = [Sample(0, [1], Completion([3, 4], [-1.0, -1.0], "stop"), reply) for reply in REPLIES]
    rewarding = Rewarding([Reward("own", function)])
    try:
        rewarding.begin(problem, samples, TrainerState())
        values = rewarding.finish([problem] * 2, samples, TrainerState())[0].tolist()
    finally:
        rewarding.close()
    return [None if value != value else value for value in values]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("function", SHAPES, ids=lambda function: function.__name__)
def test_a_text_prompt_gives_text_whether_or_not_it_is_sent_as_a_message(function, chat):
    assert scored(TEXT, function, chat) == SHAPES[function]


@pytest.mark.parametrize("function", SHAPES, ids=lambda function: function.__name__)
def test_a_conversation_gives_messages(function):
    assert scored(TALK, of_messages(function)) == SHAPES[function]


@pytest.mark.parametrize(("row", "function", "said"), [
    (TEXT, of_messages(length), "its completions are text, since the prompts are: rows whose prompt is messages"),
    (TALK, ends_right, 'its completions are messages, since the prompts are: the text of one is completion[-1]'),
])  # fmt: skip
def test_a_function_for_the_other_form_is_told_of_it(row, function, said):
    with pytest.raises(RewardError, match=re.escape(said)):
        scored(row, function)


@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_run_trains_and_evaluates_with_them(tree, tmp_path, form):
    seen = []

    def letters(prompts, completions, **kwargs):
        seen.extend([*prompts, *completions])
        return [len(c if isinstance(c, str) else c[0]["content"]) / 10 for c in completions]

    def prompt(text):
        return text if form == "text" else [{"role": "user", "content": text}]

    rows = [{"prompt": prompt(f"{n} + 1 ="), "solution": str(n + 1)} for n in range(12)]
    tree["task"] = {"eval_n": 2, "name": "given:train_dataset"}
    tree["train"] |= {"steps": 1, "probe_prompts": 0}
    del tree["rewards"]
    assert Trainer(tree, tmp_path / "run", reward_functions=[letters], train_dataset=rows).run()
    assert {type(value) for value in seen} == {str if form == "text" else list}
    replies = json.loads((tmp_path / "run/eval_after.json").read_text())["replies"]
    assert all(isinstance(reply, str) for reply in replies)


def test_a_function_of_trls_own_is_named_like_any():
    pytest.importorskip("trl", reason="no TRL: pip install -r requirements/test.txt")
    think = load_reward(RewardConfig("trl.rewards:think_format_reward"))
    assert scored(TALK, think.function) == [1.0, 0.0]
