"""A gradient that is not finite: its update is skipped, and its origin is reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longgrpo.config.run import TrainConfig
from longgrpo.errors import TrainingError
from longgrpo.train.losses import logprob
from longgrpo.train.packing import MicroBatch
from longgrpo.train.state import TrainState
from longgrpo.train.update import Update

log = logging.getLogger(__name__)


def skip_update(config: TrainConfig, state: TrainState, number: int, update: Update) -> dict[str, float]:
    """Drops the gradient of an update of step `number`. Raises TrainingError, with the diagnosis, if it is the
    train.max_skipped_updates-th in a row."""
    state.skipped_updates += 1
    reason = diagnose(config, state, update.batches)
    state.optimizer.zero_grad(set_to_none=True)
    if state.skipped_updates >= config.train.max_skipped_updates:
        raise TrainingError(
            f"step {number}: the gradient is not finite, {state.skipped_updates} times in a row: {reason}\n"
            "the weights are as they were before these updates"
        )
    if state.ranks.is_first:
        log.warning("step %d: the gradient is not finite, and the update is skipped: %s", number, reason)
    return {"skipped_updates": 1.0}


@torch.no_grad()
def diagnose(config: TrainConfig, state: TrainState, batches: Sequence[MicroBatch]) -> str:
    """Where numbers stop being finite, on their way from the weights to the gradient, and what to do about it."""
    wider = f"model.dtype is {config.model.dtype}: a wider one may help, and so may a lower train.learning_rate"
    if weights := _odd(dict(state.model.named_parameters())):
        return f"{_some(weights, 'weights')}; go back to a checkpoint before that, with a lower train.learning_rate"
    sampling = config.rollout.request()
    samples = sum(state.ranks.gather(sum(len(batch.samples) for batch in batches), "a diagnosis"))
    stages: list[tuple[str, Callable[[MicroBatch], Tensor | None], str]] = [
        ("the engine's logprobs of {} completions", lambda batch: batch.tokens.sampling_logp, wider),
        (
            "the trainer's logprobs of {} completions, of finite weights",
            lambda batch: logprob(state.model, batch, sampling).logp,
            wider,
        ),
        ("the reference's logprobs of {} completions", lambda batch: batch.tokens.ref_logp, wider),
        ("the advantages of {} completions", lambda batch: batch.tokens.advantages, "look at the reward functions"),
    ]
    for what, values, remedy in stages:
        if odd := sum(state.ranks.gather(sum(_odd_samples(values(batch), batch) for batch in batches), "a diagnosis")):
            return f"{what.format(f'{odd} of {samples}')}; {remedy}"
    gradients = [name for own in state.ranks.gather(_odd(state.gradients), "a diagnosis") for name in own]
    odd_ones = _some(list(dict.fromkeys(gradients)), "gradients")
    return f"{odd_ones}, with all before it finite: the backward overflows; {wider}"


def _odd_samples(values: Tensor | None, batch: MicroBatch) -> int:
    """Samples of a micro-batch with a value [M], or [S], that is not finite."""
    if values is None:
        return 0
    finite = values.isfinite().cpu()
    parts = finite.split([len(sample) for sample in batch.samples]) if len(finite) == len(batch.target) else finite
    return sum(not bool(part.all()) for part in parts)


def _odd(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _some(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}, first that of {names[0]}" if names else f"the norm of the {what}"
