"""The page: which metrics are in which panel, and the template filled with them.

Everything that a run has written is untrusted, a model's output above all. The template escapes all of it
(autoescape), what cannot be seen is made visible in the whole page, and a content security policy lets the browser run
the page's one script, by its hash, and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from markupsafe import Markup

from longgrpo import __version__
from longgrpo.errors import DataError
from longgrpo.report import charts
from longgrpo.report.charts import Curve, Drawing, Mark
from longgrpo.report.run import MISFITS, Run
from longgrpo.run.files import write_file
from longgrpo.visible import visible
from longgrpo.watch.watch import PREFIX as WATCHED

SIGNATURE = "· longgrpo</title>".encode()  # of page.html
MOST_RUNS = 8  # as many as colors can distinguish
LONGEST_TEXT = 4000  # characters of a completion; a longer one loses its middle
GIB = 2**30


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
        about="not measured if loss.beta is 0; reverse KL: the mean of logp - ref_logp, unbiased",
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
    Panel("Loss", {"loss": "loss"}, about="its value is near 0 by construction; the gradient trains"),
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
PREDICTED, MEASURED = "predicted_bytes/", "measured_bytes/"  # and a phase: a peak of device memory
SECONDS = "seconds/"
# The whole, and what is part of other phases or between them.
WITHIN = tuple(f"{SECONDS}{name}" for name in ("step", "offload_stall", "collectives", "rank_skew"))


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Writes one self-contained HTML file. Raises DataError for more runs than MOST_RUNS, and UserError if the
    file cannot be written, or is there and no report."""
    if path.is_file() and SIGNATURE not in path.read_bytes()[: 1 << 16]:
        raise DataError(f"{path} exists and is no report of longgrpo: name another file, with --output")
    if len(runs) > MOST_RUNS:
        raise DataError(f"{len(runs)} runs: a page compares at most {MOST_RUNS}; name fewer")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("longgrpo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in (number, shortened, gib, percent)}
    environment.policies["json.dumps_function"] = lambda data, **options: json.dumps(_seen(data), **options)
    names = _distinct_names(runs)
    try:
        page = _rendered(environment, runs, names)
    except (*MISFITS, jinja2.TemplateError) as error:
        raise DataError(
            f"{', '.join(names)}: config.yaml, metrics.jsonl or summary.json is not as a run writes it "
            f"({type(error).__name__}: {error})"
        ) from error
    write_file(path, visible(page))


def _rendered(environment: jinja2.Environment, runs: Sequence[Run], names: list[str]) -> str:
    style, script = (Markup(files("longgrpo.report").joinpath(name).read_text()) for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        title=", ".join(names),
        written=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by longgrpo {__version__}",
        names=names,
        facts=[list(_facts(run)) for run in runs],
        findings=[run.findings for run in runs],
        sections=_chart_sections(runs),
        phases=_phases(runs),
        memory=_memory(runs),
        completions=[list(run.completions()) for run in runs],
        config=_side_by_side([_flat(run.config) for run in runs]),
        versions=_side_by_side([(run.summary or {}).get("versions", {}) for run in runs]),
        width=charts.WIDTH,
        height=charts.HEIGHT,
        frame=(charts.LEFT, charts.TOP, charts.WIDTH - charts.RIGHT, charts.HEIGHT - charts.BOTTOM),
    )


# ---- at a glance


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    summary, last = run.summary or {}, max(run.metrics)
    planned = run.config.get("train", {}).get("steps", last)
    yield "steps", f"{last} of {planned}" + ("" if run.summary else ", not finished")
    if "seconds" in summary:
        yield "time", str(timedelta(seconds=round(summary["seconds"])))
    if (reward := _last(run, "reward/mean")) is not None:
        first = next(value for value in run.series("reward/mean")[1] if value is not None)
        yield "reward", f"{number(first)} → {number(reward)}"
    if "eval_after" in summary:
        before = f"{summary['eval_before']:.3f} → " if "eval_before" in summary else ""
        yield "accuracy", f"{before}{summary['eval_after']:.3f} on {summary['eval_n']} held-out problems"
    if "eval_diff_interval" in summary:
        low, high = summary["eval_diff_interval"]
        yield "difference", f"{summary['eval_diff']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    if "eval_prefill" in summary:
        yield "control", f"{summary['eval_prefill']:.3f} untrained, its reply begun for it"
    if (peak := _last(run, "peak_rss_bytes")) is not None:
        yield "peak memory", gib(peak)
    if "engine" in summary:
        yield "engine", summary["engine"]


def _last(run: Run, name: str) -> float | None:
    return next((value for value in reversed(run.series(name)[1]) if value is not None), None)


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return [str(run.directory) if names.count(run.name) > 1 else run.name for run in runs]


# ---- charts


def _chart_sections(runs: Sequence[Run]) -> list[tuple[str, list[tuple[Panel, Drawing]]]]:
    """Each section's title, and its panels that have something to show. Every metric is in some panel."""
    names = list(dict.fromkeys(name for run in runs for name in run.names))
    rewards = [_reward_panel(name) for name in names if name.startswith("reward") and name.endswith("/mean")]
    if related := {name: name.split("/")[1] for name in names if name.endswith("/correlation")}:
        rewards.append(Panel("Correlation with the reward", related, about="of each function's values with the sum"))
    shown = {name for panel in (*rewards, *PANELS, *MEMORY) for name in (*panel.metrics, *(panel.band or ()))}
    shown |= {name for name in names if name.startswith((SECONDS, "reward/", PREDICTED, MEASURED, WATCHED))}
    shown -= {name for name in names if name.startswith("reward") and name.endswith(("/min", "/max"))}
    others = [Panel(name, {name: name}) for name in names if name not in shown]
    sections = {"Rewards": rewards, "Training": PANELS, "Everything else that was logged": others}
    return [(title, found) for title, panels in sections.items() if (found := _drawn(panels, runs))]


def _drawn(panels: Sequence[Panel], runs: Sequence[Run]) -> list[tuple[Panel, Drawing]]:
    drawn = ((panel, charts.curves(list(_curves(panel, runs)), list(_marks(panel, runs)))) for panel in panels)
    return [(panel, drawing) for panel, drawing in drawn if drawing]


def _marks(panel: Panel, runs: Sequence[Run]) -> Iterator[Mark]:
    """Where the watch has found something that this panel shows best."""
    for i, run in enumerate(runs):
        for found in run.findings:
            if found.metric in panel.metrics or found.metric.removesuffix("/std") + "/mean" in panel.metrics:
                yield Mark(i, found.begin, f"step {found.begin}: {found.name} begins")


def _reward_panel(name: str) -> Panel:
    parts = name.split("/")  # reward/mean, or reward/FUNCTION/mean
    if len(parts) == 2:
        return Panel("Reward", {name: "mean"}, about="the weighted sum, mean over the completions of a step")
    return Panel("/".join(parts[1:-1]), {name: "mean"})


def _curves(panel: Panel, runs: Sequence[Run]) -> Iterator[Curve]:
    for i, run in enumerate(runs):
        for j, (name, label) in enumerate(panel.metrics.items()):
            steps, values = run.series(name)
            low, high = [run.series(end)[1] for end in panel.band] if panel.band else ([], [])
            banded = len(low) == len(high) == len(values)
            yield Curve(
                run=i,
                label=label,
                steps=steps,
                values=_scaled(values, panel.scale),
                dashed=j > 0,
                low=low if banded else (),
                high=high if banded else (),
            )


def _scaled(values: charts.Values, scale: float) -> list[float | None]:
    return [None if value is None else value * scale for value in values]


# ---- time and memory


@dataclass(frozen=True)
class Phases:
    names: list[str]
    means: list[dict[str, float]]
    """Each run's seconds per step, by phase."""
    drawings: list[Drawing | None]


def _phases(runs: Sequence[Run]) -> Phases:
    """The time between the phases is `other`, so a step is the sum."""
    own = dict.fromkeys(name for run in runs for name in run.names if name.startswith(SECONDS) and name not in WITHIN)
    layers = [_layers(run, list(own)) for run in runs]
    steps = [run.series("seconds/step")[0] for run in runs]
    return Phases(
        names=[name.removeprefix(SECONDS) for name in own] + ["other"],
        means=[{name: fmean(values) for name, values in of_run.items() if values} for of_run in layers],
        drawings=[charts.stacked(steps[i], layers[i], run=i) if steps[i] else None for i in range(len(runs))],
    )


def _layers(run: Run, phases: Sequence[str]) -> dict[str, list[float]]:
    timed = [record for record in run.metrics.values() if "seconds/step" in record]
    layers = {name.removeprefix(SECONDS): [record.get(name, 0.0) for record in timed] for name in phases}
    sums = [sum(values) for values in zip(*layers.values(), strict=True)] if layers else [0.0] * len(timed)
    rest = [max(record["seconds/step"] - known, 0.0) for record, known in zip(timed, sums, strict=True)]
    return layers | {"other": rest}


@dataclass(frozen=True)
class Memory:
    panels: list[tuple[Panel, Drawing]]
    peaks: list[tuple[int, str, float | None, float | None]]
    """Run, phase, predicted and measured bytes."""


def _memory(runs: Sequence[Run]) -> Memory:
    peaks = []
    for i, run in enumerate(runs):
        phases = dict.fromkeys(
            name.partition("/")[2] for name in run.names if name.startswith((PREDICTED, MEASURED))
        )  # fmt: skip
        peaks += [(i, phase, _highest(run, PREDICTED + phase), _highest(run, MEASURED + phase)) for phase in phases]
    return Memory(_drawn(MEMORY, runs), peaks)


def _highest(run: Run, name: str) -> float | None:
    return max((value for value in run.series(name)[1] if value is not None), default=None)


# ---- tables


def _side_by_side(columns: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Each key with its value in every run, and whether they differ."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, [str(column.get(key, "-")) for column in columns]) for key in keys]
    return [(key, values, len(set(values)) > 1) for key, values in rows]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 5}} -> {"train.steps": 5}; numbers index a list of mappings."""
    if isinstance(tree, dict) and tree:
        pairs = list(tree.items())
    elif isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        pairs = list(enumerate(tree))
    else:
        return {prefix: "null" if tree is None else tree}
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


# ---- as text


def _seen(data: Any) -> Any:
    """Of what the page's script shows: every text in it, made visible before JSON escapes it."""
    if isinstance(data, dict):
        return {key: _seen(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_seen(value) for value in data]
    return visible(data) if isinstance(data, str) else data


def shortened(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def gib(value: float | None) -> str:
    return "-" if value is None else f"{value / GIB:.2f} GiB"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
