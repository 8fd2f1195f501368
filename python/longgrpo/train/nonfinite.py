"""A gradient that is not finite: its update is left out, and where it comes from is said."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from longgrpo.errors import TrainingError
from longgrpo.tasks.sample import Sample
from longgrpo.train.policy import Policy, scored

log = logging.getLogger(__name__)


def leave_out(policy: Policy, number: int, samples: Sequence[Sample]) -> dict[str, float]:
    """Drops the gradient of an update of step `number`, made from `samples`. Raises TrainingError, with the diagnosis,
    where it is the train.max_nonfinite-th in a row."""
    policy.left_out += 1
    reason = diagnose(policy, samples)
    policy.optimizer.zero_grad(set_to_none=True)
    if policy.left_out >= policy.config.train.max_nonfinite:
        raise TrainingError(
            f"step {number}: the gradient is not finite, {policy.left_out} times in a row: {reason}\n"
            "the weights are as they were before these updates"
        )
    log.warning("step %d: the gradient is not finite, its update is left out: %s", number, reason)
    return {"updates_left_out": 1.0}


@torch.no_grad()
def diagnose(policy: Policy, samples: Sequence[Sample]) -> str:
    """Where numbers stop being finite, on their way from the weights to the gradient, and what to do about it."""
    wider = f"model.dtype is {policy.config.model.dtype}: a wider one may help, and so may a lower train.learning_rate"
    if weights := _odd(dict(policy.model.named_parameters())):
        return f"{_some(weights, 'weights')}; go back to a checkpoint before that, with a lower train.learning_rate"
    if odd := [s for s in samples if not torch.tensor(s.completion.logprobs).isfinite().all()]:
        return f"the engine's logprobs of {len(odd)} of {len(samples)} completions; {wider}"
    if odd := [s for s, logp, _ in scored(policy, policy.model, samples) if not logp.isfinite().all()]:
        return f"the trainer's logprobs of {len(odd)} of {len(samples)} completions, of finite weights; {wider}"
    if odd := [s for s in samples if s.ref_logp is not None and not s.ref_logp.isfinite().all()]:
        return f"the reference's logprobs of {len(odd)} of {len(samples)} completions; {wider}"
    if odd := [s for s in samples if not torch.tensor(s.advantage).isfinite()]:
        return f"the advantages of {len(odd)} of {len(samples)} completions; look at the reward functions"
    gradients = {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}
    return f"{_some(_odd(gradients), 'gradients')}, all before it being finite: the backward overflows; {wider}"


def _odd(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _some(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}, first that of {names[0]}" if names else f"the norm of the {what}"
