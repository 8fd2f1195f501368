"""Would this run learn? One update on a few prompts, looked at from outside, and everything put back.

Each check has an oracle that the step itself does not use: the engine's logprobs for the trainer's, the rewards for the
advantages, the plain-torch estimators for the KL term. The update is the run's own, made larger along its direction
until the logprobs move by VISIBLE: rounding then hides neither a change nor the want of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from longgrpo.errors import PublishError, UserError
from longgrpo.loss.reference import kl_estimate
from longgrpo.loss.types import loss_type
from longgrpo.model.load import end_token_ids, resolve_model
from longgrpo.tasks.data import Problem
from longgrpo.tasks.rewards import Rewarding
from longgrpo.tasks.sample import Sample
from longgrpo.train import loop
from longgrpo.train.generators import random_states, set_random_states
from longgrpo.train.policy import Policy, reward_values, scored, spread_of

ROUNDS = 4  # rollouts until a group has spread
GROUPS = 4  # of those with spread, that are trained on
TOKENS = 64  # of a completion sampled after the update
VISIBLE = 0.05  # nats a token


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    seen: str
    remedy: str = ""
    """What it means where the check failed, and what to do."""

    def __str__(self) -> str:
        return f"ok    {self.name}: {self.seen}" if self.passed else f"FAIL  {self.name}: {self.seen}; {self.remedy}"


@dataclass
class SelfTest:
    checks: list[Check] = field(default_factory=list)
    groups: list[bool] = field(default_factory=list)
    """Of the groups rolled out: whether their rewards differ."""

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def groups_with_spread(self) -> float:
        return sum(self.groups) / max(len(self.groups), 1)


def selftest(policy: Policy, prompts: int) -> SelfTest:
    """Runs the phases of a step on `prompts` prompts, more where no group has spread. Weights, optimizer, stream and
    random generators are afterwards what they were, bit for bit; the optimizer must not have stepped before."""
    result = SelfTest()
    with _put_back(policy) as weights:
        result.checks += _checks(_trial(policy), weights, prompts, result.groups)
    return result


def _trial(policy: Policy) -> Policy:
    """The policy with the policy term alone in its loss, and with a reference that stays."""
    config = policy.config
    loss, train = replace(config.loss, entropy_coef=0.0), replace(config.train, reference_sync_steps=0)
    return replace(policy, config=replace(config, loss=loss, train=train))


@contextmanager
def _put_back(policy: Policy) -> Iterator[dict[str, Tensor]]:
    """Yields the weights as they are, in host memory."""
    stream, generators = policy.stream.state, random_states()
    weights = {name: p.detach().to("cpu", copy=True) for name, p in policy.parameters.items()}
    try:
        yield weights
    finally:
        _set_weights(policy, weights)
        policy.engine.weights_changed()
        policy.optimizer.state.clear()
        policy.optimizer.zero_grad(set_to_none=True)
        policy.rewarding.metrics()  # of no step
        policy.stream.state = stream
        set_random_states(generators)


@torch.no_grad()
def _set_weights(policy: Policy, weights: dict[str, Tensor], scale: float = 0.0) -> None:
    """weights + scale * (the parameters as they are - weights), in the trainer alone."""
    for name, parameter in policy.parameters.items():
        origin = weights[name].to(parameter.device)
        parameter.copy_(torch.lerp(origin, parameter, scale) if scale else origin)
    policy.masters.publish()


def _checks(policy: Policy, weights: dict[str, Tensor], prompts: int, groups: list[bool]) -> Iterator[Check]:
    """Ends at the first check without which those after it mean nothing."""
    problems: list[Problem] = []
    samples: list[Sample] = []
    try:
        for _ in range(ROUNDS):
            if any(groups):
                break
            asked = loop.sample_prompts(policy, prompts)
            answered = loop.roll_out(policy, asked, 0, first_group=len(problems))
            problems, samples = problems + asked, samples + answered
            loop.reward(policy, asked, answered, 0)
            groups += spread_of(policy, answered).tolist()
    except UserError as error:
        yield Check("rewards", False, str(error), "correct the function")
        return
    finally:
        if samples:
            yield _template_ends(policy, problems[0], samples)
            yield _seeds_differ(samples)
    yield _rewards_have_spread(groups)
    if not any(groups):
        return
    chosen = [group for group, differs in enumerate(groups) if differs][:GROUPS]
    yield from _update([problems[i] for i in chosen], [s for s in samples if s.group in chosen], policy, weights)


def _update(
    problems: list[Problem], samples: list[Sample], policy: Policy, weights: dict[str, Tensor]
) -> Iterator[Check]:
    old = _logprobs(policy, policy.model, samples)
    yield _agree(policy, samples, old)
    active = loop.advantage(policy, samples)
    yield _advantages_follow_rewards(policy, samples)
    yield (trains := _something_trains(policy, active))
    if not trains.passed:
        return
    loop.score(policy, active)
    loop.loss_and_backward(policy, samples, active)
    yield (gradient := _gradient(policy))
    if not gradient.passed:
        return
    touched = [name for name, p in policy.parameters.items() if p.grad is not None and p.grad.any()]
    loop.optimizer_step(policy, max(policy.config.train.warmup_steps, 1), active)
    yield (moved := _weights_move(policy, weights, touched))
    if not moved.passed:
        return
    new = _make_visible(policy, weights, samples, old)
    yield _update_follows_advantages(policy, samples, old, new)
    yield _engine_follows(policy, problems, weights, samples[0].group)
    if policy.reference:
        yield (differs := _reference_differs(policy, samples, old, new))
        if differs.passed:
            yield _kl_falls(policy, samples)


# ---- before the update
def _template_ends(policy: Policy, problem: Problem, samples: Sequence[Sample]) -> Check:
    """A reply in the prompt's template is followed by a token at which the engine stops."""
    tokenizer, request = policy.tokenizer, policy.config.rollout.request()
    model = policy.config.model
    own = [] if request.ignore_eos else end_token_ids(resolve_model(model.path, model.quantization))
    ends = [*own, *request.stop_token_ids]
    stopped = sum(sample.completion.finish_reason == "stop" for sample in samples)
    names = tokenizer.convert_ids_to_tokens(ends)
    seen = f"{stopped} of {len(samples)} completions ended by themselves, at {names}"
    if isinstance(problem.prompt, str) or request.others.get("stop"):
        return Check(
            "end token",
            bool(ends or request.others.get("stop")),
            seen,
            "set eos_token_id in the model's generation_config.json",
        )
    reply = [*problem.prompt, {"role": "assistant", "content": "Zebra"}]
    text = tokenizer.apply_chat_template(reply, tokenize=False, **policy.config.task.chat_template_kwargs)
    after = str(text).rpartition("Zebra")[2]
    return Check(
        "end token",
        bool(set(tokenizer(after, add_special_tokens=False)["input_ids"]) & set(ends)),
        seen,
        f"the chat template writes {after!r} after a reply: none would learn to end; correct task.chat_template, or "
        "eos_token_id in the model's generation_config.json",
    )


