"""Findings about the policy, its updates, and the engine that samples from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longgrpo.watch.finding import Finding, Seen, lost
from longgrpo.watch.history import History


@dataclass(frozen=True)
class EntropyCollapse(Finding):
    """The policy has become certain before it is right."""

    METRIC: ClassVar[str] = "entropy"
    WHY: ClassVar[str] = (
        "With the entropy goes exploration: the completions of a prompt become equal, groups lose their spread, and "
        "the reward stays where it is."
    )
    CURE: ClassVar[str] = (
        "A lower train.learning_rate; a larger loss.epsilon_high (0.28 in DAPO); loss.entropy_coef; loss.beta; a "
        "higher rollout.temperature. An earlier checkpoint has what is lost; this policy does not sample it any more."
    )

    left: float = 0.1
    """Share of the first steps' entropy, over the share of the reward that is still to be earned. Without a remedy the
    entropy of a policy is used up early, and the reward with it (arXiv:2505.22617); entropy that is lost because
    replies are right falls no faster than what is left to earn."""
    steps: int = 5
    """Steps over which both are averaged."""

    def see(self, history: History) -> Seen:
        now, start = history.mean(self.METRIC, self.steps), history.start(self.METRIC)
        if now is None or not start or lost(now / start, history, self.steps) >= self.left:
            return {}
        return {"": f"the entropy has fallen from {start:.3g} to {now:.3g} nats a token"}


@dataclass(frozen=True)
class KLRunaway(Finding):
    """The policy is far from its reference (with loss.beta)."""

    METRIC: ClassVar[str] = "reverse_kl"
    WHY: ClassVar[str] = (
        "Far from the reference a reward is exploited more often than learned, and the language itself degrades."
    )
    CURE: ClassVar[str] = (
        "A lower train.learning_rate, a larger loss.beta, or a reference that follows the policy "
        "(train.reference_sync_steps). If the reward still means what it should, raise the bound."
    )

    nats: float = 1.0
    """Nats a token: each token is e times as likely as under the reference. A reply of some ten tokens then has a KL of
    tens of nats, where a reward model's own score and the true one part (Gao et al., arXiv:2210.10760)."""
    steps: int = 5
    """Steps over which the KL is averaged."""

    def see(self, history: History) -> Seen:
        now = history.mean(self.METRIC, self.steps)
        if now is None:  # an exact KL has no scored reference
            now = history.mean("kl", self.steps)
        return (
            {"": f"the KL to the reference is {now:.3g} nats a token"} if now is not None and now >= self.nats else {}
        )


@dataclass(frozen=True)
class ClippedGradient(Finding):
    """At every step the gradient is many times longer than train.max_grad_norm."""

    METRIC: ClassVar[str] = "grad_norm"
    WHY: ClassVar[str] = (
        "Clipping is meant for the odd step. If it scales down every gradient, all steps have the same length, however "
        "sure or unsure their direction is; a norm that large is also the first sign of a run that diverges."
    )
    CURE: ClassVar[str] = (
        "If the norm has risen: a lower train.learning_rate, an earlier checkpoint. If it was so from the start and "
        "the reward rises: a train.max_grad_norm of about the usual norm, .inf for no clipping."
    )

    factor: float = 10.0
    """Norm over train.max_grad_norm. AdamW hardly sees a gradient that is scaled by a constant; by 10 and more it is no
    rare outlier's."""
    steps: int = 5
    """Steps in a row."""

    def see(self, history: History) -> Seen:
        norms = history.last(self.METRIC, self.steps)
        limit = history.facts.max_grad_norm
        if not norms or min(norms) <= self.factor * limit:
            return {}
        return {"": f"the gradient's norm was at least {min(norms):.3g} at each step, and is clipped to {limit:g}"}


