"""What the watch over a run looks for, and with which bounds."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field

from longgrpo.config.check import require
from longgrpo.watch import replies, rewards, updates
from longgrpo.watch.finding import Finding


@dataclass(frozen=True)
class WatchConfig:
    """The watch over a run (docs/healthy-run.md). `NAME: null` leaves a finding out, and `NAME: {BOUND: VALUE}` sets
    its bounds."""

    enabled: bool = True
    """Whether the steps are watched."""
    stop_on: list[str] = field(default_factory=list)
    """Findings at whose beginning the run ends, with a checkpoint. Resumed, it goes on until one begins anew."""

    truncated: replies.Truncated | None = field(default_factory=replies.Truncated)
    length_drift: replies.LengthDrift | None = field(default_factory=replies.LengthDrift)
    identical_replies: replies.IdenticalReplies | None = field(default_factory=replies.IdenticalReplies)
    repetition: replies.Repetition | None = field(default_factory=replies.Repetition)
    no_spread: rewards.NoSpread | None = field(default_factory=rewards.NoSpread)
    constant_reward: rewards.ConstantReward | None = field(default_factory=rewards.ConstantReward)
    unrelated_reward: rewards.UnrelatedReward | None = field(default_factory=rewards.UnrelatedReward)
    held_out_falls: rewards.HeldOutFalls | None = field(default_factory=rewards.HeldOutFalls)
    one_sided_advantages: rewards.OneSidedAdvantages | None = field(default_factory=rewards.OneSidedAdvantages)
    entropy_collapse: updates.EntropyCollapse | None = field(default_factory=updates.EntropyCollapse)
    kl_runaway: updates.KLRunaway | None = field(default_factory=updates.KLRunaway)
    clipped_gradient: updates.ClippedGradient | None = field(default_factory=updates.ClippedGradient)
    clipped_ratio: updates.ClippedRatio | None = field(default_factory=updates.ClippedRatio)
    importance_cut: updates.ImportanceCut | None = field(default_factory=updates.ImportanceCut)
    engine_drift: updates.EngineDrift | None = field(default_factory=updates.EngineDrift)
    zero_learning_rate: updates.ZeroLearningRate | None = field(default_factory=updates.ZeroLearningRate)

    def __post_init__(self) -> None:
        known = [name for name in _names() if getattr(self, name) is not None]
        for name in self.stop_on:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"the findings are {', '.join(known)}"
            require(name in known, f"stop_on names {name!r}, which is not looked for; {remedy}")
        require(self.enabled or not self.stop_on, "stop_on needs the watch: set enabled: true, or leave stop_on out")

    @property
    def findings(self) -> dict[str, Finding]:
        """What is looked for, by name."""
        named = {name: getattr(self, name) for name in _names()}
        return {name: finding for name, finding in named.items() if finding is not None} if self.enabled else {}


def _names() -> list[str]:
    return [f.name for f in dataclasses.fields(WatchConfig) if f.name not in ("enabled", "stop_on")]
