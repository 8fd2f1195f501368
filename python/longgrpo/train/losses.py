"""The loss of a micro-batch: hidden states by the model, and one pass of the head that does the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longgrpo.config.run import TrainConfig
from longgrpo.config.sampling import Sampling
from longgrpo.errors import TrainingError
from longgrpo.loss import (
    GRPOLoss,
    LogProb,
    LossInputs,
    OffPolicyCorrection,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
)  # fmt: skip
from longgrpo.model.head import head_of
from longgrpo.model.packed_attention import packed_hidden
from longgrpo.rollout.support import sampled_logprob
from longgrpo.tasks.user_code import load_function
from longgrpo.train.packing import MicroBatch
from longgrpo.train.reference import Reference

LossFunction = Callable[[LossInputs], tuple[Tensor, Mapping[str, Any]]]


def hidden_states(model: Any, batch: MicroBatch) -> Tensor:
    """[M, H]. The backward of hidden[rows] would add in no fixed order."""
    return packed_hidden(model, batch.packed).index_select(0, batch.rows)


def logprob(
    model: Any, batch: MicroBatch, sampling: Sampling, *, entropy: bool = False, alone: bool = False
) -> LogProb:
    """logp and entropy [M] float32 of the completion tokens under the distribution that `sampling` samples from: only
    the rows that predict one reach the head. alone: see linear_logprob."""
    hidden, head = hidden_states(model, batch), head_of(model)
    if sampling.reshapes:
        return sampled_logprob(hidden, head, batch.target, sampling, batch.support)
    return linear_logprob(
        hidden,
        head.weight,
        batch.target,
        temperature=sampling.temperature,
        entropy=entropy,
        alone=alone,
        **head.options,
    )


class PolicyLoss:
    """The run's loss: that of `loss.loss_type`, or the user's own function (loss.function).

    Head GEMMs of a micro-batch, frozen / trained head: 2 / 3; 2 / 4 if the loss needs whole sequences first, or is the
    user's own; one more for an exact KL.

    Raises ConfigError for a loss.function that cannot be imported.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.sampling = config, config.rollout.request()
        rollout, spec = config.rollout, config.loss.function
        self.function: LossFunction | None = load_function(spec, "loss.function") if spec else None
        self.correction = OffPolicyCorrection(
            importance=rollout.importance, cap=rollout.importance_cap, threshold=config.train.off_policy_threshold
        )

    def with_entropy_coef(self, value: float) -> PolicyLoss:
        """This loss with another weight of the entropy bonus."""
        other = copy.copy(self)
        other.config = replace(self.config, loss=replace(self.config.loss, entropy_coef=value, entropy_target=None))
        return other

    def __call__(self, model: Any, reference: Reference | None, batch: MicroBatch, normalizer: float) -> GRPOLoss:
        """The loss of `batch` as its part of an update, which divides by `normalizer` in all."""
        if self.function:
            return self._own(self.function, model, batch, normalizer)
        if self.sampling.reshapes:
            return self._from_logprobs(*logprob(model, batch, self.sampling, entropy=True), batch, normalizer)
        return self._fused(model, reference, batch, normalizer)

    def _fused(self, model: Any, reference: Reference | None, batch: MicroBatch, normalizer: float) -> GRPOLoss:
        ref_hidden = ref_weight = None
        if self.config.loss.exact_kl:  # a sum over the vocabulary needs the reference's hidden states and head
            assert reference
            with torch.no_grad(), reference() as unchanged:
                ref_hidden, ref_weight = hidden_states(unchanged, batch), head_of(unchanged).weight.data
        head = head_of(model)
        return linear_grpo_loss(
            hidden_states(model, batch), head.weight, batch.target, **vars(batch.tokens), ref_hidden=ref_hidden,
            ref_weight=ref_weight, normalizer=normalizer, config=self.config.loss, correction=self.correction,
            temperature=self.sampling.temperature, **head.options,
        )  # fmt: skip

    def _from_logprobs(self, logp: Tensor, entropy: Tensor | None, batch: MicroBatch, normalizer: float) -> GRPOLoss:
        return grpo_loss(
            logp, **vars(batch.tokens), entropy=entropy, normalizer=normalizer, config=self.config.loss,
            correction=self.correction,
        )  # fmt: skip

    def _own(self, function: LossFunction, model: Any, batch: MicroBatch, normalizer: float) -> GRPOLoss:
        """The user's loss, with the built-in one's metrics and its own."""
        logp, entropy = logprob(model, batch, self.sampling, entropy=True)
        assert entropy is not None
        with torch.no_grad():
            known = self._from_logprobs(logp.detach(), entropy.detach(), batch, normalizer)
        loss, metrics = _checked(function(LossInputs.of(logp, entropy, batch.tokens, normalizer)), self.config)
        own = {name: torch.as_tensor(value, device=logp.device).detach().float() for name, value in metrics.items()}
        return GRPOLoss(loss, {**known.metrics, "policy_loss": loss.detach(), **own}, known.logp, known.entropy)


def _checked(result: Any, config: TrainConfig) -> tuple[Tensor, Mapping[str, Any]]:
    name = f"loss.function {config.loss.function!r} returned"
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise TrainingError(f"{name} {type(result).__name__}: must be (loss, metrics), metrics a dict")
    loss, metrics = result
    if not (isinstance(loss, Tensor) and loss.shape == ()):
        raise TrainingError(f"{name} a loss of shape {_shape(loss)}: must be a scalar tensor; sum over the tokens")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise TrainingError(f"{name} a loss that does not depend on t.logp: there is nothing to learn from it")
    for key, value in metrics.items():
        if not (isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)):
            raise TrainingError(f"{name} metric {key!r} of shape {_shape(value)}: must be a number or a scalar tensor")
    return loss.float(), metrics


def _shape(value: Any) -> Any:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__
