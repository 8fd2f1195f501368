"""The checks of the self-test, a function each. Each has an oracle that the step itself does not use: the engine's
logprobs for the trainer's, the rewards for the advantages, the plain-torch estimators for the KL term."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longgrpo.config.run import TrainConfig
from longgrpo.errors import WeightSyncError
from longgrpo.loss import loss_type
from longgrpo.loss.reference import kl_estimate
from longgrpo.model.load import end_token_ids, resolve_model
from longgrpo.tasks.data import Problem
from longgrpo.tasks.rewards import Rewarding
from longgrpo.tasks.sample import Rollout, Sample
from longgrpo.train.loop import Loop, loss_and_backward, score, sync_weights
from longgrpo.train.losses import PolicyLoss, logprob
from longgrpo.train.packing import MicroBatch
from longgrpo.train.state import TrainState
from longgrpo.train.update import Update, batches_of, plan_updates

TOKENS = 64  # of a completion sampled after the update
VISIBLE = 0.05  # nats a token


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    seen: str
    remedy: str = ""
    """What it means if the check failed, and what to do."""

    def __str__(self) -> str:
        return f"ok    {self.name}: {self.seen}" if self.passed else f"FAIL  {self.name}: {self.seen}; {self.remedy}"


def with_config(loop: Loop, config: TrainConfig) -> Loop:
    return replace(loop, config=config, collector=replace(loop.collector, config=config), loss=PolicyLoss(config))


@torch.no_grad()
def set_weights(state: TrainState, weights: dict[str, Tensor], scale: float = 0.0) -> None:
    """weights + scale * (the present parameters - weights), only in the trainer."""
    for name, parameter in state.parameters.items():
        origin = weights[name].to(parameter.device)
        parameter.copy_(torch.lerp(origin, parameter, scale) if scale else origin)
    state.publish()


def alike(loop: Loop, check: Check) -> Check:
    """A check of all ranks: one that failed on any, else that of rank 0."""
    found = loop.ranks.gather(check, "a check")
    return next((one for one in found if not one.passed), found[0])


def planned(loop: Loop, rollout: Rollout) -> tuple[Update, Update]:
    """One update as this rank trains it, and the whole of it, to look at."""
    device = loop.state.model.device
    (update,) = plan_updates(loop.config, rollout, device, ranks=loop.ranks)
    (whole,) = [update] if loop.ranks.world == 1 else plan_updates(loop.config, rollout, device)
    return update, whole


# ---- before the update
def template_ends(loop: Loop, problem: Problem, samples: Sequence[Sample]) -> Check:
    """A reply in the prompt's template is followed by a token at which the engine stops."""
    tokenizer, request = loop.collector.tokenizer, loop.config.rollout.request()
    model = loop.config.model
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
    text = tokenizer.apply_chat_template(reply, tokenize=False, **loop.config.task.chat_template_kwargs)
    after = str(text).rpartition("Zebra")[2]
    return Check(
        "end token",
        bool(set(tokenizer(after, add_special_tokens=False)["input_ids"]) & set(ends)),
        seen,
        f"the chat template writes {after!r} after a reply: no completion would learn to end; correct "
        "task.chat_template, or eos_token_id in the model's generation_config.json",
    )


def seeds_differ(samples: Sequence[Sample]) -> Check:
    groups: dict[int, set[tuple[int, ...]]] = {}
    for sample in samples:
        groups.setdefault(sample.group, set()).add(tuple(sample.completion.sampled_ids))
    alike = sum(len(different) == 1 for different in groups.values())
    return Check(
        "seeds",
        alike < len(groups),
        f"in {alike} of {len(groups)} groups all completions are the same",
        "they were sampled with one seed, or rollout.temperature is too low",
    )


def rewards_have_spread(groups: Sequence[bool]) -> Check:
    return Check(
        "spread",
        any(groups),
        f"rewards differ within {sum(groups)} of {len(groups)} groups",
        "there is nothing to learn if no completion earns more than the others of its group: use an easier task, more "
        "rollout.num_generations, a higher rollout.temperature or a graded reward, and look at what the rewards return",
    )


def engine_noise(batches: Sequence[MicroBatch], logp: Tensor) -> float:
    """Nats a token between the engine and the trainer, on weights that both have: its kernels' and its cache's. logp
    [T]: the trainer's."""
    return _gap(batches, logp)


def agree(loop: Loop, batches: Sequence[MicroBatch], logp: Tensor) -> Check:
    gap, limit = _gap(batches, logp), loop.probe.tolerance
    return Check(
        "agreement",
        gap <= limit,
        f"engine and trainer differ by {gap:.2g} nats per token, rounding explains {limit:.2g}",
        "they score different tokens, at different temperatures, or with different weights",
    )


