"""One step of GRPO, read from top to bottom: `step` calls the eight phases, which follow it in their order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longgrpo import LogProb, grpo_loss, linear_logprob
from longgrpo.loss.config import GRPOLossConfig
from longgrpo.model.load import lm_head
from longgrpo.model.packed_attention import packed_hidden
from longgrpo.offload import OffloadEngine
from longgrpo.rollout.engine import RolloutEngine
from longgrpo.rollout.sampling import Sampling, seed_for
from longgrpo.train.advantages import group_advantages
from longgrpo.train.config import TrainConfig
from longgrpo.train.data import Problem, PromptStream, as_reply, check_length, columns_of, decode, encode
from longgrpo.train.errors import TrainingError
from longgrpo.train.metrics import (
    Agreement,
    Clock,
    Meter,
    length_metrics,
    offload_counts,
    offload_metrics,
    peak_memory,
    reward_metrics,
    speed_metrics,
)
from longgrpo.train.packing import MicroBatch, Sample, micro_batches
from longgrpo.train.rewards import Reward, weighted_sum

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Policy:
    """What a step works with and changes: the model in training, and the stream of problems."""

    config: TrainConfig
    engine: RolloutEngine
    model: Any  # transformers' model, wrapped by PEFT under LoRA; its base lies on the engine's weights
    reference: Any  # a frozen copy, for a KL term without LoRA; under LoRA the base without its adapter serves
    offload: OffloadEngine | None  # holds the layers' inputs between forward and backward
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    parameters: dict[str, Tensor]
    rewards: list[Reward]
    stream: PromptStream


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
        with clock("sample_prompts"):
            problems = sample_prompts(policy, policy.config.train.prompts_per_step)
        with clock("roll_out"):
            samples = roll_out(policy, problems, number)
        with clock("reward"):
            totals = reward(policy, problems, samples)
        with clock("advantage"):
            active = advantage(policy, samples, totals)
        with clock("score"):
            score(policy, active)
        with clock("loss_and_backward"):
            losses = loss_and_backward(policy, samples, active)
        with clock("optimiser_step"):
            updates = optimiser_step(policy, number) if active else {"grad_norm": 0.0}
        with clock("publish"):
            publish(policy)
    metrics = {
        "step": number,
        **reward_metrics(policy.rewards, samples, totals),
        **losses,
        **updates,
        **length_metrics(samples),
        **speed_metrics(samples, active, clock.seconds),
        **{f"seconds/{name}": value for name, value in clock.seconds.items()},
        **offload_metrics(policy.offload, offloaded),
        **peak_memory(),
    }
    return StepResult(metrics, problems, samples)


# ---- 1
def sample_prompts(policy: Policy, count: int) -> list[Problem]:
    return policy.stream.take(count)


# ---- 2
def roll_out(policy: Policy, problems: Sequence[Problem], number: int) -> list[Sample]:
    """num_generations completions of each problem, each with a seed of its own, group after group."""
    config = policy.config.rollout
    prompts = [encode(policy.tokenizer, problem.prompt) for problem in problems]
    for ids, problem in zip(prompts, problems, strict=True):
        check_length(ids, problem, policy.engine.max_length())
    members = [(group, member) for group in range(len(problems)) for member in range(config.num_generations)]
    completions = policy.engine.generate(
        [prompts[group] for group, _ in members],
        Sampling(max_tokens=config.max_completion_length, temperature=config.temperature),
        [seed_for(policy.config.train.seed, number, group, member) for group, member in members],
    )
    texts = decode(policy.tokenizer, completions)
    return [
        Sample(group, prompts[group], completion, text)
        for (group, _), completion, text in zip(members, completions, texts, strict=True)
    ]


# ---- 3
def reward(policy: Policy, problems: Sequence[Problem], samples: Sequence[Sample]) -> Tensor:
    """Every function's values go into the samples; returns their weighted sums, f64 [problems, num_generations]."""
    asked = [problems[sample.group] for sample in samples]
    prompts = [problem.prompt for problem in asked]
    replies = [as_reply(problem.prompt, sample.text) for problem, sample in zip(asked, samples, strict=True)]
    ids = [sample.completion.token_ids for sample in samples]
    values = {function.name: function(prompts, replies, ids, columns_of(asked)) for function in policy.rewards}
    for i, sample in enumerate(samples):
        sample.rewards = {name: value[i].item() for name, value in values.items()}
    return weighted_sum(policy.rewards, values).view(len(problems), -1)


# ---- 4
def advantage(policy: Policy, samples: Sequence[Sample], totals: Tensor) -> list[Sample]:
    """Sets each sample's advantage; returns the samples that have a gradient."""
    advantages = group_advantages(totals, policy.config.train.scale_rewards).flatten().tolist()
    for sample, value in zip(samples, advantages, strict=True):
        sample.advantage = value
    loss = policy.config.loss
    everything = loss.beta != 0 or loss.entropy_coef != 0  # these terms reach samples of advantage 0 as well
    return [sample for sample in samples if everything or sample.advantage != 0]


