"""One step of GRPO, read from top to bottom: `step` calls the eight phases. The first three, which sample and reward,
are in longgrpo.train.collect; the others follow it in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from longgrpo.config.run import TrainConfig
from longgrpo.errors import WeightSyncError
from longgrpo.rollout.probe import EngineMismatch, Probe
from longgrpo.tasks.rewards import Reward, turn_returns
from longgrpo.tasks.sample import Rollout
from longgrpo.train.advantages import advantages, turn_advantages
from longgrpo.train.collect import Collector
from longgrpo.train.loss_scale import loss_scales
from longgrpo.train.losses import PolicyLoss, logprob
from longgrpo.train.metrics import (
    Clock,
    Meter,
    known,
    offload_counts,
    over_ranks,
    over_updates,
    rank_metrics,
    sign_metrics,
    step_metrics,
)
from longgrpo.train.packing import MicroBatch
from longgrpo.train.ranks import Ranks
from longgrpo.train.skip import skip_update
from longgrpo.train.state import TrainState
from longgrpo.train.update import Update, in_loss, plan_updates


@dataclass(frozen=True)
class Loop:
    """What a step works with."""

    config: TrainConfig
    collector: Collector
    state: TrainState
    loss: PolicyLoss
    probe: Probe

    @property
    def ranks(self) -> Ranks:
        return self.state.ranks


@dataclass
class StepResult:
    metrics: dict[str, Any]
    rollout: Rollout


def step(loop: Loop, number: int) -> StepResult:
    """Step `number`, from 1: the weights are updated in place and the engine sees them. Each rank rolls out its part of
    the prompts and trains on its share of the rollout; what is decided is decided on all of it, alike on every rank."""
    config, state, ranks = loop.config, loop.state, loop.ranks
    clock, waited = Clock(), ranks.seconds
    offloaded = offload_counts(state.offload)
    with clock("step"):
        rollout, groups = loop.collector.collect(number, clock)
        with clock("advantage"):
            rollout.advantages = advantage(config, rollout, loop.collector.rewarding.weights)
            rollout.turn_advantages = advantage_of_turns(config, rollout, loop.collector.rewarding.rewards)
            updates = plan_updates(config, rollout, state.model.device, ranks=ranks)
        with clock("score"):
            score(config, state, updates)
        losses = []
        for update in updates * config.train.num_iterations:
            with clock("loss_and_backward"):
                norm, values = controlled_loss_and_backward(loop.loss, state, update)
            with clock("optimizer_step"):
                losses.append(values | optimizer_step(config, state, number, update, norm))
        with clock("sync_weights"):
            synced = sync_weights(loop.probe, state.model)
            sync_reference(config, state, number)
    measured = rank_metrics(synced, clock.seconds, state.offload, offloaded), ranks.seconds - waited
    every, waits = zip(*ranks.gather(measured, "the end of the step"), strict=True)
    metrics: dict[str, Any] = {
        "step": number,
        "epoch": loop.collector.stream.epoch,
        **loop.collector.reward_metrics(rollout),
        **groups,
        **sign_metrics(rollout.advantages.flatten()[in_loss(config, rollout)].tolist()),
        **over_updates(losses),
        **step_metrics(rollout, sum(update.tokens for update in updates), over_ranks(every, waits)),
    }
    return StepResult(known(metrics), rollout)


# ---- 4
def advantage(config: TrainConfig, rollout: Rollout, weights: Tensor) -> Tensor:
    """[P, G] float32, from the rewards [F, P, G] and the weights [F] of their functions."""
    return advantages(rollout.rewards, weights, config.train.scale_rewards, config.train.aggregation)


def advantage_of_turns(config: TrainConfig, rollout: Rollout, rewards: Sequence[Reward]) -> list[Tensor] | None:
    """Of each sample one a turn, with train.advantage_level: turn."""
    if config.train.advantage_level == "episode":
        return None
    size = rollout.rewards.shape[2]
    values = rollout.rewards.flatten(1).T.tolist()  # P G of F
    returns = [turn_returns(sample, own, rewards) for sample, own in zip(rollout.samples, values, strict=True)]
    groups = [returns[i : i + size] for i in range(0, len(returns), size)]
    found = [member for group in turn_advantages(groups, config.train.scale_rewards) for member in group]
    pairs = zip(found, rollout.samples, strict=True)
    return [own if len(own) else torch.zeros(len(sample.completion.turns)) for own, sample in pairs]


# ---- 5
@torch.no_grad()
def score(config: TrainConfig, state: TrainState, updates: Sequence[Update]) -> None:
    """Adds to each micro-batch what its loss compares with: the reference's logprobs, if the loss has a KL term that is
    made of them, and the old policy's, if the rollout serves several updates. One that serves a single update needs
    none: the policy is its own old one, and the ratio is 1."""
    batches = [batch for update in updates if update.trains for batch in update.batches]
    sampling = config.rollout.request()
    if config.scores_reference:
        assert state.reference
        with state.reference() as model:
            for batch in batches:
                batch.tokens = replace(batch.tokens, ref_logp=logprob(model, batch, sampling, alone=True).logp)
    if config.rollout.bitwise and config.train.updates > 1:
        for batch in batches:
            batch.tokens = replace(batch.tokens, old_logp=batch.tokens.sampling_logp)
    if not config.scores_policy:
        return
    entropies: list[Tensor] = []
    for batch in batches:
        logp, entropy = logprob(state.model, batch, sampling, entropy=True)
        assert entropy is not None
        entropies.append(entropy)
        if config.train.updates > 1 and not config.rollout.bitwise:
            batch.tokens = replace(batch.tokens, old_logp=logp)
    if config.train.top_entropy_quantile < 1:
        _silence_low_entropy(batches, entropies, config.train.top_entropy_quantile, state.ranks)


def _silence_low_entropy(
    batches: Sequence[MicroBatch], entropies: Sequence[Tensor], share: float, ranks: Ranks
) -> None:
    """Only the `share` of all tokens, of every rank, with the highest entropy keep a policy gradient. entropies: [M] a
    batch."""
    every = [own for part in ranks.gather(list(entropies), "the entropies") for own in part]
    if not every or not batches:
        return
    rising = torch.cat([own.to(batches[0].target.device) for own in every]).sort().values
    lowest = rising[ceil((1 - share) * (len(rising) - 1))]
    for batch, entropy in zip(batches, entropies, strict=True):
        batch.tokens = replace(batch.tokens, importance=(entropy >= lowest).float())


# ---- 6
def loss_and_backward(loss: PolicyLoss, state: TrainState, update: Update) -> tuple[float, dict[str, float]]:
    """The gradient of an update's loss, summed over the ranks. Returns its norm, 0 if no sample has a gradient, and the
    metrics: all that an update reads from the device, in one copy for each loss scale that is tried."""
    for scale in loss_scales(loss.config.model.dtype):
        meter = _accumulate(loss, state, update, scale)
        norm, metrics = meter.read(state.sum_gradients(), state.ranks)
        if isfinite(norm) or scale == 1:
            break
        state.optimizer.zero_grad(set_to_none=True)
    if scale != 1:
        torch._foreach_div_(list(state.gradients.values()), scale)
    return norm / scale, metrics


def controlled_loss_and_backward(loss: PolicyLoss, state: TrainState, update: Update) -> tuple[float, dict[str, float]]:
    """The same with the weight of the entropy bonus that the control has, if there is one; it sees the entropy."""
    control, config = state.entropy_control, loss.config.loss
    if control is None:
        return loss_and_backward(loss, state, update)
    weight = control.applied(config)
    norm, metrics = loss_and_backward(loss.with_entropy_coef(weight), state, update)
    if isfinite(metrics["entropy"]):
        control.observe(metrics["entropy"], config)
    return norm, metrics | {"entropy_coef": weight}


def _accumulate(loss: PolicyLoss, state: TrainState, update: Update, scale: float) -> Meter:
    """Adds up the gradient, times `scale`, micro-batch by micro-batch."""
    meter = Meter()
    state.begin_gradients(len(update.batches) if update.trains else 0)
    for batch in update.batches:
        with torch.set_grad_enabled(update.trains):
            result = loss(state.model, state.reference, batch, update.normalizer)
        if update.trains:
            (result.loss * scale).backward()
            state.end_backward()
        meter.add({"loss": result.loss, **result.metrics, **_reverse_kl(batch)}, len(batch.target))
    return meter


def _reverse_kl(batch: MicroBatch) -> dict[str, Tensor]:
    """The mean of logp - ref_logp over the sampled tokens, by the engine's logp: an unbiased estimate of the reverse KL
    (k1), by which runs compare whatever loss.kl is. Nothing if no reference was scored."""
    sampling_logp, ref_logp = batch.tokens.sampling_logp, batch.tokens.ref_logp
    return {} if sampling_logp is None or ref_logp is None else {"reverse_kl": (sampling_logp - ref_logp).mean()}


# ---- 7
def optimizer_step(
    config: TrainConfig, state: TrainState, number: int, update: Update, norm: float
) -> dict[str, float]:
    """Clips the gradient, whose norm is `norm`, and steps the optimizer, unless it is not finite (see skip_update)."""
    if not update.trains:
        return {"grad_norm": 0.0}
    if not isfinite(norm):
        return skip_update(config, state, number, update)
    state.skipped_updates = 0
    clip_grads_with_norm_(state.masters.parameters.values(), config.train.max_grad_norm, torch.tensor(norm))
    rate = config.train.learning_rate_at(number)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.moved = True
    state.optimizer.step()
    state.publish()
    state.optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm, "learning_rate": rate}


# ---- 8
def sync_weights(probe: Probe, model: Any) -> dict[str, float]:
    """Nothing is copied if the engine shares the weights; what it has cached of the old ones is dropped. Then engine
    and trainer answer a fixed prompt: WeightSyncError if they do not run the same weights."""
    copied = probe.engine.weights_changed()
    try:
        difference = probe(model)
    except EngineMismatch as error:
        raise WeightSyncError(f"after this step, {error}. Nothing of this step was saved") from error
    return {"weight_sync_bytes": copied, "probe_logprob_diff": difference}


def sync_reference(config: TrainConfig, state: TrainState, number: int) -> None:
    """The reference follows the policy, every train.reference_sync_steps."""
    every = config.train.reference_sync_steps
    if state.reference and every and number % every == 0:
        state.reference.sync(config.train.reference_mixup)