def calls_are_answered(samples: Sequence[Sample]) -> Check:
    """Something answers the model's turns, and the episode goes on after it."""
    episodes = [sample.episode for sample in samples if sample.episode]
    answered = [one for episode in episodes for one in episode.answered]
    well = sum(not one.failure for one in answered)
    later = sum(len(sample.completion.turns) > 1 for sample in samples)
    failures = Counter(one.failure for one in answered if one.failure)
    failed = "".join(f", {count} {kind}" for kind, count in failures.items())
    return Check(
        "calls",
        well > 0,
        f"{well} answered in {len(episodes)} episodes{failed}; {later} went on after it",
        "what no completion does cannot be learned: show in the prompt how to call, by an example as turns, and "
        "compare task.tool_pattern with what the model writes"
        if not answered
        else "look at the tool or the environment",
    )


def later_turns_agree(loop: Loop, rollout: Rollout, batches: Sequence[MicroBatch], logp: Tensor) -> Check:
    """The same of the tokens after the first turn, before which something was given."""
    later = torch.tensor(
        [
            n > 0
            for s in rollout.samples
            for n, turn in enumerate(s.completion.turns)
            for _ in range(turn.begin, turn.end)
        ]
    )
    sampled = torch.cat([batch.tokens.sampling_logp for batch in batches if batch.tokens.sampling_logp is not None])
    gap = _mean_change(sampled.cpu()[later], logp.cpu()[later])
    return Check(
        "later turns",
        gap <= loop.probe.tolerance,
        f"engine and trainer differ by {gap:.2g} nats per token on {int(later.sum())} tokens after an answer",
        "they do not read the same tokens between turns",
    )


def advantages_follow_rewards(loop: Loop, rollout: Rollout) -> Check:
    """In each group the advantages rise with the rewards above their mean."""
    values = rollout.rewards  # [F, P, G]
    above = values - values.nanmean(-1, keepdim=True)
    if loop.config.train.aggregation == "normalize_then_sum":
        above /= above.square().nanmean(-1, keepdim=True).sqrt() + 1e-4
    merit = (above * loop.collector.rewarding.weights[:, None, None]).nansum(0)  # [P, G]
    following = int(((merit * rollout.advantages).sum(-1) > 0).sum())
    return Check(
        "advantages",
        following == len(merit),
        f"advantages follow the rewards in {following} of {len(merit)} groups",
        "in the others the worse completion would become the likelier one: a sign is wrong",
    )


def something_trains(state: TrainState, rollout: Rollout, update: Update) -> Check:
    trained = sum(parameter.requires_grad for parameter in state.model.parameters())
    active = sum(len(batch.samples) for batch in update.batches) if update.trains else 0
    return Check(
        "trainable",
        bool(trained and active),
        f"{trained} parameters, {active} of {len(rollout.samples)} completions",
        "all completions are truncated and train.mask_truncated leaves them out: raise rollout.max_completion_length"
        if trained
        else "the adapter is frozen: no parameter requires a gradient",
    )


# ---- the update
def gradient(state: TrainState) -> Check:
    norms = {name: gradient.norm().item() for name, gradient in state.gradients.items()}
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


def weights_move(state: TrainState, weights: dict[str, Tensor], touched: Sequence[str]) -> Check:
    still = [name for name in touched if torch.equal(state.parameters[name].cpu(), weights[name])]
    return Check(
        "weights",
        not still,
        f"{len(touched) - len(still)} of {len(touched)} parameters with a gradient moved",
        f"not {', '.join(still[:1])}: the optimizer does not hold it, or train.learning_rate is too low for its dtype",
    )


def make_visible(
    loop: Loop, weights: dict[str, Tensor], batches: Sequence[MicroBatch], old: Tensor, visible: float = VISIBLE
) -> Tensor:
    """Lengthens the update until it moves the logprobs by `visible` nats a token; returns the logprobs [T] after it."""
    new = logprobs(loop, loop.state.model, batches)
    for _ in range(4):
        change = _mean_change(old, new)
        if not 0 < change < visible:
            break
        set_weights(loop.state, weights, scale=min(1.2 * visible / change, 1000.0))
        new = logprobs(loop, loop.state.model, batches)
    return new


# ---- after it
def update_follows_advantages(config: TrainConfig, batches: Sequence[MicroBatch], old: Tensor, new: Tensor) -> Check:
    """sum A (logp_new - logp_old) > 0, each token weighted as in the loss."""
    mean_of_sequence = loss_type(config.loss.loss_type).mean == "sequence"
    gain = 0.0
    changes = (new - old).split([len(batch.target) for batch in batches])
    for batch, change in zip(batches, changes, strict=True):
        weighted = change if batch.tokens.importance is None else change * batch.tokens.importance
        parts = weighted.split([len(sample) for sample in batch.samples])
        for value, part in zip(batch.tokens.advantages.tolist(), parts, strict=True):
            gain += value * (part.mean() if mean_of_sequence else part.sum()).item()
    return Check(
        "update",
        gain > 0,
        f"sum A (logp_new - logp_old) = {gain:.3g}, logprobs moved by {_mean_change(old, new):.2g} nats a token",
        "it makes good completions less likely: a sign in the loss is wrong, or train.learning_rate is too high",
    )


