"""One step of GRPO, read from top to bottom: `step` calls the eight phases, which follow it in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from longgrpo import grpo_loss, linear_grpo_loss
from longgrpo.errors import PublishError
from longgrpo.loss.config import GRPOLossConfig, loss_normalizer
from longgrpo.loss.grpo import GRPOLoss
from longgrpo.model.head import head_of
from longgrpo.rollout.probe import EngineMismatch
from longgrpo.rollout.protocol import Completion, seed_for
from longgrpo.tasks.data import Problem, check_length, decode, encode
from longgrpo.tasks.sample import Sample
from longgrpo.train.advantages import advantages
from longgrpo.train.loss_scale import loss_scales, unscale
from longgrpo.train.metrics import (
    Agreement,
    Clock,
    Meter,
    known,
    length_metrics,
    offload_counts,
    offload_metrics,
    over_updates,
    peak_memory,
    reference_metrics,
    reward_metrics,
    speed_metrics,
)
from longgrpo.train.nonfinite import leave_out
from longgrpo.train.packing import MicroBatch
from longgrpo.train.policy import (
    Policy,
    hidden_states,
    in_loss,
    logprob,
    micro_batches_of,
    reward_totals,
    reward_values,
    scored,
    spread_of,
    trainer_state,
)
from longgrpo.train.token_weights import entropy_threshold, policy_weights


@dataclass
class StepResult:
    metrics: dict[str, Any]
    problems: list[Problem]
    samples: list[Sample]


def step(policy: Policy, number: int) -> StepResult:
    """Step `number`, from 1: the weights are updated in place and the engine sees them."""
    clock = Clock()
    offloaded = offload_counts(policy.offload)
    with clock("step"):
        problems, samples, refills = collect(policy, number, clock)
        with clock("advantage"):
            active = advantage(policy, samples)
        with clock("score"):
            score(policy, active)
        losses = []
        for part, trained in _updates(policy, samples, active):
            with clock("loss_and_backward"):
                losses.append(loss_and_backward(policy, part, trained))
            with clock("optimizer_step"):
                losses[-1] |= optimizer_step(policy, number, trained) if trained else {"grad_norm": 0.0}
        with clock("publish"):
            published = publish(policy, number)
    values = reward_values(policy, samples)
    metrics: dict[str, Any] = {
        "step": number,
        "epoch": policy.stream.epoch,
        **reward_metrics(policy.rewarding.rewards, values, reward_totals(policy, values)),
        **policy.rewarding.metrics(),
        **refills,
        **over_updates(losses),
        **published,
        **length_metrics(samples),
        **reference_metrics(active),
        **speed_metrics(samples, active, clock.seconds),
        **{f"seconds/{name}": value for name, value in clock.seconds.items()},
        **offload_metrics(policy.offload, offloaded),
        **peak_memory(),
    }
    return StepResult(known(metrics), problems, samples)


def collect(policy: Policy, number: int, clock: Clock) -> tuple[list[Problem], list[Sample], dict[str, float]]:
    """Phases 1 to 3; again for the groups without spread, at most train.max_refills times: what then has none stays.

    Returns problems, their samples, group after group, and the share of all groups that had spread."""
    config = policy.config.train
    good: list[tuple[Problem, list[Sample]]] = []
    dull: list[tuple[Problem, list[Sample]]] = []
    for _ in range(1 + config.max_refills):
        missing = config.prompts_per_step - len(good)
        if not missing:
            break
        with clock("sample_prompts"):
            problems = sample_prompts(policy, missing)
        with clock("roll_out"):
            samples = roll_out(policy, problems, number, first_group=len(good) + len(dull))
        with clock("reward"):
            reward(policy, problems, samples, number)
        policy.stream.observe(problems, reward_totals(policy, reward_values(policy, samples)))
        spread = spread_of(policy, samples)
        for problem, group, differs in zip(problems, _by_group(samples), spread.tolist(), strict=True):
            (good if differs else dull).append((problem, group))
    share = len(good) / (len(good) + len(dull))
    replaced = max(len(good) + len(dull) - config.prompts_per_step, 0)
    chosen = sorted(good + dull[: config.prompts_per_step - len(good)], key=lambda group: group[1][0].group)
    for i, (_, group) in enumerate(chosen):
        for sample in group:
            sample.group = i
    problems, groups = [problem for problem, _ in chosen], [group for _, group in chosen]
    return problems, list(chain(*groups)), {"groups_with_spread": share, "groups_replaced": replaced}


# ---- 1
def sample_prompts(policy: Policy, count: int) -> list[Problem]:
    return policy.stream.take(count)


# ---- 2
def roll_out(policy: Policy, problems: Sequence[Problem], number: int, first_group: int = 0) -> list[Sample]:
    """num_generations completions of each problem, each with a seed of its own, group after group. A group that is
    complete goes to the async reward functions at once."""
    config, template = policy.config.rollout, policy.config.task.chat_template_kwargs
    prompts = [encode(policy.tokenizer, problem.prompt, template) for problem in problems]
    for ids, problem in zip(prompts, problems, strict=True):
        check_length(ids, problem, policy.engine.max_length())
    state, size = trainer_state(policy, number), config.num_generations
    members = [(group, member) for group in range(len(problems)) for member in range(size)]
    samples: list[Sample | None] = [None] * len(members)
    seed = config.seed(policy.config.train.seed)

    def finished(i: int, completion: Completion) -> None:
        group = members[i][0]
        text = decode(policy.tokenizer, [completion])[0]
        samples[i] = Sample(first_group + group, prompts[group], completion, text)
        mates = [sample for sample in samples[group * size : (group + 1) * size] if sample]
        if len(mates) == size:
            policy.rewarding.begin(problems[group], mates, state)

    policy.engine.generate(
        [prompts[group] for group, _ in members],
        config.request(),
        [seed_for(seed, number, first_group + group, member) for group, member in members],
        finished,
    )
    return [sample for sample in samples if sample]


# ---- 3
def reward(policy: Policy, problems: Sequence[Problem], samples: Sequence[Sample], number: int) -> None:
    """Every function's values, and the columns that it logs, go into the samples."""
    asked = [problem for problem in problems for _ in range(len(samples) // len(problems))]
    policy.rewarding.finish(asked, samples, trainer_state(policy, number))


# ---- 4
def advantage(policy: Policy, samples: Sequence[Sample]) -> list[Sample]:
    """Sets each sample's advantage; returns the samples that have a gradient."""
    config, loss = policy.config.train, policy.config.loss
    values = reward_values(policy, samples)
    every = advantages(values, policy.rewarding.weights, config.scale_rewards, config.aggregation)  # [P, G]
    for sample, value in zip(samples, every.flatten().tolist(), strict=True):
        sample.advantage = value
    everything = loss.beta != 0 or loss.entropy_coef != 0  # these terms reach samples of advantage 0 as well
    return [sample for sample in in_loss(policy, samples) if everything or sample.advantage != 0]


# ---- 5
@torch.no_grad()
def score(policy: Policy, active: Sequence[Sample]) -> None:
    """Sets the reference's logprobs, where the loss has a KL term, and the old policy's, where they are needed: a
    rollout that serves one update needs none, for the policy is its own old one and the ratio is 1."""
    config = policy.config
    if policy.reference and not config.loss.exact_kl:
        with policy.reference() as model:
            for sample, logp, _ in scored(policy, model, active):
                sample.ref_logp = logp
    high_entropy_only = config.train.top_entropy_quantile < 1
    if not active or not (config.train.updates > 1 or high_entropy_only or config.loss.exact_kl):
        return
    entropies = []
    for sample, logp, entropy in scored(policy, policy.model, active):
        sample.old_logp = logp
        entropies.append(entropy)
    if high_entropy_only:
        lowest = entropy_threshold(torch.cat(entropies), config.train.top_entropy_quantile)
        for sample, entropy in zip(active, entropies, strict=True):
            sample.policy_weight = (entropy >= lowest).float()


# ---- 6
def loss_and_backward(policy: Policy, samples: Sequence[Sample], active: Sequence[Sample]) -> dict[str, float]:
    """The gradient of an update's loss. samples: all of the update; active: those with a gradient.

    Where no sample has one, a micro-batch is still looked at without: every step compares engine and trainer.
    """
    for scale in loss_scales(policy.config.model.dtype):
        metrics = _accumulate(policy, samples, active, scale)
        if unscale(policy.parameters.values(), scale):
            break
    return metrics


def _accumulate(policy: Policy, samples: Sequence[Sample], active: Sequence[Sample], scale: float) -> dict[str, float]:
    """Adds up the gradient, times `scale`, micro-batch by micro-batch, under one normalizer for the whole update."""
    config = policy.config
    normalizer = step_normalizer(
        config.loss, len(samples), in_loss(policy, samples), config.rollout.max_completion_length
    )
    meter, agreement = Meter(), Agreement(config.rollout)
    for batch in micro_batches_of(policy, active) or micro_batches_of(policy, samples)[:1]:
        with torch.set_grad_enabled(bool(active)):
            logp, result = (
                _exact_kl_loss(policy, batch, normalizer)
                if config.loss.exact_kl and active
                else _loss(policy, batch, normalizer)
            )
        if active:
            (result.loss * scale).backward()
        agreement.add(batch, logp)
        meter.add(result.loss, result.metrics, len(batch.target))
    return meter.metrics() | agreement.metrics()


def _loss(policy: Policy, batch: MicroBatch, normalizer: float) -> tuple[Tensor, GRPOLoss]:
    """The logprobs [M] of the policy that sampled, and the loss."""
    logp, entropy = logprob(policy, policy.model, batch)  # [M], [M]
    old_logp = batch.per_token("old_logp")
    result = grpo_loss(
        logp,
        batch.advantages,
        cu_seqlens=batch.cu_seqlens,
        old_logp=old_logp,
        ref_logp=batch.per_token("ref_logp"),
        importance=policy_weights(policy.config, batch, logp.detach()),
        entropy=entropy,
        normalizer=normalizer,
        config=policy.config.loss,
    )
    return logp if old_logp is None else old_logp, result


def _exact_kl_loss(policy: Policy, batch: MicroBatch, normalizer: float) -> tuple[Tensor, GRPOLoss]:
    """As _loss; the KL term, a sum over the vocabulary, needs the reference's hidden states and head."""
    assert policy.reference
    with torch.no_grad(), policy.reference() as model:
        ref_hidden, ref_weight = hidden_states(model, batch), head_of(model).weight.data
    old_logp = batch.per_token("old_logp")
    assert old_logp is not None
    head = head_of(policy.model)
    result = linear_grpo_loss(
        hidden_states(policy.model, batch),
        head.weight,
        batch.target,
        batch.advantages,
        cu_seqlens=batch.cu_seqlens,
        old_logp=old_logp,
        importance=policy_weights(policy.config, batch, old_logp),
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        normalizer=normalizer,
        config=policy.config.loss,
        temperature=policy.config.rollout.temperature,
        **head.options,
    )
    return old_logp, result


def step_normalizer(
    config: GRPOLossConfig, sequences: int, counted: Sequence[Sample], max_completion_length: int
) -> float:
    """What the whole update divides by, so that the split into micro-batches changes nothing: sequences, their longest
    allowed length together, or the tokens of the loss (see GRPOLossConfig.loss_type)."""
    return float(loss_normalizer(config, sequences, sum(map(len, counted)), max_completion_length))


# ---- 7
def optimizer_step(policy: Policy, number: int, samples: Sequence[Sample]) -> dict[str, float]:
    """Clips the gradient, made from `samples`, and steps AdamW, unless it is not finite (see leave_out)."""
    config = policy.config.train
    norm = get_total_norm([p.grad for p in policy.parameters.values() if p.grad is not None])
    if not norm.isfinite():
        return leave_out(policy, number, samples)
    policy.left_out = 0
    clip_grads_with_norm_(policy.parameters.values(), config.max_grad_norm, norm)
    rate = config.learning_rate_at(number)
    for group in policy.optimizer.param_groups:
        group["lr"] = rate
    policy.optimizer.step()
    policy.masters.publish()
    policy.optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm.item(), "learning_rate": rate}


# ---- 8
def publish(policy: Policy, number: int) -> dict[str, float]:
    """Nothing is copied where the engine shares the weights; what it has cached of the old ones is dropped. Then engine
    and trainer answer a fixed prompt: PublishError where they do not run the same weights. The reference follows, where
    it is to."""
    copied = policy.engine.weights_changed()
    try:
        difference = policy.probe(policy.model)
    except EngineMismatch as error:
        raise PublishError(f"after step {number}, {error}. Nothing was saved of this step") from error
    every = policy.config.train.reference_sync_steps
    if policy.reference and every and number % every == 0:
        policy.reference.sync(policy.config.train.reference_mixup)
    return {"published_bytes": copied, "probe_logprob_diff": difference}


# ---- used by step
def _by_group(samples: Sequence[Sample]) -> list[list[Sample]]:
    return [list(group) for _, group in groupby(samples, key=lambda sample: sample.group)]


def _updates(
    policy: Policy, samples: Sequence[Sample], active: Sequence[Sample]
) -> Iterator[tuple[list[Sample], list[Sample]]]:
    """The samples of each optimizer step, and those of them with a gradient."""
    config = policy.config.train
    for _ in range(config.passes):
        for part in range(config.minibatches):
            of_part = [[s for s in some if s.group % config.minibatches == part] for some in (samples, active)]
            yield of_part[0], of_part[1]
