"""Which metrics are in which chart, and which have none: what was not measured, and what never changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longgrpo.report.curves import Curve, Mark, Values, drawn
from longgrpo.report.run import Run
from longgrpo.watch.watch import PREFIX as WATCHED

GIB = 2**30
PREDICTED, MEASURED = "predicted_bytes/", "measured_bytes/"  # and a phase: a peak of device memory
SECONDS = "seconds/"
# The whole, the run's clock, and what is part of other phases or between them.
WITHIN = tuple(f"seconds/{name}" for name in ("step", "run", "offload_stall", "collectives", "rank_skew"))


@dataclass(frozen=True)
class Panel:
    """What one chart shows: metrics by their names in metrics.jsonl, each with its label."""

    title: str
    metrics: dict[str, str]
    band: tuple[str, str] | None = None
    """The metrics below and above the first one."""
    unit: str = ""
    scale: float = 1.0
    about: str = ""


PANELS = (
    Panel(
        "KL to the reference",
        {"kl": "as in the loss", "reverse_kl": "reverse KL"},
        unit="nats per token",
        about="reverse KL: the mean of logp - ref_logp, unbiased",
    ),
    Panel("Entropy", {"entropy": "entropy"}, unit="nats per token", about="near 0: all completions are the same"),
    Panel(
        "Completion length",
        {"completion_length/mean": "mean"},
        ("completion_length/min", "completion_length/max"),
        unit="tokens",
        about="band: shortest to longest",
    ),
    Panel("Truncated completions", {"completion_length/truncated": "truncated"}, unit="share of completions"),
    Panel("Turns", {"turns/mean": "mean", "turns/max": "most"}, unit="turns of an episode"),
    Panel("Calls", {"calls/mean": "calls"}, unit="calls of an episode"),
    Panel(
        "Failed calls",
        {"calls/malformed": "malformed", "calls/raised": "raised", "calls/timeout": "too late"}
        | {"calls/failed_episodes": "episodes left out"},
        unit="in a step",
    ),
    Panel("Time of calls", {"calls/seconds": "all calls of a step, one after the other"}, unit="s"),
    Panel("Given tokens", {"turns/given_tokens": "mean"}, unit="tokens of an episode", about="what tools answer"),
    Panel("Prefix reuse", {"turns/prefix_reuse": "share"}, unit="share", about="of what later turns go on from"),
    Panel(
        "Sameness",
        {"completions/alike": "of a group, its most frequent", "completions/repetition": "4-grams said before"},
        unit="share",
    ),
    Panel(
        "Clip share",
        {"clip_low": "below 1 - ε", "clip_high": "above 1 + ε"},
        unit="share of tokens",
        about="0 if a rollout serves one update: the ratio is 1",
    ),
    Panel("Ratio", {"ratio_mean": "mean"}, ("ratio_min", "ratio_max"), about="of the policy to the one that sampled"),
    Panel("Groups with spread", {"groups_with_spread": "share"}, unit="share", about="other groups teach nothing"),
    Panel("Positive advantages", {"advantages/positive": "share"}, unit="share of those that are not 0"),
    Panel("Loss", {"loss": "loss"}, about="near 0 by construction; its gradient trains"),
    Panel("Gradient norm", {"grad_norm": "norm"}, about="before clipping"),
    Panel("Learning rate", {"learning_rate": "rate"}),
    Panel(
        "Engine against trainer",
        {"engine_trainer_logprob_diff_mean": "mean", "engine_trainer_logprob_diff_max": "largest"},
        unit="|Δ logprob|",
        about="of the sampled tokens",
    ),
    Panel(
        "Tokens a second",
        {"tokens_per_second/rollout": "sampled", "tokens_per_second/training": "trained on"},
    ),
)
MEMORY = (
    Panel("Peak memory of the process", {"peak_rss_bytes": "RAM"}, unit="GiB", scale=1 / GIB),
    Panel("Peak memory of the device", {"peak_device_bytes": "device"}, unit="GiB", scale=1 / GIB),
)


@dataclass(frozen=True)
class Chart:
    panel: Panel
    data: dict[str, Any]


@dataclass(frozen=True)
class Charts:
    sections: dict[str, list[Chart]]
    """By title; every metric that changes is in one."""
    flat: list[tuple[str, list[float | None]]]
    """Metrics that say the same at all steps of every run, or were measured once, with each run's value."""
    unmeasured: list[str]
    """Why a chart is not there."""


