"""Findings about rewards and advantages."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from longgrpo.watch.finding import Finding, Seen, lost
from longgrpo.watch.history import History


@dataclass(frozen=True)
class NoSpread(Finding):
    """In most groups all completions earn the same, though not the most."""

    METRIC: ClassVar[str] = "groups_with_spread"
    WHY: ClassVar[str] = (
        "The advantage is a reward less its group's mean: a group whose rewards are equal has no gradient, and its "
        "completions were sampled for nothing."
    )
    CURE: ClassVar[str] = (
        "Easier problems, or harder ones if most are solved; more rollout.num_generations; a graded reward in place of "
        "right or wrong; train.max_refills, which replaces such groups. Were the groups spread before: see "
        "entropy_collapse and identical_replies."
    )

    left: float = 0.25
    """Share of groups with spread, over the share of the reward that is still to be earned: a group that is solved
    needs no spread. A task that is solved once in 20 has spread in 0.34 of its groups of 8, once in 30 in 0.24."""
    steps: int = 5
    """Steps over which both are averaged."""

    def see(self, history: History) -> Seen:
        spread = history.mean(self.METRIC, self.steps)
        if spread is None or lost(spread, history, self.steps) >= self.left:
            return {}
        return {"": f"only {spread:.0%} of the groups have rewards that differ"}


@dataclass(frozen=True)
class ConstantReward(Finding):
    """A reward function has given the same value to every completion of the last steps, and not its highest."""

    METRIC: ClassVar[str] = "reward/NAME/std"
    WHY: ClassVar[str] = (
        "It teaches nothing: it drops out of every advantage, and what it is meant to reward is not learned. The "
        "reward that rises is then another one."
    )
    CURE: ClassVar[str] = (
        "Read completions in the report and call the function on one that should earn more: is the answer's column the "
        "right one, does the reply's form let it pay at all, is the completion cut off before it can? If no sampled "
        "reply is good enough, take easier problems or grade the reward. If it is always earned, leave it out."
    )

    steps: int = 8
    """Steps in a row. A reward that pays for one completion in a hundred misses 8 steps of 64 completions in 1 of 170
    cases."""

    def see(self, history: History) -> Seen:
        seen = {}
        for name, weight in history.facts.weights.items():
            lowest, highest = (history.last(f"reward/{name}/{end}", self.steps) for end in ("min", "max"))
            if weight != 0 and lowest and min(lowest) == max(highest) and not _is_best(name, lowest[0], history):
                seen[name] = f"{name} has given {lowest[0]:g} to every completion of the last {self.steps} steps"
        return seen


def _is_best(name: str, value: float, history: History) -> bool:
    """Whether a function cannot do better than this constant value. It is its highest: that is known, or the function
    has given less before. Or the function is a penalty, and has never been lower."""
    low, high = history.range(f"reward/{name}")
    if history.facts.weights[name] < 0:
        return value <= low
    if name in history.facts.tops:
        return value >= history.facts.tops[name]
    return low < value == high


@dataclass(frozen=True)
class UnrelatedReward(Finding):
    """A reward function varies, and the sum of all does not follow it."""

    METRIC: ClassVar[str] = "reward/NAME/correlation"
    WHY: ClassVar[str] = (
        "The advantages are made of the sum. A function whose share of it drowns in the others is paid for and not "
        "learned."
    )
    CURE: ClassVar[str] = (
        "Raise its weight, or train.aggregation: normalize_then_sum, which gives each function the same share before "
        "the weights. If it is only meant to be logged: weight: 0."
    )

    correlation: float = 0.1
    """Least correlation, of either sign, with the sum. Of 64 completions with an unrelated function it has a standard
    error of 0.13 a step, 0.045 over 8 steps."""
    steps: int = 8
    """Steps over which the correlation is averaged."""

    def see(self, history: History) -> Seen:
        seen = {}
        for name, weight in history.facts.weights.items():
            known = history.last(f"reward/{name}/correlation", self.steps)
            if weight != 0 and known and abs(fmean(known)) < self.correlation:
                seen[name] = f"{name} has a correlation of {fmean(known):+.2f} with the sum of the rewards"
        return seen


@dataclass(frozen=True)
class HeldOutFalls(Finding):
    """The reward rises while the accuracy on held-out problems falls (with task.eval_steps)."""

    METRIC: ClassVar[str] = "eval/accuracy"
    WHY: ClassVar[str] = (
        "What is rewarded is no longer what is meant: the model exploits the reward, or learns the training problems "
        "by heart."
    )
    CURE: ClassVar[str] = (
        "Go back to the checkpoint with the best accuracy (train.best_metric: eval/accuracy). Read the completions "
        "that earn most; correct the reward; more different training problems; loss.beta, which keeps the policy near "
        "its reference."
    )

    fall: float = 0.1
    """Fall of the accuracy below its best so far, in two evaluations in a row. The standard error of a difference is at
    most 0.06 on 150 problems."""
    rise: float = 0.05
    """Rise of the mean reward since the best accuracy, as a share of the range of all rewards so far."""

    def see(self, history: History) -> Seen:
        if len(history.evaluations) < 3:
            return {}
        *earlier, before, now = history.evaluations
        best, (low, high) = max(earlier, key=lambda evaluated: evaluated.accuracy), history.range("reward")
        fallen, risen = best.accuracy - max(before.accuracy, now.accuracy), now.reward - best.reward
        if fallen < self.fall or risen < self.rise * (high - low):
            return {}
        return {
            "": f"the held-out accuracy has fallen from {best.accuracy:.2f} to {now.accuracy:.2f}, "
            f"and the mean reward has risen from {best.reward:.2f} to {now.reward:.2f}"
        }


@dataclass(frozen=True)
class OneSidedAdvantages(Finding):
    """All advantages of the loss have one sign."""

    METRIC: ClassVar[str] = "advantages/positive"
    WHY: ClassVar[str] = (
        "In each group the advantages add up to 0. If only one sign is left, the loss leaves out the other half of the "
        "comparison: it only praises, and what is praised need not be better, or it only blames, and probability goes "
        "anywhere."
    )
    CURE: ClassVar[str] = (
        "Look for what takes the others out: train.mask_truncated if all bad completions are cut off (raise "
        "rollout.max_completion_length or reward them instead), or an advantage of your own."
    )

    steps: int = 5
    """Steps in a row. By chance a group of 8 does not lose one sign: it has at least one of each."""

    def see(self, history: History) -> Seen:
        shares = history.last(self.METRIC, self.steps)
        for sign, share in (("positive", 1.0), ("negative", 0.0)):
            if shares and min(shares) == max(shares) == share:
                return {"": f"all advantages that are trained on are {sign}"}
        return {}
