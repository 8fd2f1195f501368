"""A run, read from its directory: config.yaml, metrics.jsonl, completions/, summary.json (longgrpo.run.tracking)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from longgrpo.config.document import read_yaml
from longgrpo.config.task import RewardConfig
from longgrpo.config.watch import WatchConfig
from longgrpo.errors import DataError, UserError
from longgrpo.run.files import read_json
from longgrpo.run.tracking import parquet_files, read_lines
from longgrpo.train.advantages import weighted_sum
from longgrpo.watch.finding import Finding
from longgrpo.watch.watch import PREFIX, Event

MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""What is raised by data that is not as a run writes it."""
KNOWN = WatchConfig().findings
SHOWN_STEPS = 12  # of a run's completions
SHOWN_EACH = 3  # best ones of a step, and worst ones


@dataclass(frozen=True)
class Said:
    """A message of an episode."""

    role: str
    text: str
    calls: list[str]
    """The calls or the reply that an assistant's turn asked for: what, how long, and how it failed."""


@dataclass(frozen=True)
class Sampled:
    """A completion as it was saved. A model wrote the texts: escape them."""

    question: str
    text: str
    tokens: int
    finish_reason: str
    rewards: dict[str, float | None]
    total: float | None
    """The weighted sum of the rewards; None if no function applied."""
    advantage: float
    extra: dict[str, Any]
    talk: list[Said]
    """Of an episode its messages; else empty."""
    failed: str
    """Why the episode is in no group, or ""."""


@dataclass(frozen=True)
class SampledStep:
    step: int
    count: int
    """Number of the step's completions that were saved."""
    best: list[Sampled]
    worst: list[Sampled]


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

    def completions(self) -> Iterator[SampledStep]:
        """The best and the worst completions of some steps, evenly spaced, the last one among them."""
        files = parquet_files(self.directory / "completions")
        for step in _spaced(list(files), SHOWN_STEPS):
            rows = _read_table(files[step])
            try:
                ranked = sorted(map(_sampled, rows, self._totals(rows)), key=_worth, reverse=True)
            except MISFITS as error:
                raise _unreadable(files[step], f"{type(error).__name__}: {error}") from error
            rest = ranked[SHOWN_EACH:]
            yield SampledStep(step, len(rows), ranked[:SHOWN_EACH], rest[-SHOWN_EACH:][::-1])

    def _totals(self, rows: list[dict[str, Any]]) -> list[float | None]:
        weights = {name: weight for name, weight in self.weights.items() if f"reward/{name}" in rows[0]}
        if not weights:
            return [None] * len(rows)
        values = [[_or_nan(row[f"reward/{name}"]) for row in rows] for name in weights]
        table = torch.tensor(values, dtype=torch.float64).unsqueeze(1)  # [F, 1, N]
        totals = weighted_sum(table, torch.tensor(list(weights.values()), dtype=torch.float64))[0].tolist()
        return [None if math.isnan(total) else total for total in totals]


def read_run(directory: Path) -> Run:
    """Reads a run, finished or not. Raises DataError if the directory holds no run, or one without a step."""
    if not (directory / "config.yaml").is_file():
        raise DataError(f"{directory}: holds no run (no config.yaml is in it)")
    metrics = _read_metrics(directory / "metrics.jsonl")
    if not metrics:
        raise DataError(f"{directory}: has no step yet (metrics.jsonl is missing or empty); try again after its first")
    return Run(
        name=directory.resolve().name,
        directory=directory,
        config=_read_config(directory / "config.yaml"),
        metrics=metrics,
        summary=_read_summary(directory / "summary.json", max(metrics)),
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The tree, and not the config: of a run of another version as well."""
    try:
        config = read_yaml(path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read ({error}); without it there is no report") from error
    return config


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


def _unreadable(path: Path, what: object) -> DataError:
    return DataError(f"{path}: cannot be read ({what}); remove the file to leave its step out")


def _read_table(path: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows: list[dict[str, Any]] = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    if not rows:
        raise _unreadable(path, "it has no rows")
    return rows


def _sampled(row: Mapping[str, Any], total: float | None) -> Sampled:
    def under(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}

    return Sampled(
        question=row["question"],
        text=row["completion"],
        tokens=row["tokens"],
        finish_reason=row["finish_reason"],
        rewards=under("reward/"),
        total=total,
        advantage=row["advantage"],
        extra=under("extra/"),
        talk=_talk(json.loads(row.get("messages") or "[]"), json.loads(row.get("calls") or "[]")),
        failed=row.get("failed") or "",
    )


def _talk(messages: list[dict[str, Any]], calls: list[dict[str, Any]]) -> list[Said]:
    said: list[Said] = []
    turn = 0
    for message in messages:
        own = []
        if message["role"] == "assistant":
            own = [_called(call) for call in calls if call["turn"] == turn]
            turn += 1
        said.append(Said(str(message["role"]), str(message.get("content") or ""), own))
    return said


def _called(call: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in call["arguments"].items())
    return f"{call['name']}({arguments}) {call['seconds']:.3g} s{call['failure'] and ', ' + call['failure']}"


def _worth(sampled: Sampled) -> float:
    return -math.inf if sampled.total is None else sampled.total


def _spaced(steps: list[int], count: int) -> list[int]:
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and abs(value) < 1e300  # so that the difference of two is finite as well
