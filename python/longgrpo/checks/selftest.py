"""Would this run learn? One update on a few prompts, looked at from outside, and everything put back.

Each check has an oracle that the step itself does not use: the engine's logprobs for the trainer's, the rewards for the
advantages, the plain-torch estimators for the KL term. The update is the run's own, made larger along its direction
until the logprobs move by oracles.VISIBLE: rounding then neither hides a change nor looks like one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from longgrpo.checks import oracles
from longgrpo.checks.oracles import Check
from longgrpo.config.run import TrainConfig
from longgrpo.errors import UserError
from longgrpo.tasks.data import Problem
from longgrpo.tasks.sample import Rollout, Sample
from longgrpo.train.generators import random_states_kept
from longgrpo.train.loop import Loop, advantage, loss_and_backward, optimizer_step, score
from longgrpo.train.update import batches_of

ROUNDS = 4  # rollouts until a group has spread
ABOVE_NOISE = 3  # times the engine's own noise: so far the update is lengthened
GROUPS = 4  # of those with spread, that are trained on


@dataclass
class SelfTest:
    checks: list[Check] = field(default_factory=list)
    groups: list[bool] = field(default_factory=list)
    """For each group rolled out, whether its rewards differ."""

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def groups_with_spread(self) -> float:
        return sum(self.groups) / max(len(self.groups), 1)


def selftest(loop: Loop, prompts: int) -> SelfTest:
    """Runs the phases of a step on `prompts` prompts, more if no group has spread. Afterwards weights,
    optimizer, stream and random generators are restored, bit for bit. The optimizer must not have stepped before.

    All ranks test the update together, on the rollout of rank 0, and each its own engine after it."""
    result = SelfTest()
    with _put_back(loop) as weights:
        checks = _checks(oracles.with_config(loop, _trial(loop.config)), weights, prompts, result.groups)
        result.checks += [oracles.alike(loop, check) for check in checks]
    return result


def _trial(config: TrainConfig) -> TrainConfig:
    """One update, with only the policy term in its loss, and a fixed reference."""
    loss = replace(config.loss, entropy_coef=0.0, entropy_target=None)
    train = replace(
        config.train,
        advantage_level="episode",
        reference_sync_steps=0,
        num_iterations=1,
        minibatches=1,
        off_policy_threshold=None,
    )
    return replace(config, loss=loss, train=train)


@contextmanager
def _put_back(loop: Loop) -> Iterator[dict[str, Tensor]]:
    """Yields the weights as they are, in host memory."""
    collector, state = loop.collector, loop.state
    stream = collector.stream.state
    weights = {name: p.detach().to("cpu", copy=True) for name, p in state.parameters.items()}
    with random_states_kept():
        try:
            yield weights
        finally:
            oracles.set_weights(state, weights)
            collector.engine.weights_changed()
            state.optimizer.state.clear()
            state.optimizer.zero_grad(set_to_none=True)
            collector.rewarding.metrics()  # of no step
            collector.stream.state = stream


def _checks(loop: Loop, weights: dict[str, Tensor], prompts: int, groups: list[bool]) -> Iterator[Check]:
    """Ends at the first check without which those after it mean nothing."""
    collector = loop.collector
    problems: list[Problem] = []
    samples: list[Sample] = []
    rewards: list[Tensor] = []  # [F, P, G] a round
    wrong = ""
    while not (any(groups) or wrong or len(rewards) == ROUNDS):
        asked, first = collector.sample_prompts(prompts), len(problems)
        answered, values, wrong = loop.ranks.of_first(functools.partial(_answers, loop, asked, first), "a rollout")
        problems, samples = problems + asked, samples + answered
        rewards.append(values)
        groups += collector.spread(values)
    if wrong:
        yield Check("rewards", False, wrong, "correct the function")
    if samples:
        yield oracles.template_ends(loop, problems[0], samples)
        yield oracles.seeds_differ(samples)
        if collector.conversations:
            yield oracles.calls_are_answered(samples)
    if wrong:
        return
    yield oracles.rewards_have_spread(groups)
    if not any(groups):
        return
    chosen = [group for group, differs in enumerate(groups) if differs][:GROUPS]
    rollout = Rollout.of(
        [problems[i] for i in chosen], [s for s in samples if s.group in chosen], torch.cat(rewards, 1)[:, chosen]
    )
    yield from _update(loop, rollout, weights)


def _answers(loop: Loop, problems: Sequence[Problem], first: int) -> tuple[list[Sample], Tensor, str]:
    """Completions of the problems, their rewards [F, P, G], and what is wrong with the functions, if something is."""
    collector, samples = loop.collector, []
    try:
        samples = collector.roll_out(problems, 0, first_group=first)
        rewards = collector.reward(problems, samples, 0)
    except UserError as error:
        nothing = torch.empty(len(collector.rewarding.rewards), 0, loop.config.rollout.num_generations)
        return [sample.shed() for sample in samples], nothing, str(error)
    return [sample.shed() for sample in samples], rewards, ""


def _update(loop: Loop, rollout: Rollout, weights: dict[str, Tensor]) -> Iterator[Check]:
    config, state = loop.config, loop.state
    rollout.advantages = advantage(config, rollout, loop.collector.rewarding.weights)
    batches = batches_of(config, rollout, range(len(rollout.samples)), state.model.device)
    old = oracles.logprobs(loop, state.model, batches)
    yield oracles.agree(loop, batches, old)
    if any(len(sample.completion.turns) > 1 for sample in rollout.samples):
        yield oracles.later_turns_agree(loop, rollout, batches, old)
    noise = oracles.engine_noise(batches, old)
    yield oracles.advantages_follow_rewards(loop, rollout)
    update, whole = oracles.planned(loop, rollout)
    yield (trains := oracles.something_trains(state, rollout, whole))
    if not trains.passed:
        return
    score(config, state, [update])
    if whole is not update:
        score(config, state, [whole])
    old = oracles.logprobs(loop, state.model, whole.batches)
    norm, _ = loss_and_backward(loop.loss, state, update)
    yield (found := oracles.alike(loop, oracles.gradient(state)))
    if not found.passed:
        return
    touched = [name for name, gradient in state.gradients.items() if gradient.any()]
    optimizer_step(config, state, max(config.train.warmup_steps, 1), update, norm)
    yield (moved := oracles.alike(loop, oracles.weights_move(state, weights, touched)))
    if not moved.passed:
        return
    new = oracles.make_visible(loop, weights, whole.batches, old)
    yield oracles.update_follows_advantages(config, whole.batches, old, new)
    if noise > oracles.VISIBLE / ABOVE_NOISE:  # the engine is to be told apart from the one before the update
        new = oracles.make_visible(loop, weights, whole.batches, old, ABOVE_NOISE * noise)
    yield oracles.engine_follows(loop, rollout, weights)
    if state.reference:
        yield (differs := oracles.reference_differs(loop, whole.batches, old, new))
        if differs.passed:
            yield oracles.kl_falls(loop, rollout)