def charts_of(runs: Sequence[Run]) -> Charts:
    names = list(dict.fromkeys(name for run in runs for name in run.names))
    rewards = _reward_panels(runs, names)
    related = {name: name.split("/")[1] for name in names if name.endswith("/correlation")}
    measured = [Panel("Correlation with the reward", related, about="of each function's values with the sum")]
    measured += [_held_out_panel(name) for name in names if name.startswith("eval/") and f"{name}_low" in names]
    shown = {name for panel in (*rewards, *measured, *PANELS, *MEMORY) for name in _names(panel)}
    shown |= {name for name in names if name.startswith((SECONDS, "reward/", PREDICTED, MEASURED, WATCHED))}
    shown -= {name for name in names if name.startswith("reward") and name.endswith(("/min", "/max"))}
    others = [Panel(name, {name: name}) for name in names if name not in shown]

    charts = Charts({}, [], _unmeasured(runs))
    for panel in rewards:
        _place(charts, "Rewards", panel, runs, keep=True)
    for panel in measured:
        _place(charts, "Rewards", panel, runs)
    for title, panels in {"Training": PANELS, "Everything else that was logged": others}.items():
        for panel in panels:
            _place(charts, title, panel, runs)
    return charts


def drawn_panel(panel: Panel, runs: Sequence[Run]) -> Chart | None:
    data = drawn(_curves(panel, runs), list(_marks(panel, runs)))
    return Chart(panel, data) if data else None


def _place(charts: Charts, title: str, panel: Panel, runs: Sequence[Run], keep: bool = False) -> None:
    """In its section; a panel in which nothing changes becomes a line of `flat`, unless the watch has a mark in it."""
    curves = _curves(panel, runs)
    once = all(len(curve.steps) == 1 for curve in curves) and any(run.last > 1 for run in runs)
    still = once or all(curve.flat for curve in curves)
    if curves and still and not keep and not any(_marks(panel, runs)):
        for name in _names(panel):
            charts.flat.append((name, [next(iter(run.series(name)[1]), None) for run in runs]))
    elif chart := drawn_panel(panel, runs):
        charts.sections.setdefault(title, []).append(chart)


def _names(panel: Panel) -> tuple[str, ...]:
    return (*panel.metrics, *(panel.band or ()))


def _unmeasured(runs: Sequence[Run]) -> list[str]:
    return [] if any(run.measures_kl for run in runs) else ["KL to the reference (loss.beta is 0)"]


def _marks(panel: Panel, runs: Sequence[Run]) -> Iterator[Mark]:
    """Where the watch has found something that this panel shows best."""
    for i, run in enumerate(runs):
        for found in run.findings:
            if found.metric in panel.metrics or found.metric.removesuffix("/std") + "/mean" in panel.metrics:
                yield Mark(i, found.begin, f"step {found.begin}: {found.name} begins")


def _reward_panels(runs: Sequence[Run], names: Sequence[str]) -> list[Panel]:
    """The total's, and each function's unless it is the only one and the total says the same."""
    means = [name for name in names if name.startswith("reward/") and name.endswith("/mean")]
    functions = {name: name[len("reward/") : -len("/mean")] for name in means if name != "reward/mean"}
    about, total = "the weighted sum, mean over the completions of a step", [run.series("reward/mean") for run in runs]
    if len(functions) == 1 and [run.series(next(iter(functions))) for run in runs] == total:
        about, functions = f"{next(iter(functions.values()))}, mean over the completions of a step", {}
    panels = [Panel("Reward", {"reward/mean": "mean"}, about=about)] if "reward/mean" in means else []
    return panels + [Panel(function, {name: "mean"}) for name, function in functions.items()]


def _held_out_panel(name: str) -> Panel:
    parts = name.split("/")  # eval/accuracy, or eval/SET/accuracy
    title = f"Held-out {parts[-1].replace('_', ' ')}" + (f", {parts[1]}" if len(parts) > 2 else "")
    return Panel(title, {name: parts[-1]}, (f"{name}_low", f"{name}_high"), about="band: the 95 % interval")


def _curves(panel: Panel, runs: Sequence[Run]) -> list[Curve]:
    return [
        _curve(i, run, name, label, panel)
        for i, run in enumerate(runs)
        for name, label in panel.metrics.items()
        if name in run.names and (name != "kl" or run.measures_kl)
    ]


def _curve(i: int, run: Run, name: str, label: str, panel: Panel) -> Curve:
    steps, values = run.series(name)
    first = name == next(iter(panel.metrics))
    low, high = [run.series(end)[1] for end in panel.band] if panel.band and first else ([], [])
    banded = len(low) == len(high) == len(values)
    band = (_scaled(low, panel.scale), _scaled(high, panel.scale)) if banded else ((), ())
    return Curve(i, name, label, steps, _scaled(values, panel.scale), *band)


def _scaled(values: Values, scale: float) -> list[float | None]:
    return [None if value is None else value * scale for value in values]
