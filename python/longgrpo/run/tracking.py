"""What a run logs while it runs: metrics.jsonl, completions/, lines of progress, TensorBoard and other trackers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Protocol

from longgrpo.config.run import TrainConfig, config_tree
from longgrpo.errors import ConfigError
from longgrpo.run.files import write_file, writing
from longgrpo.run.notebook import LivePlots, in_notebook
from longgrpo.run.terminal import Part, Terminal, fitted
from longgrpo.tasks.sample import Rollout, Sample
from longgrpo.visible import listening, visible

log = logging.getLogger(__name__)

PHASES = {
    "rollout": ("roll_out",),
    "rewards": ("reward",),
    "training": ("score", "loss_and_backward", "optimizer_step"),
}


class Tracker:
    """Writes each step to disk, and shows it in a line."""

    def __init__(self, directory: Path, config: TrainConfig, done: int) -> None:
        """The files already hold `done` steps. Later ones are dropped, because this run will write them again."""
        self._rewards, self._steps = [reward.label for reward in config.rewards], config.train.steps
        self._terminal = Terminal(config.train.steps, done)
        self._metrics = _JsonLines(directory / "metrics.jsonl", done)
        self._completions = _Completions(directory / "completions", config.log.completions, done)
        self._sinks: dict[str, _Sink] = {}
        for name in config.log.to:
            with self._may_fail(name):
                self._sinks[name] = _sink(name, directory, config, done)
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._plots = LivePlots(self._steps) if in_notebook() else None
        self._config = config

    def __enter__(self) -> Tracker:
        self._terminal.start()
        self.say(trained_weights(self._config))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._terminal.stop()
        self._metrics.close()
        self._to_sinks(lambda sink: sink.close())

    def say(self, message: str) -> None:
        self._terminal.say(message)

    def _to_sinks(self, do: Callable[[_Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            with self._may_fail(name):
                do(sink)

    @contextmanager
    def _may_fail(self, name: str) -> Iterator[None]:
        """A tracker that fails is told of and left out: the run goes on."""
        try:
            yield
        except Exception as error:
            self._sinks.pop(name, None)
            self.say(f"warning: log.to: {name} failed ({type(error).__name__}: {error}); the run goes on without it")

    def measured(self, metrics: Mapping[str, Any]) -> None:
        """Writes metrics, `step` among them."""
        self._metrics.write(metrics)
        numbers = {name: value for name, value in metrics.items() if value is not None and name != "step"}
        self._to_sinks(lambda sink: sink.write(metrics["step"], numbers))
        if self._plots:
            with listening():
                self._plots.update(metrics, fitted(self._parts(metrics), None) if "seconds/step" in metrics else "")

    def done(self) -> Iterator[dict[str, Any]]:
        """The metrics of the steps that are done."""
        return (metrics for metrics in self._metrics if metrics["step"] > 0)

    def event(self, step: int, name: str, text: str) -> None:
        """Says something that happened at a step, here and in the trackers that show text."""
        self.say(text)
        self._to_sinks(lambda sink: sink.note(step, name, visible(text)))

    def step(self, metrics: Mapping[str, Any], rollout: Rollout) -> None:
        self._step_seconds.append(metrics["seconds/step"])
        self.measured(metrics)
        kept = self._completions.write(metrics["step"], rollout, self._rewards)
        if kept is not None:
            self._to_sinks(lambda sink: sink.table(metrics["step"], kept))
        if not self._plots:
            step = Part(0, f"step {metrics['step']}/{self._steps}")
            self._terminal.step(metrics["step"], [step, *self._parts(metrics)], self._left(metrics))

    def _left(self, metrics: Mapping[str, Any]) -> timedelta:
        return timedelta(seconds=round(fmean(self._step_seconds) * (self._steps - metrics["step"])))

    def _parts(self, metrics: Mapping[str, Any]) -> list[Part]:
        """Of the line of a step, the most important of them with the lowest ranks."""
        seconds = {name: sum(metrics[f"seconds/{part}"] for part in parts) for name, parts in PHASES.items()}
        phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        tokens = metrics["completion_length/sum"] / metrics["seconds/step"]
        return [
            Part(1, f"reward {_short(metrics['reward/mean'])}"),
            *(Part(5, f"{name} {_short(metrics[f'reward/{name}/mean'])}") for name in self._rewards),
            Part(4, f"length {metrics['completion_length/mean']:.1f}"),
            Part(2, f"{metrics['seconds/step']:.1f} s"),
            Part(7, f"({phases})", " "),
            Part(6, f"{tokens:.0f} tokens/s"),
            Part(3, f"{self._left(metrics)} left"),
        ]


def trained_weights(config: TrainConfig) -> str:
    """Which weights a run trains, and how fast."""
    lora, rate = config.lora, f"learning rate {config.train.rate:g}"
    if lora is None:
        return f"training all weights (the config has no lora group), {rate}"
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    return f"training an adapter of rank {lora.rank} ({targets}), {rate}"


class Quiet(Tracker):
    """Of a rank that neither writes nor talks: rank 0 does, for all."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> Quiet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def say(self, message: str) -> None:
        pass

    def measured(self, metrics: Mapping[str, Any]) -> None:
        pass

    def done(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def event(self, step: int, name: str, text: str) -> None:
        pass

    def step(self, metrics: Mapping[str, Any], rollout: Rollout) -> None:
        pass


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# ---- on disk


class _JsonLines:
    """A file of one JSON object a line, each with the step that it belongs to."""

    def __init__(self, path: Path, keep_until: int) -> None:
        content = path.read_bytes() if path.exists() else b""
        found = list(read_lines(content))
        kept = b"".join(line for line, record in found if record and record["step"] <= keep_until)
        lost = sum(record is None for _, record in found)
        if lost:
            log.warning("%s: %d damaged lines are left out; the steps of the others are kept", path, lost)
        if not content.startswith(kept):
            write_file(path, kept.decode())
        self._path, self._file = path, path.open("a")
        self._file.truncate(len(kept))  # kept lines are never rewritten: a full disk cannot lose them

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._path.open() as file:
            yield from map(json.loads, file)

    def write(self, record: Mapping[str, Any]) -> None:
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # of a full disk, which write() has reported
            self._file.close()


def read_lines(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The whole lines of a metrics.jsonl, each with its record; None for one that is damaged. A line without its end
    is of a step that is being written, or of a process that was killed. A machine that went down may leave zeros."""
    for line in content.splitlines(keepends=True):
        clean = line.strip(b"\0")
        if not clean.endswith(b"\n"):
            continue
        try:
            record = json.loads(clean)
            whole = isinstance(record, dict) and type(record["step"]) is int and 0 <= record["step"] < 2**53
        except (ValueError, KeyError, RecursionError):
            whole = False
        yield clean, record if whole else None


class _Completions:
    """A parquet file per step, completions/step-000001.parquet; pandas and datasets read the folder as one table."""

    def __init__(self, directory: Path, count: int | None, keep_until: int) -> None:
        self._directory, self._count = directory, count
        for step, path in parquet_files(directory).items():
            if step > keep_until:
                path.unlink()

    def write(self, step: int, rollout: Rollout, rewards: Sequence[str]) -> Any:
        """The first `count` samples, or all of them if it is None, each with every reward, the advantage and extra
        columns. rewards: the functions' names. Returns them as a table; None if there are none."""
        from pyarrow.parquet import write_table

        kept = _table(step, rollout, rewards).slice(0, self._count)
        if kept:
            path = self._directory / f"step-{step:06d}.parquet"
            with writing(path):
                self._directory.mkdir(exist_ok=True)
                temporary = path.with_name(f".{path.name}.tmp")
                write_table(kept, temporary)
                os.replace(temporary, path)
        return kept or None


def parquet_files(directory: Path) -> dict[int, Path]:
    """The files of the steps, in order; any other file in the folder is none of a run's."""
    named = ((re.fullmatch(r"step-(\d{6,})\.parquet", path.name), path) for path in directory.glob("*.parquet"))
    return dict(sorted((int(name[1]), path) for name, path in named if name and path.is_file()))


def _table(step: int, rollout: Rollout, rewards: Sequence[str]) -> Any:
    import pyarrow

    samples = rollout.samples
    extra = dict.fromkeys(name for sample in samples for name in sample.extra)
    columns: dict[str, list[Any]] = {
        "step": [step] * len(samples),
        "question": [rollout.problems[sample.group].question for sample in samples],
        "completion": [sample.text for sample in samples],
        "finish_reason": [sample.completion.finish_reason for sample in samples],
        "tokens": [len(sample) for sample in samples],
    }
    for name, values in zip(rewards, rollout.rewards.flatten(1).tolist(), strict=True):
        columns[f"reward/{name}"] = [_known(value) for value in values]
    if any(sample.episode for sample in samples):
        columns |= _conversations(samples)
    columns["advantage"] = rollout.advantages.flatten().tolist()
    columns |= {f"extra/{name}": [sample.extra.get(name) for sample in samples] for name in extra}
    return pyarrow.table({name: _array(values) for name, values in columns.items()})


def _conversations(samples: Sequence[Sample]) -> dict[str, list[str]]:
    """Messages and calls as JSON: their keys differ from row to row."""
    episodes = [sample.episode for sample in samples]
    return {
        "messages": [json.dumps(episode.messages if episode else []) for episode in episodes],
        "calls": [json.dumps([asdict(one) for one in episode.answered] if episode else []) for episode in episodes],
        "failed": [episode.failed if episode else "" for episode in episodes],
    }


def _known(value: float) -> float | None:
    return None if value != value else value  # NaN


def _array(values: list[Any]) -> Any:
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, UnicodeError):  # mixed types, beyond 64 bits, lone surrogates
        texts = (None if value is None else str(value) for value in values)
        return pyarrow.array([text and text.encode("utf-8", "backslashreplace").decode() for text in texts])


# ---- trackers


class _Sink(Protocol):
    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def table(self, step: int, completions: Any) -> None: ...

    def note(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, directory: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def table(self, step: int, completions: Any) -> None:
        """It has no tables: completions/ and longgrpo report show them."""

    def note(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class _Service:
    """wandb or trackio, which have one interface. A resumed run continues in the same one."""

    def __init__(self, name: str, directory: Path, config: TrainConfig) -> None:
        self._module, own = importlib.import_module(name), _run_id(directory)
        # trackio knows a run by its name only.
        named = {"dir": str(directory), "id": own, "name": directory.name} if name == "wandb" else {"name": own}
        self._run = self._module.init(project=config.log.project, config=config_tree(config), resume="allow", **named)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def table(self, step: int, completions: Any) -> None:
        rows = [[visible(value) if isinstance(value, str) else value for value in row.values()]
                for row in completions.to_pylist()]  # fmt: skip
        table = self._module.Table(columns=completions.column_names, data=rows)
        self._run.log({"completions": table}, step=step)

    def note(self, step: int, name: str, text: str) -> None:
        """Their charts have the number of the same name."""

    def close(self) -> None:
        self._run.finish()


def _run_id(directory: Path) -> str:
    """The run's own, kept in RUN/run_id: a directory elsewhere may have the same name."""
    file = directory / "run_id"
    if not file.exists():
        write_file(file, f"{directory.name}-{secrets.token_hex(4)}\n")
    return file.read_text("utf-8").strip()


def check_installed(trackers: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that is not installed."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"log.to names {name}, which is not installed: pip install {name}, or leave it out")


def _sink(name: str, directory: Path, config: TrainConfig, done: int) -> _Sink:
    return _TensorBoard(directory, done) if name == "tensorboard" else _Service(name, directory, config)