@dataclass(frozen=True)
class ClippedRatio(Finding):
    """Many tokens of an update are beyond loss.epsilon and train nothing."""

    METRIC: ClassVar[str] = "clip_high"
    WHY: ClassVar[str] = (
        "A token whose ratio is clipped has no gradient. Many of them mean that the updates of one rollout have moved "
        "the policy further than the loss allows for."
    )
    CURE: ClassVar[str] = (
        "A lower train.learning_rate, fewer train.num_iterations or train.minibatches, or a larger loss.epsilon and "
        "epsilon_high."
    )

    share: float = 0.3
    """Share of the tokens, on either side. With three tokens in ten the clip is no longer a guard against outliers, as
    PPO means it (arXiv:1707.06347), and decides what is learned."""
    steps: int = 5
    """Steps over which the share is averaged."""

    def see(self, history: History) -> Seen:
        low, high = (history.mean(name, self.steps) for name in ("clip_low", "clip_high"))
        if low is None or high is None or low + high < self.share:
            return {}
        return {"": f"{low + high:.0%} of the tokens have a ratio that is clipped"}


@dataclass(frozen=True)
class ImportanceCut(Finding):
    """For many tokens the ratio of trainer to engine is beyond rollout.importance_cap."""

    METRIC: ClassVar[str] = "importance_cut"
    WHY: ClassVar[str] = (
        "The engine samples from another distribution than the trainer trains. Cutting the ratio bounds the harm and "
        "biases the gradient."
    )
    CURE: ClassVar[str] = (
        "Look at engine_trainer_logprob_diff_mean: a wider model.dtype, rollout.kv_cache_dtype: auto, sampling fields "
        "that the trainer can compute. Of an engine that is exact, a lower learning rate or fewer updates a rollout."
    )

    share: float = 0.05
    """Share of the tokens. With equal weights in bfloat16 a ratio of 2 is a rare outlier's (importance_cut of this
    project's runs: 0)."""
    steps: int = 5
    """Steps over which the share is averaged."""

    def see(self, history: History) -> Seen:
        now = history.mean(self.METRIC, self.steps)
        return {"": f"{now:.0%} of the ratios of trainer to engine are cut"} if now and now >= self.share else {}


@dataclass(frozen=True)
class EngineDrift(Finding):
    """Engine and trainer give the sampled tokens different logprobs, and the difference grows or is large."""

    METRIC: ClassVar[str] = "engine_trainer_logprob_diff_mean"
    WHY: ClassVar[str] = (
        "The gradient is of the trainer's policy and the samples are the engine's. Beyond rounding, the two are "
        "different models, and training is off-policy without saying so."
    )
    CURE: ClassVar[str] = (
        "A wider model.dtype, rollout.kv_cache_dtype: auto; rollout.importance: sequence_mask. Run python -m "
        "longgrpo.doctor and longgrpo selftest: a fault of the engine shows there."
    )

    nats: float = 0.1
    """Mean difference: tokens are then 10 % more or less likely than the engine says."""
    factor: float = 10.0
    """Growth since the first steps. Rounding grows with the logits, a few times and not ten."""
    least: float = 1e-3
    """Mean difference below which growth does not count: float32 has about 1e-5."""
    steps: int = 5
    """Steps over which the difference is averaged."""

    def see(self, history: History) -> Seen:
        now, start = history.mean(self.METRIC, self.steps), history.start(self.METRIC)
        if now is None or start is None or now < min(self.nats, max(self.least, self.factor * start)):
            return {}
        return {"": f"engine and trainer differ by {now:.2g} nats a token, by {start:.2g} at the start"}


@dataclass(frozen=True)
class ZeroLearningRate(Finding):
    """The learning rate is 0."""

    METRIC: ClassVar[str] = "learning_rate"
    WHY: ClassVar[str] = "No weight moves: every step costs what a step costs and changes nothing."
    CURE: ClassVar[str] = (
        "Set train.learning_rate: about 1e-6 for full fine-tuning, ten times or more of it for LoRA; and look at "
        "train.schedule."
    )

    least: float = 1e-14
    """AdamW moves a weight by about the rate. float32 keeps 7 digits, so that a weight of 1e-7, small even for an
    adapter, does not move; the last steps of a cosine of 10,000 have more, from 1e-6 on."""
    steps: int = 5
    """Steps in a row."""

    def see(self, history: History) -> Seen:
        rates = history.last(self.METRIC, self.steps)
        return {"": f"the learning rate is {rates[-1]:g}"} if rates and max(rates) <= self.least else {}
