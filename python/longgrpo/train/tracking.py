"""What a run tells while it goes: metrics.jsonl, sample completions, a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longgrpo.train.checkpoint import writing
from longgrpo.train.data import Problem
from longgrpo.train.packing import Sample


class Tracker:
    """Writes each step to disk and shows it: on a terminal a bar with a column for each reward, elsewhere a line."""

    def __init__(self, directory: Path, rewards: Sequence[str], steps: int, done: int, completions: int) -> None:
        """`done` steps stand in the files already; lines of later ones, which this run will write again, are dropped.
        `completions` samples of each step are kept."""
        self._rewards, self._steps, self._kept = rewards, steps, completions
        self._metrics = _JsonLines(directory / "metrics.jsonl", done)
        self._completions = _JsonLines(directory / "completions.jsonl", done)
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.fields[status]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("train", total=steps, completed=done, status="")

    def __enter__(self) -> Tracker:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._metrics.close()
        self._completions.close()

    def say(self, message: str) -> None:
        if self._console.is_terminal:
            self._console.print(message, markup=False, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)

    def measured(self, metrics: Mapping[str, Any]) -> None:
        self._metrics.write(metrics)

    def step(self, metrics: Mapping[str, Any], problems: Sequence[Problem], samples: Sequence[Sample]) -> None:
        self._metrics.write(metrics)
        for sample in samples[: self._kept]:
            self._completions.write(
                {"step": metrics["step"], "question": problems[sample.group].question, **_record(sample)}
            )
        status = self._status(metrics)
        self._bar.update(self._task, completed=metrics["step"], status=status)
        if not self._console.is_terminal:
            self.say(f"step {metrics['step']}/{self._steps}  {status}")

    def _status(self, metrics: Mapping[str, Any]) -> str:
        columns = {"reward": "reward/mean", **{name: f"reward/{name}/mean" for name in self._rewards}}
        shown = [f"{name} {_short(metrics[key])}" for name, key in columns.items()]
        shown += [f"length {metrics['completion_length/mean']:.1f}", f"{metrics['seconds/step']:.1f} s"]
        return "  ".join(shown)


class _JsonLines:
    """A file of one JSON object a line, each with the step that it belongs to."""

    def __init__(self, path: Path, keep_until: int) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # a killed process leaves half a line
        kept = [line for line in whole if json.loads(line)["step"] <= keep_until]
        self._path, self._file = path, path.open("a")
        self._file.truncate(sum(map(len, kept)))  # what is kept is never written anew: a full disk cannot lose it

    def write(self, record: Mapping[str, Any]) -> None:
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # of a full disk, which write() has reported
            self._file.close()


def _record(sample: Sample) -> dict[str, Any]:
    return {
        "completion": sample.text,
        "finish_reason": sample.completion.finish_reason,
        "rewards": {
            name: None if value != value else value for name, value in sample.rewards.items()
        },  # NaN is not JSON
        "advantage": sample.advantage,
    }


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
