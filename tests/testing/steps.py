"""A step by its phases."""

from __future__ import annotations

import torch

from longgrpo.rollout import Completion
from longgrpo.tasks.sample import Rollout, Sample
from longgrpo.train.loop import Loop, advantage, score
from longgrpo.train.update import Update, plan_updates


def sample(group: int, prompt: list[int], completion: list[int], logprobs: list[float] | None = None) -> Sample:
    return Sample(group, prompt, Completion(completion, logprobs or [0.0] * len(completion), "stop"), "")


def rollout_of(samples: list[Sample], advantages: list[float] | None = None) -> Rollout:
    """Samples whose rewards nobody asks for, as one row of advantages (1 each by default)."""
    rollout = Rollout.of([], samples, torch.zeros(0, 1, len(samples)))
    rollout.advantages = torch.tensor([advantages or [1.0] * len(samples)])
    return rollout


def collected(loop: Loop, number: int = 1) -> Rollout:
    """Phases 1 to 4 of a step, once, without refills."""
    collector = loop.collector
    problems = collector.sample_prompts(loop.config.train.prompts_per_step)
    samples = collector.roll_out(problems, number)
    rollout = Rollout.of(problems, samples, collector.reward(problems, samples, number))
    rollout.advantages = advantage(loop.config, rollout, collector.rewarding.weights)
    return rollout


def rolled_out(loop: Loop, number: int = 1) -> tuple[Rollout, Update]:
    """Phases 1 to 5 of a step: the rollout, and one scored update of all of it."""
    rollout = collected(loop, number)
    (update,) = plan_updates(loop.config, rollout, torch.device("cpu"), parts=1)
    score(loop.config, loop.state, [update])
    return rollout, update
