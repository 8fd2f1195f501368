"""Findings about the completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longgrpo.watch.finding import Finding, Seen, lost
from longgrpo.watch.history import History


@dataclass(frozen=True)
class Truncated(Finding):
    """Completions are cut off at `rollout.max_completion_length`: many of them, or more and more."""

    METRIC: ClassVar[str] = "completion_length/truncated"
    WHY: ClassVar[str] = (
        "A completion that is cut off has no end, and often no answer yet: its reward says where it was cut, not "
        "whether the reply would have been right. The model does not learn to end, because no end is ever rewarded."
    )
    CURE: ClassVar[str] = (
        "Raise rollout.max_completion_length, or ask for shorter replies: in the prompt, by an example, or by a reward "
        "(soft_overlong). train.mask_truncated: true leaves such completions out of the loss. Check that the model "
        "knows its end token (longgrpo selftest)."
    )

    share: float = 0.3
    """Share of the completions. DAPO (arXiv:2503.14476, section 3.4) finds the reward of truncated completions to be
    noise that hurts training; with three in ten, every group of 8 has two of them on average."""
    rise: float = 0.15
    """Rise of the share since the first steps: 8 groups of 8 have a standard error of at most 0.06 a step, 0.03 over 5
    steps."""
    steps: int = 5
    """Steps over which the share is averaged."""

    def see(self, history: History) -> Seen:
        now, start = history.mean(self.METRIC, self.steps), history.start(self.METRIC)
        if now is None or start is None:
            return {}
        if now >= self.share:
            return {"": f"{now:.0%} of the completions are cut off"}
        if now - start >= self.rise:
            return {"": f"{now:.0%} of the completions are cut off, {start:.0%} at the start"}
        return {}


@dataclass(frozen=True)
class LengthDrift(Finding):
    """The completions have become as long as they may be, or nearly empty."""

    METRIC: ClassVar[str] = "completion_length/mean"
    WHY: ClassVar[str] = (
        "The length has run into a bound, and lengths that only follow the reward do not: a loss that favors long or "
        "short completions, or a reward that can be had by length, drives them."
    )
    CURE: ClassVar[str] = (
        "Read the completions in the report. Too long: another loss.loss_type (dr_grpo or dapo do not favor long wrong "
        "replies), a soft_overlong reward, a higher rollout.max_completion_length. Too short: a reward that an empty "
        "reply cannot earn, and a look at what the short ones earn."
    )

    full: float = 0.9
    """Share of `rollout.max_completion_length` that the mean reaches after it began below. Above it a good part of the
    completions is cut off, whatever their distribution."""
    shrunk: float = 0.1
    """Share of the first steps' length that is left. A reply that loses its detours may well become four times
    shorter."""
    empty: float = 1.5
    """Tokens: most completions are then the end token and nothing else."""
    steps: int = 5
    """Steps over which the length is averaged."""

    def see(self, history: History) -> Seen:
        now, start = history.mean(self.METRIC, self.steps), history.start(self.METRIC)
        if now is None or start is None:
            return {}
        longest = self.full * history.facts.max_completion_length
        if start < longest <= now:
            limit = history.facts.max_completion_length
            return {"": f"the completions have grown from {start:.1f} to {now:.1f} of at most {limit} tokens"}
        if now < start and now <= max(self.empty, self.shrunk * start):
            return {"": f"the completions have shrunk from {start:.1f} to {now:.1f} tokens"}
        return {}


@dataclass(frozen=True)
class IdenticalReplies(Finding):
    """The completions of a group are all the same, though not all are right."""

    METRIC: ClassVar[str] = "completions/alike"
    WHY: ClassVar[str] = (
        "A group compares replies to one prompt. If they are equal there is nothing to compare, and what the model "
        "does not try it cannot learn."
    )
    CURE: ClassVar[str] = (
        "Raise rollout.temperature, and take out rollout.sampling's top_k, top_p or min_p. If it has come with "
        "training: a lower train.learning_rate, loss.entropy_coef, a larger loss.epsilon_high, or an earlier "
        "checkpoint."
    )

    left: float = 0.1
    """Share of the completions that differ from the most frequent one of their group, over the share of the reward that
    is still to be earned. Replies that are right may be alike; as long as the wrong ones are spread, the two shares are
    about equal."""
    steps: int = 5
    """Steps over which both are averaged."""

    def see(self, history: History) -> Seen:
        alike = history.mean(self.METRIC, self.steps)
        if alike is None or lost(1 - alike, history, self.steps) >= self.left:
            return {}
        return {"": f"{alike:.0%} of the completions are the most frequent one of their group"}


@dataclass(frozen=True)
class Repetition(Finding):
    """Completions repeat themselves: much of each stood in it before."""

    METRIC: ClassVar[str] = "completions/repetition"
    WHY: ClassVar[str] = (
        "A completion that repeats itself goes on until it is cut off. Repetition reinforces itself, and a reward that "
        "does not see it, or pays for length, feeds it."
    )
    CURE: ClassVar[str] = (
        "Read the completions in the report. Lower rollout.temperature if they are noise, reward the end of a reply, "
        "do not pay for length, and keep the policy near its reference (loss.beta)."
    )

    share: float = 0.6
    """Share of the 4-grams that stood earlier in the same completion. Human text has 0.006 and greedy decoding of a
    language model 0.44 (Welleck et al., arXiv:1908.04319); a long derivation quotes itself, so the bound is above
    both."""
    rise: float = 0.3
    """Rise of the share since the first steps."""
    steps: int = 5
    """Steps over which the share is averaged."""

    def see(self, history: History) -> Seen:
        now, start = history.mean(self.METRIC, self.steps), history.start(self.METRIC)
        if now is None or start is None or (now < self.share and now - start < self.rise):
            return {}
        return {"": f"{now:.0%} of the 4-grams of a completion stood in it before, {start:.0%} at the start"}
