"""A run's steps, logged and watched: what begins or ends at a step is told where its metrics are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longgrpo.config.run import TrainConfig
from longgrpo.run.tracking import Tracker
from longgrpo.tasks.builtin_rewards import HIGHEST
from longgrpo.tasks.sample import Rollout
from longgrpo.watch import Facts, Watch


class Watched:
    """Hands each step to the tracker with what the watch sees in it."""

    def __init__(self, config: TrainConfig, tracker: Tracker) -> None:
        """The steps that the tracker already has are shown to the watch, so that it goes on where it was."""
        self._tracker, self._stop_on = tracker, config.watch.stop_on
        self._watch = Watch(config.watch.findings, facts_of(config))
        for metrics in tracker.done():
            self._watch.observe(metrics)
        self.ending = ""
        """Why the run ends after this step, by watch.stop_on; empty if it goes on."""

    @property
    def standing(self) -> list[str]:
        """The names of the findings that have begun and not ended."""
        return self._watch.standing

    def step(self, metrics: Mapping[str, Any], rollout: Rollout) -> None:
        events = self._watch.observe(metrics)
        self._tracker.step({**metrics, **{event.metric: float(event.begins) for event in events}}, rollout)
        for event in events:
            self._tracker.event(event.step, event.metric, str(event))
        begun = {event.name: str(event) for event in events if event.begins and event.name in self._stop_on}
        self.ending = "\n".join([*begun.values(), f"watch.stop_on names {', '.join(begun)}"] if begun else [])


def facts_of(config: TrainConfig) -> Facts:
    """What the watch has to know of a run besides its metrics."""
    return Facts(
        max_completion_length=config.rollout.max_completion_length,
        max_grad_norm=config.train.max_grad_norm,
        weights={reward.label: reward.weight for reward in config.rewards},
        tops={reward.label: HIGHEST[reward.function] for reward in config.rewards if reward.function in HIGHEST},
    )
