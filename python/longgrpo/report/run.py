"""A run, read from its directory: config.yaml, metrics.jsonl, summary.json (longgrpo.run.tracking)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from longgrpo.config.document import read_yaml
from longgrpo.config.task import RewardConfig
from longgrpo.config.watch import WatchConfig
from longgrpo.errors import DataError, UserError
from longgrpo.run.files import read_json
from longgrpo.run.started import starts_of
from longgrpo.run.tracking import read_lines
from longgrpo.watch.finding import Finding
from longgrpo.watch.watch import PREFIX, Event

MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""What is raised by data that is not as a run writes it."""
KNOWN = WatchConfig().findings


@dataclass(frozen=True)
class Found:
    """What the watch has found in a run, from one step to another."""

    name: str
    subject: str
    """The reward function that it is about, or ""."""
    begin: int
    end: int | None
    """None: it stands at the last step."""
    finding: Finding | None
    """Its metric, explanation and cure; None for one that this version does not know."""

    @property
    def metric(self) -> str:
        return self.finding.METRIC.replace("NAME", self.subject) if self.finding else ""


@dataclass(frozen=True)
class Run:
    name: str
    directory: Path
    config: dict[str, Any]
    metrics: dict[int, dict[str, Any]]
    """Metrics by step, in order. Step 0 is the evaluation before the first."""
    summary: dict[str, Any] | None
    """None until the run has ended."""
    starts: list[dict[str, Any]]
    """Of each process that worked on it: when, at which step, by which command, where."""

    @cached_property
    def names(self) -> list[str]:
        """Every metric that is a number at some step, in the order in which they were first written."""
        found = (name for record in self.metrics.values() for name, value in record.items() if _is_number(value))
        return [name for name in dict.fromkeys(found) if name not in ("step", "epoch")]

    def series(self, name: str) -> tuple[list[int], list[float | None]]:
        """The steps that have the metric, and its values there; None for one that is not finite."""
        having = {step: record[name] for step, record in self.metrics.items() if name in record}
        return list(having), [value if _is_finite(value) else None for value in having.values()]

    @property
    def findings(self) -> list[Found]:
        """In the order in which they began."""
        found: list[Found] = []
        for metric in filter(lambda name: name.startswith(PREFIX), self.names):
            steps, begins = self.series(metric)
            for i, begin in enumerate(steps):
                if begins[i]:
                    event = Event.named(metric, begin, begins=True)
                    end = steps[i + 1] if i + 1 < len(steps) else None
                    found.append(Found(event.name, event.subject, begin, end, KNOWN.get(event.name)))
        return sorted(found, key=lambda one: one.begin)

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the reward functions, by their names in the logs."""
        rewards = self.config.get("rewards", [])
        keys = ("function", "model", "name")
        labels = [RewardConfig(**{key: reward.get(key) for key in keys}).label for reward in rewards]
        return {label: float(reward.get("weight", 1.0)) for label, reward in zip(labels, rewards, strict=True)}

    @cached_property
    def measures_kl(self) -> bool:
        """Whether `kl` is more than the 0 of a loss that has no such term."""
        return bool((self.config.get("loss") or {}).get("beta")) or any(self.series("kl")[1])

    @cached_property
    def clock(self) -> dict[int, float]:
        """Seconds from the run's beginning to the end of each step; of a run that has logged no clock, those of its
        steps, one after the other."""
        seconds, clock = 0.0, {}
        for step, record in self.metrics.items():
            if _is_finite(record.get("seconds/run")):
                seconds = float(record["seconds/run"])
            elif _is_finite(record.get("seconds/step")):
                seconds += float(record["seconds/step"])
            clock[step] = seconds
        return clock

    @property
    def last(self) -> int:
        """The newest step."""
        return max(self.metrics)

    @property
    def planned(self) -> int:
        """train.steps."""
        return int(self.config.get("train", {}).get("steps", self.last))

    @property
    def has_clock(self) -> bool:
        return "seconds/run" in self.names

    def settings(self) -> dict[str, Any]:
        """Its config but for the seed and the place: what the seeds of one experiment have in common."""
        train = {key: value for key, value in self.config.get("train", {}).items() if key != "seed"}
        return self.config | {"train": train, "output_dir": None}


def read_run(directory: Path) -> Run:
    """Reads a run, finished or not. Raises DataError if the directory holds no run, or one without a step."""
    if not (directory / "config.yaml").is_file():
        raise DataError(f"{directory}: holds no run (no config.yaml is in it)")
    metrics = _read_metrics(directory / "metrics.jsonl")
    if not metrics:
        raise DataError(f"{directory}: has no step yet (metrics.jsonl is missing or empty); try again after its first")
    config, starts = _read_config(directory / "config.yaml")
    return Run(
        name=directory.resolve().name,
        directory=directory,
        config=config,
        metrics=metrics,
        summary=_read_summary(directory / "summary.json", max(metrics)),
        starts=starts,
    )


def _read_config(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The tree, and not the config: of a run of another version as well; and the run's starts."""
    try:
        text = path.read_text("utf-8")
        config = read_yaml(text)
        if not isinstance(config, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read ({error}); without it there is no report") from error
    return config, starts_of(text)


def _read_summary(path: Path, last: int) -> dict[str, Any] | None:
    """None if there is none, or it is of an end with other steps than are in the metrics."""
    if not path.is_file():
        return None
    remedy = "remove it: the report then shows the run as not finished"
    try:
        summary = read_json(path, remedy)
    except UserError as error:
        raise DataError(str(error)) from error
    if not isinstance(summary, dict):
        raise DataError(f"{path}: is not the summary of a run; {remedy}")
    return summary if summary.get("steps", last) == last else None


def _read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    metrics: dict[int, dict[str, Any]] = {}
    for number, (_, record) in enumerate(read_lines(content), 1):
        if record is None:
            raise DataError(f"{path}:{number}: is not a step's metrics; remove the line")
        metrics.setdefault(record["step"], {}).update(record)
    return dict(sorted(metrics.items()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and abs(value) < 1e300  # so that the difference of two is finite as well
