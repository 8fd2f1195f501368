"""The completions that a run has saved, RUN/completions/step-000001.parquet (longgrpo.run.tracking), for the page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from longgrpo.errors import DataError
from longgrpo.report.packed import by_halves, packed, shared_beginning, shortened
from longgrpo.report.run import MISFITS, Run
from longgrpo.run.tracking import parquet_files
from longgrpo.train.advantages import weighted_sum


@dataclass(frozen=True)
class PackedStep:
    step: int
    text: str
    """See packed(): {"shared": the beginning of all prompts, "rows": [completion, ...]}."""


@dataclass(frozen=True)
class Completions:
    """Of one run."""

    saved: int
    """Steps whose completions were saved."""
    steps: list[PackedStep]
    """Those that are on the page, in order."""


def completions_of(run: Run, room: int) -> Completions:
    """Every completion of the steps that fit in `room` characters; if not all do, of steps spread over the run, the
    last one among them."""
    files = parquet_files(run.directory / "completions")
    steps, weights = list(files), tuple(run.weights.items()) if files else ()
    size = run.config.get("rollout", {}).get("num_generations")
    kept: list[PackedStep] = []
    for i in by_halves(len(steps)):
        path = files[steps[i]]
        text = _packed_file(path, _stamp(path), weights, size)
        if len(text) > room and kept:
            break
        room -= len(text)
        kept.append(PackedStep(steps[i], text))
    return Completions(len(steps), sorted(kept, key=lambda one: one.step))


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size


@lru_cache(maxsize=4096)
def _packed_file(path: Path, stamp: tuple[int, int], weights: tuple[tuple[str, float], ...], size: int | None) -> str:
    """Kept, for a page that is written again and again. stamp: changes with the file. size: of a group."""
    rows = _read_table(path)
    try:
        totals = _totals(rows, dict(weights))
        shared = shared_beginning([str(row["question"]) for row in rows])
        sampled = [_sampled(row, total, len(shared)) for row, total in zip(rows, totals, strict=True)]
        for i, one in enumerate(sampled):
            one["group"] = i // size + 1 if size else 1
        return packed({"shared": shared, "rows": sampled})
    except MISFITS as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error


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


def _unreadable(path: Path, what: object) -> DataError:
    return DataError(f"{path}: cannot be read ({what}); remove the file to leave its step out")


def _totals(rows: Sequence[Mapping[str, Any]], all_weights: Mapping[str, float]) -> list[float | None]:
    """The weighted sum of each row's rewards; None if no function applied."""
    weights = {name: weight for name, weight in all_weights.items() if f"reward/{name}" in rows[0]}
    if not weights:
        return [None] * len(rows)
    values = [[_or_nan(row[f"reward/{name}"]) for row in rows] for name in weights]
    table = torch.tensor(values, dtype=torch.float64).unsqueeze(1)  # [F, 1, N]
    totals = weighted_sum(table, torch.tensor(list(weights.values()), dtype=torch.float64))[0].tolist()
    return [_finite(total) for total in totals]


def _sampled(row: Mapping[str, Any], total: float | None, shared: int) -> dict[str, Any]:
    """A completion for the page. shared: length of the prompt's beginning that is told once."""

    def under(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}

    return {
        "question": shortened(str(row["question"])[shared:]),
        "text": shortened(str(row["completion"])),
        "tokens": int(row["tokens"]),
        "cut": row["finish_reason"] == "length",
        "rewards": {name: _finite(value) for name, value in under("reward/").items()},
        "total": total,
        "advantage": _finite(row["advantage"]),
        "extra": {name: shortened(str(value)) for name, value in under("extra/").items()},
        "talk": _talk(json.loads(row.get("messages") or "[]"), json.loads(row.get("calls") or "[]")),
        "failed": shortened(row.get("failed") or ""),
    }


def _talk(messages: list[dict[str, Any]], calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of an episode its messages, each with the calls that an assistant's turn asked for: what, how long, and how it
    failed."""
    said: list[dict[str, Any]] = []
    turn = 0
    for message in messages:
        own = []
        if message["role"] == "assistant":
            own = [shortened(_called(call)) for call in calls if call["turn"] == turn]
            turn += 1
        text = shortened(str(message.get("content") or ""))
        said.append({"role": shortened(str(message["role"])), "text": text, "calls": own})
    return said


def _called(call: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in call["arguments"].items())
    return f"{call['name']}({arguments}) {call['seconds']:.3g} s{call['failure'] and ', ' + call['failure']}"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
