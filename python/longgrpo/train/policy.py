"""What a step works with, and what is derived from it: rewards as tensors, and logprobs by the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longgrpo import LogProb, linear_logprob
from longgrpo.config.run import TrainConfig
from longgrpo.model.head import head_of
from longgrpo.model.masters import MasterWeights
from longgrpo.model.packed_attention import packed_hidden
from longgrpo.offload import OffloadEngine
from longgrpo.rollout.probe import Probe
from longgrpo.rollout.protocol import RolloutEngine
from longgrpo.rollout.support import sampled_logprob
from longgrpo.tasks.data import PromptStream
from longgrpo.tasks.rewards import Rewarding
from longgrpo.tasks.sample import Sample
from longgrpo.train.advantages import groups_with_spread, weighted_sum
from longgrpo.train.packing import MicroBatch, micro_batches
from longgrpo.train.reference import Reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerState


@dataclass
class Policy:
    """What a step works with and changes: the model in training, and the stream of problems."""

    config: TrainConfig
    engine: RolloutEngine
    model: Any  # transformers' model, wrapped by PEFT under LoRA; its base lies on the engine's weights
    reference: Reference | None  # where the loss has a KL term
    offload: OffloadEngine | None  # holds the layers' inputs between forward and backward
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    masters: MasterWeights
    probe: Probe
    rewarding: Rewarding
    stream: PromptStream
    left_out: int = 0  # updates in a row, up to now, whose gradient was not finite

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What the optimizer steps, by name, in float32."""
        return self.masters.parameters


def trainer_state(policy: Policy, number: int) -> TrainerState:
    """What reward functions know of the run, in TRL's form: global_step counts the steps done."""
    from transformers import TrainerState

    return TrainerState(
        epoch=policy.stream.epoch, global_step=max(number - 1, 0), max_steps=policy.config.train.steps
    )  # fmt: skip


def reward_values(policy: Policy, samples: Sequence[Sample]) -> Tensor:
    """f64 [F, P, G]: what each of F functions gave; NaN where it did not apply."""
    values = [[sample.rewards[reward.name] for sample in samples] for reward in policy.rewarding.rewards]
    return torch.tensor(values, dtype=torch.float64).unflatten(1, (-1, policy.config.rollout.num_generations))


def reward_totals(policy: Policy, values: Tensor) -> Tensor:
    return weighted_sum(values, policy.rewarding.weights)


def spread_of(policy: Policy, samples: Sequence[Sample]) -> Tensor:
    """[P] bool: the groups that teach something."""
    return groups_with_spread(
        reward_values(policy, samples), policy.rewarding.weights, policy.config.train.aggregation
    )  # fmt: skip


def in_loss(policy: Policy, samples: Sequence[Sample]) -> list[Sample]:
    masked = policy.config.train.mask_truncated
    return [sample for sample in samples if not (masked and sample.completion.finish_reason == "length")]


def micro_batches_of(policy: Policy, samples: Sequence[Sample]) -> list[MicroBatch]:
    config, device = policy.config, policy.engine.model.device
    return micro_batches(samples, config.train.token_budget, device, share_prompts=config.memory.share_prompts)


def scored(policy: Policy, model: Any, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Tensor, Tensor]]:
    """Each sample with its logprobs and entropies, f32 [T]."""
    for batch in micro_batches_of(policy, samples):
        logp, entropy = logprob(policy, model, batch)
        lengths = [len(sample) for sample in batch.samples]
        assert entropy is not None
        yield from zip(batch.samples, logp.split(lengths), entropy.split(lengths), strict=True)


def logprob(policy: Policy, model: Any, batch: MicroBatch) -> LogProb:
    """logp and entropy [M] f32 of the completion tokens: only the rows that predict one reach the head."""
    hidden, head, sampling = hidden_states(model, batch), head_of(model), policy.config.rollout.request()
    if sampling.reshapes:
        return sampled_logprob(hidden, head, batch.target, sampling, batch.support)
    return linear_logprob(
        hidden, head.weight, batch.target, temperature=sampling.temperature, entropy=True, **head.options
    )


def hidden_states(model: Any, batch: MicroBatch) -> Tensor:
    """[M, H]. The backward of hidden[rows] would add in no fixed order."""
    return packed_hidden(model, batch.packed).index_select(0, batch.rows)