def _seeds_differ(samples: Sequence[Sample]) -> Check:
    groups: dict[int, set[tuple[int, ...]]] = {}
    for sample in samples:
        groups.setdefault(sample.group, set()).add(tuple(sample.completion.token_ids))
    alike = sum(len(different) == 1 for different in groups.values())
    return Check(
        "seeds",
        alike < len(groups),
        f"in {alike} of {len(groups)} groups all completions are the same",
        "they were sampled with one seed, or rollout.temperature is too low",
    )


def _rewards_have_spread(groups: Sequence[bool]) -> Check:
    return Check(
        "spread",
        any(groups),
        f"rewards differ within {sum(groups)} of {len(groups)} groups",
        "there is nothing to learn where no completion earns more than its neighbours: take an easier task, more "
        "rollout.num_generations, a higher rollout.temperature or a graded reward, and look at what the rewards return",
    )


def _agree(policy: Policy, samples: Sequence[Sample], logps: Sequence[Tensor]) -> Check:
    gap, limit = _gap(samples, logps), policy.probe.tolerance
    return Check(
        "agreement",
        gap <= limit,
        f"engine and trainer differ by {gap:.2g} nats a token, rounding explains {limit:.2g}",
        "they score different tokens, at different temperatures, or with different weights",
    )


def _advantages_follow_rewards(policy: Policy, samples: Sequence[Sample]) -> Check:
    """In each group the advantages rise with the rewards above their mean."""
    values = reward_values(policy, samples)  # [F, P, G]
    above = values - values.nanmean(-1, keepdim=True)
    if policy.config.train.aggregation == "normalize_then_sum":
        above /= above.square().nanmean(-1, keepdim=True).sqrt() + 1e-4
    merit = (above * policy.rewarding.weights[:, None, None]).nansum(0)  # [P, G]
    advantages = torch.tensor([sample.advantage for sample in samples], dtype=merit.dtype).view_as(merit)
    following = int(((merit * advantages).sum(-1) > 0).sum())
    return Check(
        "advantages",
        following == len(merit),
        f"advantages follow the rewards in {following} of {len(merit)} groups",
        "elsewhere the worse completion would become the likelier one: a sign is wrong",
    )