def engine_follows(loop: Loop, rollout: Rollout, weights: dict[str, Tensor]) -> Check:
    """The engine samples from the weights after the update, and not from those before it."""
    state = loop.state
    try:
        sync_weights(loop.probe, state.model)
        probe = ""
    except WeightSyncError as error:
        probe = f"; {error}"
    sampling = loop.config.rollout
    sampling = replace(sampling, max_completion_length=min(sampling.max_completion_length, TOKENS))
    config = replace(loop.config, rollout=sampling)
    asked = replace(loop.collector, config=config, rewarding=Rewarding([]))
    samples = asked.roll_out(rollout.problems, 0, first_group=rollout.samples[0].group)
    asked.release(samples)
    unrewarded = torch.empty(0, len(rollout.problems), sampling.num_generations)
    answered = Rollout.of(rollout.problems, samples, unrewarded)
    batches = batches_of(config, answered, range(len(samples)), state.model.device)
    new = _gap(batches, _own_logprobs(loop, state.model, batches))
    updated = {name: p.detach().clone() for name, p in state.parameters.items()}
    set_weights(state, weights)
    old = _gap(batches, _own_logprobs(loop, state.model, batches))
    set_weights(state, updated)
    return Check(
        "engine",
        new < old and new <= loop.probe.tolerance and not probe,
        f"it is {new:.2g} nats a token off the weights after the update, {old:.2g} off those before it{probe}",
        "the update never reached it"
        if old < new / 4
        else "it runs neither: a prefix cache outlived the update, or an adapter is merged twice or at another scale",
    )


def reference_differs(loop: Loop, batches: Sequence[MicroBatch], old: Tensor, new: Tensor) -> Check:
    reference = _reference_logprobs(loop, batches)
    moved, apart = _mean_change(old, reference), _mean_change(new, reference)
    return Check(
        "reference",
        apart > moved,
        f"the policy is {apart:.2g} nats a token from its reference, which moved by {moved:.2g}",
        "the reference follows the policy, and the KL term holds nothing",
    )


def kl_falls(loop: Loop, rollout: Rollout) -> Check:
    """A step down the gradient of only the KL term, halved while it is too long, lowers the estimate."""
    loop = with_config(loop, replace(loop.config, loss=replace(loop.config.loss, beta=1.0)))
    config, state = loop.config, loop.state
    without_policy = replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    update, whole = planned(loop, without_policy)
    reference = _reference_logprobs(loop, whole.batches)
    estimator = "k3" if config.loss.exact_kl else config.loss.kl

    def value() -> float:
        return kl_estimate(estimator, logprobs(loop, state.model, whole.batches), reference).mean().item()

    score(config, state, [update])
    loss_and_backward(loop.loss, state, update)
    start = {name: p.detach().clone() for name, p in state.parameters.items()}
    gradient = dict(state.gradients)
    before, square = value(), sum(g.square().sum().item() for g in gradient.values())
    square = sum(loop.ranks.gather(square, "the gradient")) if state.owners else square
    length = 0.5 * abs(before) / max(square, 1e-30)
    for _ in range(6):
        set_weights(state, {name: p - length * gradient[name] if name in gradient else p for name, p in start.items()})
        after = value()
        if after < before:
            break
        length /= 4
    seen = f"a step on only the KL term takes it from {before:.3g} to {after:.3g}"
    return Check("kl", after < before, seen, "its sign is wrong")


# ---- used by several
def logprobs(loop: Loop, model: Any, batches: Sequence[MicroBatch]) -> Tensor:
    """[T] float32: the trainer's, of batches that all ranks have. They are rank 0's, so that all see the same."""
    own = _own_logprobs(loop, model, batches)
    return own if loop.ranks.world == 1 else loop.ranks.broadcast(own.cpu(), "logprobs").to(own.device)


@torch.no_grad()
def _own_logprobs(loop: Loop, model: Any, batches: Sequence[MicroBatch]) -> Tensor:
    return torch.cat([logprob(model, batch, loop.config.rollout.request()).logp for batch in batches])


def _reference_logprobs(loop: Loop, batches: Sequence[MicroBatch]) -> Tensor:
    assert loop.state.reference
    with loop.state.reference() as model:
        return logprobs(loop, model, batches)


def _gap(batches: Sequence[MicroBatch], logp: Tensor) -> float:
    sampled = (batch.tokens.sampling_logp for batch in batches)
    engine = [values for values in sampled if values is not None]  # [M] each
    return _mean_change(torch.cat(engine), logp)


def _mean_change(before: Tensor, after: Tensor) -> float:
    return (after - before).abs().mean().item()