# ---- 5
@torch.no_grad()
def score(policy: Policy, active: Sequence[Sample]) -> None:
    """Sets the reference's logprobs, where the loss has a KL term.

    Old logprobs are not needed: a rollout serves one update, so that the policy is its own old one and the ratio is 1.
    """
    if policy.config.loss.beta == 0:
        return
    for batch in _micro_batches(policy, active):
        with _reference(policy) as model:
            logp = _logprob(policy, model, batch).logp  # [M]
        for sample, part in zip(batch.samples, logp.split([len(s) for s in batch.samples]), strict=True):
            sample.ref_logp = part


# ---- 6
def loss_and_backward(policy: Policy, samples: Sequence[Sample], active: Sequence[Sample]) -> dict[str, float]:
    """Accumulates the gradient of the step's loss, micro-batch by micro-batch, under one normaliser for the whole step.

    Where no sample has one, a micro-batch is still looked at without: every step compares engine and trainer.
    """
    config = policy.config
    normaliser = step_normaliser(config.loss, samples, config.rollout.max_completion_length)
    meter, agreement = Meter(), Agreement()
    for batch in _micro_batches(policy, active) or _micro_batches(policy, samples)[:1]:
        with torch.set_grad_enabled(bool(active)):
            logp, entropy = _logprob(policy, policy.model, batch)  # [M], [M]
        reference = [sample.ref_logp for sample in batch.samples if sample.ref_logp is not None]
        result = grpo_loss(
            logp,
            torch.tensor([sample.advantage for sample in batch.samples], device=logp.device),
            cu_seqlens=batch.cu_seqlens,
            ref_logp=torch.cat(reference) if reference else None,
            entropy=entropy,
            normaliser=normaliser,
            config=config.loss,
        )
        if active:
            result.loss.backward()
        agreement.add(batch, logp)
        meter.add(result.loss, result.metrics, len(batch.target))
    return meter.metrics() | agreement.metrics()


def step_normaliser(config: GRPOLossConfig, samples: Sequence[Sample], max_completion_length: int) -> float:
    """What the whole step divides by, so that the split into micro-batches changes nothing: sequences, their longest
    allowed length together, or tokens (see GRPOLossConfig.loss_type)."""
    if config.loss_type in ("grpo", "sapo", "luspo", "gmpo"):
        return float(len(samples))
    if config.loss_type == "dr_grpo":
        return float(len(samples) * (config.max_completion_length or max_completion_length))
    return float(sum(map(len, samples)))


# ---- 7
def optimiser_step(policy: Policy, number: int) -> dict[str, float]:
    """Clips the gradient and steps AdamW. Raises TrainingError, before a weight has changed, where it is not finite."""
    config = policy.config.train
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters.values(), config.max_grad_norm).item()
    if not math.isfinite(norm):
        raise TrainingError(
            f"step {number}: the gradient's norm is {norm}; the weights are as they were before this step. "
            "Lower train.learning_rate or set model.dtype: float32"
        )
    rate = config.learning_rate * min(1.0, number / max(config.warmup_steps, 1))
    for group in policy.optimizer.param_groups:
        group["lr"] = rate
    policy.optimizer.step()
    policy.optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm, "learning_rate": rate}


# ---- 8
def publish(policy: Policy) -> None:
    """Nothing is copied where the engine shares the weights; what it has cached of the old ones is dropped."""
    policy.engine.weights_changed()


# ---- used by 5 and 6
def _micro_batches(policy: Policy, samples: Sequence[Sample]) -> list[MicroBatch]:
    return micro_batches(samples, policy.config.train.token_budget, policy.engine.model.device)


def _logprob(policy: Policy, model: Any, batch: MicroBatch) -> LogProb:
    """logp and entropy [M] f32 of the completion tokens: only the rows that predict one reach the head."""
    hidden = packed_hidden(model, batch.packed)  # [N, H]
    weight = lm_head(model).weight  # [V, H]
    assert isinstance(weight, Tensor)
    return linear_logprob(
        hidden.index_select(0, batch.rows),  # [M, H]; the backward of hidden[rows] adds in no fixed order
        weight,
        batch.target,
        temperature=policy.config.rollout.temperature,
        entropy=True,
    )


@contextmanager
def _checkpointed(policy: Policy) -> Iterator[None]:
    """transformers checkpoints its layers in training mode alone; without dropout the modes differ in nothing else."""
    policy.model.train(policy.offload is not None)
    try:
        yield
    finally:
        policy.model.eval()


@contextmanager
def _reference(policy: Policy) -> Iterator[Any]:
    """The reference model: the frozen copy, or the trained model with its adapter off."""
    if policy.reference is not None:
        yield policy.reference
        return
    with policy.model.disable_adapter():
        yield policy.model