def _something_trains(policy: Policy, active: Sequence[Sample]) -> Check:
    trained = sum(parameter.requires_grad for parameter in policy.model.parameters())
    return Check(
        "trainable",
        bool(trained and active),
        f"{trained} parameters, {len(active)} completions",
        "all completions are cut off and train.mask_truncated leaves them out: raise rollout.max_completion_length"
        if trained
        else "the adapter is frozen: no parameter requires a gradient",
    )


# ---- the update
def _gradient(policy: Policy) -> Check:
    norms = {name: p.grad.norm().item() for name, p in policy.parameters.items() if p.grad is not None}
    norm = math.hypot(*norms.values())
    odd = [name for name, value in norms.items() if not math.isfinite(value)]
    return Check(
        "gradient",
        0 < norm < math.inf,
        f"its norm is {norm:.3g}",
        f"it is not finite in {len(odd)} of {len(norms)} parameters, first in {odd[0]}: set model.dtype: float32"
        if odd
        else "advantages are not 0: the loss does not reach the trained weights",
    )


def _weights_move(policy: Policy, weights: dict[str, Tensor], touched: Sequence[str]) -> Check:
    still = [name for name in touched if torch.equal(policy.parameters[name].cpu(), weights[name])]
    return Check(
        "weights",
        not still,
        f"{len(touched) - len(still)} of {len(touched)} parameters with a gradient moved",
        f"not {', '.join(still[:1])}: the optimizer does not hold it, or train.learning_rate is too low for its dtype",
    )


def _make_visible(
    policy: Policy, weights: dict[str, Tensor], samples: Sequence[Sample], old: Sequence[Tensor]
) -> list[Tensor]:
    """Lengthens the update until it shows; returns the logprobs after it."""
    new = _logprobs(policy, policy.model, samples)
    for _ in range(4):
        change = _mean_change(old, new)
        if not 0 < change < VISIBLE:
            break
        _set_weights(policy, weights, scale=min(1.2 * VISIBLE / change, 1000.0))
        new = _logprobs(policy, policy.model, samples)
    return new


# ---- after it
def _update_follows_advantages(
    policy: Policy, samples: Sequence[Sample], old: Sequence[Tensor], new: Sequence[Tensor]
) -> Check:
    """sum A (logp_new - logp_old) > 0, each token weighted as in the loss."""
    mean_of_sequence = loss_type(policy.config.loss.loss_type).mean == "sequence"
    gain = 0.0
    for sample, before, after in zip(samples, old, new, strict=True):
        change = after - before if sample.policy_weight is None else (after - before) * sample.policy_weight
        gain += sample.advantage * (change.mean() if mean_of_sequence else change.sum()).item()
    return Check(
        "update",
        gain > 0,
        f"sum A (logp_new - logp_old) = {gain:.3g}, logprobs moved by {_mean_change(old, new):.2g} nats a token",
        "it makes good completions less likely: a sign in the loss is wrong, or train.learning_rate is too high",
    )


