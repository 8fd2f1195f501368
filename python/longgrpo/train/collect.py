"""Phases 1 to 3 of a step: draw prompts, sample completions, reward them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longgrpo.config.run import TrainConfig
from longgrpo.errors import TrainingError
from longgrpo.rollout.protocol import Completion, RolloutEngine, seed_for
from longgrpo.tasks.data import Problem, PromptStream, decode
from longgrpo.tasks.episodes import Conversations, Episode, group_prompt, prompts_for
from longgrpo.tasks.prompts import Prompts
from longgrpo.tasks.rewards import Rewarding
from longgrpo.tasks.sample import Rollout, Sample
from longgrpo.train.advantages import groups_with_spread, weighted_sum
from longgrpo.train.metrics import Clock, reward_metrics
from longgrpo.train.ranks import ALONE, Ranks, merged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerState


@dataclass(frozen=True)
class Collector:
    """What samples and rewards completions."""

    config: TrainConfig
    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    rewarding: Rewarding
    stream: PromptStream
    conversations: Conversations | None = None
    """Of a run with tools or an environment."""
    ranks: Ranks = ALONE

    def collect(self, number: int, clock: Clock) -> tuple[Rollout, dict[str, float]]:
        """Phases 1 to 3 of step `number`; again for the groups without spread, at most train.max_refills times: the
        groups that then have none stay. Each rank samples and rewards its part of the prompts; then all have all.

        Returns the rollout, and the share of all groups that had spread with the number of those replaced.
        """
        config = self.config.train
        spread: list[Rollout] = []  # one group each
        dull: list[Rollout] = []
        for _ in range(1 + config.max_refills):
            missing = config.prompts_per_step - len(spread)
            if not missing:
                break
            with clock("sample_prompts"):
                problems = self.sample_prompts(missing)
            own, first = self.ranks.mine(problems), len(spread) + len(dull) + self.ranks.rank
            with clock("roll_out"):
                samples = self.roll_out(own, number, first_group=first, stride=self.ranks.world)
            with clock("reward"):
                rewards = self.reward(own, samples, number)
            samples, rewards = self.of_all(problems, samples, rewards)
            self.stream.observe(problems, self.totals(rewards))
            for group, differs in zip(_by_group(problems, samples, rewards), self.spread(rewards), strict=True):
                (spread if differs else dull).append(group)
        seen = len(spread) + len(dull)
        chosen = [*spread, *dull[: config.prompts_per_step - len(spread)]]
        metrics = {
            "groups_with_spread": len(spread) / seen,
            "groups_replaced": max(seen - config.prompts_per_step, 0),
        }
        return _joined(sorted(chosen, key=lambda group: group.samples[0].group)), metrics

    def close(self) -> None:
        """Stops what rewards and conversations have started."""
        if self.conversations:
            self.conversations.close()
        self.rewarding.close()

    @property
    def prompts(self) -> Prompts:
        """How a problem becomes tokens."""
        return prompts_for(self.config, self.tokenizer, self.engine.max_length(), self.conversations)

    # ---- 1
    def sample_prompts(self, count: int) -> list[Problem]:
        return self.stream.take(count)

    # ---- 2
    def roll_out(self, problems: Sequence[Problem], number: int, first_group: int = 0, stride: int = 1) -> list[Sample]:
        """num_generations completions of each problem, each with a seed of its own, group after group: seeds come from
        the groups' numbers within the step, first_group, first_group + stride, ... A group that is complete goes to the
        async reward functions at once."""
        config, talks = self.config.rollout, self.conversations
        request = config.request()
        as_tokens = self.prompts
        state, size = self._trainer_state(number), config.num_generations
        members = [(group, member) for group in range(len(problems)) for member in range(size)]
        numbers = [first_group + stride * group for group in range(len(problems))]
        samples: list[Sample | None] = [None] * len(members)
        seed = config.seed(self.config.train.seed)
        episodes: list[Episode] = []
        if talks:  # a group's environments have one seed: its episodes begin alike
            seeds = [seed_for(seed, number, numbers[group], -1) for group, _ in members]
            episodes = talks.begin([problems[group] for group, _ in members], seeds)
            problems = [group_prompt(p, episodes[g * size : (g + 1) * size]) for g, p in enumerate(problems)]
        prompts = [as_tokens.encode(problem) for problem in problems]

        def finished(i: int, completion: Completion) -> None:
            group = members[i][0]
            text = decode(self.tokenizer, [completion], request.skip_special_tokens)[0]
            samples[i] = sample = Sample(numbers[group], prompts[group], completion, text)
            if talks:
                talks.end(episodes[i], completion)
                sample.episode = episodes[i]
            mates = [sample for sample in samples[group * size : (group + 1) * size] if sample]
            if len(mates) == size:
                self.rewarding.begin(problems[group], mates, state)

        if not members:  # fewer groups are missing than there are ranks
            return []
        with talks.closing_on_error(episodes) if talks else nullcontext():
            self.engine.generate(
                [prompts[group] for group, _ in members],
                request,
                [seed_for(seed, number, numbers[group], member) for group, member in members],
                finished,
                talks.turns(episodes) if talks else None,
            )
        return [sample for sample in samples if sample]

    # ---- 3
    def reward(self, problems: Sequence[Problem], samples: Sequence[Sample], number: int) -> Tensor:
        """[F, P, G] float64: every function's values; the columns that it logs go into the samples."""
        size = self.config.rollout.num_generations
        if not problems:
            return torch.empty(len(self.rewarding.rewards), 0, size, dtype=torch.float64)
        asked = [problem for problem in problems for _ in range(size)]
        try:
            values = self.rewarding.finish(asked, samples, self._trainer_state(number))  # [F, P G]
        finally:
            self.release(samples)
        return values.view(len(values), len(problems), size)

    def of_all(
        self, problems: Sequence[Problem], samples: list[Sample], rewards: Tensor
    ) -> tuple[list[Sample], Tensor]:
        """The samples and the rewards [F, P, G] of P problems, from each rank's part of them."""
        if self.ranks.world == 1:
            return samples, rewards
        asked = [problem.question for problem in problems]
        parts = self.ranks.gather(
            (asked, [sample.shed() for sample in samples], rewards, self.rewarding.drain()), "the rollout"
        )
        if odd := [rank for rank, (questions, *_) in enumerate(parts) if questions != parts[0][0]]:
            raise TrainingError(
                f"rank {odd[0]} drew other prompts than rank 0: a task.sampler or a data set of yours must give every "
                "rank the same, from its seed and what it observes"
            )
        size = rewards.shape[2]
        groups = merged([[own[i : i + size] for i in range(0, len(own), size)] for _, own, _, _ in parts])
        for *_, logged in parts:
            self.rewarding.add(logged)
        columns = merged([list(own.unbind(1)) for _, _, own, _ in parts])
        return [sample for group in groups for sample in group], torch.stack(columns, 1)

    def release(self, samples: Sequence[Sample]) -> None:
        """Closes the environments of the samples."""
        if self.conversations:
            self.conversations.close_episodes([sample.episode for sample in samples if sample.episode])

    def reward_metrics(self, rollout: Rollout) -> dict[str, float | None]:
        """Metrics of each function and of their weighted sum, and the values that the functions have logged."""
        named = reward_metrics(self.rewarding.rewards, rollout.rewards, self.totals(rollout.rewards))
        return {**named, **self.rewarding.metrics()}

    def totals(self, rewards: Tensor) -> Tensor:
        """[P, G]: the weighted sum of the rewards [F, P, G]."""
        return weighted_sum(rewards, self.rewarding.weights)

    def spread(self, rewards: Tensor) -> list[bool]:
        """P: whether a group teaches something."""
        return groups_with_spread(rewards, self.rewarding.weights, self.config.train.aggregation).tolist()

    def _trainer_state(self, number: int) -> TrainerState:
        """What reward functions know of the run, in TRL's form: global_step counts the steps done."""
        from transformers import TrainerState

        return TrainerState(
            epoch=self.stream.epoch, global_step=max(number - 1, 0), max_steps=self.config.train.steps
        )  # fmt: skip


def _by_group(problems: Sequence[Problem], samples: Sequence[Sample], rewards: Tensor) -> list[Rollout]:
    size = rewards.shape[2]
    return [
        Rollout.of([problem], samples[i * size : (i + 1) * size], rewards[:, i : i + 1])
        for i, problem in enumerate(problems)
    ]


def _joined(groups: Sequence[Rollout]) -> Rollout:
    """One rollout of these groups, renumbered."""
    for i, group in enumerate(groups):
        for sample in group.samples:
            sample.group = i
    return Rollout.of(
        [problem for group in groups for problem in group.problems],
        [sample for group in groups for sample in group.samples],
        torch.cat([group.rewards for group in groups], dim=1),
    )
