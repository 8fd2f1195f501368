"""The watch over a run: after each step, which findings begin and which have ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longgrpo.watch.finding import Finding
from longgrpo.watch.history import Facts, History

ENDS_AFTER = 5  # steps in a row without it: what is seen at every other step has not ended
PREFIX = "watch/"


@dataclass(frozen=True)
class Event:
    """A finding begins or has ended."""

    step: int
    name: str
    subject: str
    """The reward function that it is about, or ""."""
    begins: bool
    text: str

    @property
    def metric(self) -> str:
        """Its name in metrics.jsonl and in the trackers: 1 where it begins, 0 where it ends."""
        return PREFIX + (f"{self.name}/{self.subject}" if self.subject else self.name)

    @classmethod
    def named(cls, metric: str, step: int, begins: bool) -> Event:
        """The event, without its text, that stands in metrics.jsonl under this name."""
        name, _, subject = metric.removeprefix(PREFIX).partition("/")
        return cls(step, name, subject, begins, "")

    def __str__(self) -> str:
        return f"watch, step {self.step}: {self.name}: {self.text}"


class Watch:
    """The findings that stand, from the metrics of one step after the other: whoever shows it the same rows gets the
    same events, so that a resumed run goes on where it was."""

    def __init__(self, findings: Mapping[str, Finding], facts: Facts) -> None:
        self.findings = findings
        self.history = History(facts)
        self._standing: dict[tuple[str, str], int] = {}  # steps in a row that it has not been seen

    @property
    def standing(self) -> list[str]:
        """The names of the findings that have begun and not ended."""
        return list(dict.fromkeys(name for name, _ in self._standing))

    def observe(self, metrics: Mapping[str, Any]) -> list[Event]:
        """The metrics of the next step; `step` is among them."""
        self.history.add(metrics)
        events: list[Event] = []
        for name, finding in self.findings.items():
            events += self._compare(metrics["step"], name, finding, finding.see(self.history))
        return events

    def _compare(self, step: int, name: str, finding: Finding, seen: Mapping[str, str]) -> list[Event]:
        events = []
        for subject, text in seen.items():
            if (name, subject) not in self._standing:
                events.append(Event(step, name, subject, True, f"{text}. {finding.WHY} {finding.CURE}"))
            self._standing[name, subject] = 0
        for key in [key for key in self._standing if key[0] == name and key[1] not in seen]:
            self._standing[key] += 1
            if self._standing[key] == ENDS_AFTER:
                del self._standing[key]
                events.append(Event(step, name, key[1], False, f"has ended{f' ({key[1]})' if key[1] else ''}"))
        return events