def _engine_follows(policy: Policy, problems: list[Problem], weights: dict[str, Tensor], first_group: int) -> Check:
    """The engine samples from the weights after the update, and not from those before it."""
    try:
        loop.publish(policy, 0)
        probe = ""
    except PublishError as error:
        probe = f"; {error}"
    rollout = policy.config.rollout
    rollout = replace(rollout, max_completion_length=min(rollout.max_completion_length, TOKENS))
    asked = replace(policy, config=replace(policy.config, rollout=rollout), rewarding=Rewarding([]))
    samples = loop.roll_out(asked, problems, 0, first_group=first_group)
    new = _gap(samples, _logprobs(policy, policy.model, samples))
    updated = {name: p.detach().clone() for name, p in policy.parameters.items()}
    _set_weights(policy, weights)
    old = _gap(samples, _logprobs(policy, policy.model, samples))
    _set_weights(policy, updated)
    return Check(
        "engine",
        new < old and new <= policy.probe.tolerance and not probe,
        f"it is {new:.2g} nats a token off the weights after the update, {old:.2g} off those before it{probe}",
        "the update never reached it"
        if old < new / 4
        else "it runs neither: a prefix cache outlived the update, or an adapter is merged twice or at another scale",
    )


def _reference_differs(
    policy: Policy, samples: Sequence[Sample], old: Sequence[Tensor], new: Sequence[Tensor]
) -> Check:
    reference = _reference_logprobs(policy, samples)
    moved, apart = _mean_change(old, reference), _mean_change(new, reference)
    return Check(
        "reference",
        apart > moved,
        f"the policy is {apart:.2g} nats a token from its reference, which moved by {moved:.2g}",
        "the reference follows the policy, and the KL term holds nothing",
    )


def _kl_falls(policy: Policy, samples: Sequence[Sample]) -> Check:
    """A step down the gradient of the KL term alone, halved while it is too long, lowers the estimate."""
    loss = replace(policy.config.loss, beta=1.0)
    policy = replace(policy, config=replace(policy.config, loss=loss))
    samples = [replace(s, advantage=0.0, old_logp=None, ref_logp=None, policy_weight=None) for s in samples]
    reference = torch.cat(_reference_logprobs(policy, samples))
    estimator = "k3" if loss.exact_kl else loss.kl

    def value() -> float:
        return kl_estimate(estimator, torch.cat(_logprobs(policy, policy.model, samples)), reference).mean().item()

    loop.score(policy, samples)
    loop.loss_and_backward(policy, samples, samples)
    start = {name: p.detach().clone() for name, p in policy.parameters.items()}
    gradient = {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}
    before, square = value(), sum(g.square().sum().item() for g in gradient.values())
    length = 0.5 * abs(before) / max(square, 1e-30)
    for _ in range(6):
        _set_weights(
            policy, {name: p - length * gradient[name] if name in gradient else p for name, p in start.items()}
        )
        after = value()
        if after < before:
            break
        length /= 4
    seen = f"a step on the KL term alone takes it from {before:.3g} to {after:.3g}"
    return Check("kl", after < before, seen, "its sign is wrong")


# ---- used by several
@torch.no_grad()
def _logprobs(policy: Policy, model: Any, samples: Sequence[Sample]) -> list[Tensor]:
    """The trainer's, of each sample f32 [T]."""
    return [logp for _, logp, _ in scored(policy, model, samples)]


def _reference_logprobs(policy: Policy, samples: Sequence[Sample]) -> list[Tensor]:
    assert policy.reference
    with policy.reference() as model:
        return _logprobs(policy, model, samples)


def _gap(samples: Sequence[Sample], logps: Sequence[Tensor]) -> float:
    engine = [torch.tensor(sample.completion.logprobs, device=logps[0].device) for sample in samples]
    return _mean_change(engine, logps)


def _mean_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    return (torch.cat(list(after)) - torch.cat(list(before))).abs().mean().item()
