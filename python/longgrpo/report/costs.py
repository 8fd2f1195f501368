"""Where a run's time and memory went, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from longgrpo.report.curves import Curve, drawn
from longgrpo.report.panels import MEASURED, MEMORY, PREDICTED, SECONDS, WITHIN, Chart, Panel, drawn_panel
from longgrpo.report.run import Run

EXPLAINED = {
    "rollout": "the engine reads a step's prompts at their longest: its weights and its whole KV cache",
    "scoring": "logprobs of the longest micro-batch, without a gradient",
    "training": "forward and backward of the longest micro-batch: what backward needs, and the gradients",
}
"""What a phase holds at its peak."""


@dataclass(frozen=True)
class Phases:
    names: list[str]
    means: list[dict[str, float]]
    """Each run's seconds per step, by phase."""
    charts: list[Chart]


def phases_of(runs: Sequence[Run]) -> Phases:
    """The time between the phases is `other`, so a step is the sum."""
    own = dict.fromkeys(name for run in runs for name in run.names if name.startswith(SECONDS) and name not in WITHIN)
    layers = [_layers(run, list(own)) for run in runs]
    return Phases(
        names=[name.removeprefix(SECONDS) for name in own] + ["other"],
        means=[{name: fmean(values) for name, values in of_run.items() if values} for of_run in layers],
        charts=[chart for i, run in enumerate(runs) if (chart := _stacked(i, run, layers[i], len(runs) > 1))],
    )


def _layers(run: Run, phases: Sequence[str]) -> dict[str, list[float]]:
    timed = [record for record in run.metrics.values() if "seconds/step" in record]
    layers = {name.removeprefix(SECONDS): [record.get(name, 0.0) for record in timed] for name in phases}
    sums = [sum(values) for values in zip(*layers.values(), strict=True)] if layers else [0.0] * len(timed)
    rest = [max(record["seconds/step"] - known, 0.0) for record, known in zip(timed, sums, strict=True)]
    return layers | {"other": rest}


def _stacked(i: int, run: Run, layers: dict[str, list[float]], several: bool) -> Chart | None:
    steps = run.series("seconds/step")[0]
    data = drawn([Curve(i, SECONDS + name, name, steps, values) for name, values in layers.items()], kind="layers")
    return Chart(Panel(run.name if several else "Phases", {}, unit="seconds a step"), data) if data else None


@dataclass(frozen=True)
class Memory:
    charts: list[Chart]
    peaks: list[tuple[int, str, float | None, float | None]]
    """Run, phase, predicted and measured bytes."""
    explained: dict[str, str]
    """The phases that are among them."""


def memory_of(runs: Sequence[Run]) -> Memory:
    peaks = []
    for i, run in enumerate(runs):
        phases = dict.fromkeys(
            name.partition("/")[2] for name in run.names if name.startswith((PREDICTED, MEASURED))
        )  # fmt: skip
        peaks += [(i, phase, _highest(run, PREDICTED + phase), _highest(run, MEASURED + phase)) for phase in phases]
    known = {phase for _, phase, _, _ in peaks}
    charts = [chart for panel in MEMORY if (chart := drawn_panel(panel, runs))]
    return Memory(charts, peaks, {phase: text for phase, text in EXPLAINED.items() if phase in known})


def _highest(run: Run, name: str) -> float | None:
    return max((value for value in run.series(name)[1] if value is not None), default=None)
