"""The page: the template filled with what the runs have left.

Everything that a run has written is untrusted, a model's output above all. The template escapes all of it
(autoescape), the page's script makes text of it and never markup, what cannot be seen is made visible in the whole
page, and a content security policy lets the browser run the page's one script, by its hash, and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from longgrpo import __version__
from longgrpo.errors import DataError
from longgrpo.report.completions import Completions, completions_of
from longgrpo.report.costs import memory_of, phases_of
from longgrpo.report.held_out import PackedPair, Pair, Result, packed_pair, pairs_of
from longgrpo.report.packed import packed, shortened
from longgrpo.report.panels import Chart, charts_of
from longgrpo.report.run import MISFITS, Run
from longgrpo.report.verdict import ENDS, Ends, Verdict, ends_of, number, percent, points, verdict_of
from longgrpo.run.files import write_file
from longgrpo.visible import visible

SIGNATURE = "· longgrpo</title>".encode()  # of page.html
MOST_RUNS = 8  # as many as colors can distinguish
ROOM = 16 << 20  # characters that replies and completions take on the page
UPLOT = "third_party/uplot/uPlot"
SCRIPTS = (f"{UPLOT}.iife.min.js", "base.js", "lines.js", "zoom.js", "charts.js", "replies.js", "page.js")
STYLES = (f"{UPLOT}.min.css", "page.css")
GIB = 2**30


def write_report(runs: Sequence[Run], path: Path, refresh: float | None = None) -> None:
    """Writes one self-contained HTML file. refresh: seconds after which an open page loads itself again. Raises
    DataError for more runs than MOST_RUNS, and UserError if the file cannot be written, or is there and no report."""
    if path.is_file() and SIGNATURE not in path.read_bytes()[: 1 << 16]:
        raise DataError(f"{path} exists and is no report of longgrpo: name another file, with --output")
    if len(runs) > MOST_RUNS:
        raise DataError(f"{len(runs)} runs: a page compares at most {MOST_RUNS}; name fewer")
    names = _distinct_names(runs)
    try:
        page = _rendered(runs, names, refresh)
    except (*MISFITS, jinja2.TemplateError) as error:
        raise DataError(
            f"{', '.join(names)}: config.yaml, metrics.jsonl or summary.json is not as a run writes it "
            f"({type(error).__name__}: {error})"
        ) from error
    write_file(path, visible(page))


def _rendered(runs: Sequence[Run], names: list[str], refresh: float | None) -> str:
    style, script = (Markup(_joined(parts)) for parts in (STYLES, SCRIPTS))
    pairs = [pairs_of(run) for run in runs]
    groups = _groups(runs, names, pairs)
    charts, phases, memory = charts_of(runs), phases_of(runs), memory_of(runs)
    replies, completions = _texts(runs, pairs)
    every = [*(chart for section in charts.sections.values() for chart in section), *phases.charts, *memory.charts]
    return (
        _environment()
        .get_template("page.html")
        .render(
            style=style,
            script=script,
            policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
            "base-uri 'none'; form-action 'none'",
            title=_title(runs, groups),
            written=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by longgrpo {__version__}",
            refresh=refresh,
            names=names,
            groups=groups,
            results=_results(pairs),
            facts=[list(_facts(run, bool(of_run))) for run, of_run in zip(runs, pairs, strict=True)],
            findings=[run.findings for run in runs],
            ends=_ends(runs),
            most_ends=ENDS,
            charts=charts,
            numbered={id(chart): i for i, chart in enumerate(every)},
            data=packed(_data(runs, names, groups, every)),
            clocked=all(run.has_clock for run in runs),
            phases=phases,
            memory=memory,
            replies=replies,
            completions=completions,
            room=ROOM >> 20,
            config=_side_by_side([_flat(run.config) for run in runs]),
            starts=[(i, start) for i, run in enumerate(runs) for start in run.starts],
            versions=_side_by_side([_versions(run) for run in runs]),
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("longgrpo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        function.__name__: function for function in (number, shortened, gib, percent, points, moment)
    }
    environment.filters["identity"] = id
    return environment


def _joined(parts: Sequence[str]) -> str:
    return "\n".join(files("longgrpo.report").joinpath(part).read_text("utf-8").strip() for part in parts)


def _data(
    runs: Sequence[Run], names: Sequence[str], groups: Sequence[Group], charts: Sequence[Chart]
) -> dict[str, Any]:
    """What the page's script draws."""
    return {
        "runs": [
            {"name": name, "clock": [list(run.clock), list(run.clock.values())]}
            for run, name in zip(runs, names, strict=True)
        ],
        "groups": [{"name": group.name, "runs": group.runs} for group in groups],
        "charts": [{"title": chart.panel.title, **chart.data} for chart in charts],
    }


def _results(pairs: Sequence[Sequence[Pair]]) -> list[tuple[int, Result]]:
    """Each with its run: the first set of all runs, then the further ones by name."""
    every = [(i, pair.result) for i, of_run in enumerate(pairs) for pair in of_run]
    return sorted(every, key=lambda one: one[1].name)


def _texts(
    runs: Sequence[Run], pairs: Sequence[Sequence[Pair]]
) -> tuple[list[tuple[int, PackedPair]], list[Completions]]:
    """Held-out replies, each with its run, and each run's completions; together they take about ROOM characters."""
    every = [(i, pair) for i, of_run in enumerate(pairs) for pair in of_run]
    replies = [(i, packed_pair(pair, ROOM // 2 // len(every))) for i, pair in every]
    left = ROOM - sum(len(pair.text) for _, pair in replies)
    return replies, [completions_of(run, left // len(runs)) for run in runs]


# ---- at a glance


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only; often a single one."""

    name: str
    runs: list[int]
    verdict: Verdict


def _groups(runs: Sequence[Run], names: Sequence[str], pairs: Sequence[Sequence[Pair]]) -> list[Group]:
    together: list[list[int]] = []
    for i, run in enumerate(runs):
        for of_config in together:
            if runs[of_config[0]].settings() == run.settings():
                of_config.append(i)
                break
        else:
            together.append([i])
    firsts = [next((pair.result for pair in of_run if not pair.result.name), None) for of_run in pairs]
    return [
        Group(_group_name(runs, names, of), of, verdict_of([runs[i] for i in of], [firsts[i] for i in of]))
        for of in together
    ]


def _group_name(runs: Sequence[Run], names: Sequence[str], of_config: list[int]) -> str:
    """Of several runs: their folder's, if they have one of their own, else their names'."""
    if len(of_config) == 1:
        return names[of_config[0]]
    folders = {runs[i].directory.resolve().parent for i in of_config}
    others = {run.directory.resolve().parent for i, run in enumerate(runs) if i not in of_config}
    folder = folders.pop()
    return folder.name if not folders and folder not in others else " + ".join(names[i] for i in of_config)


def _title(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    """The names; a seed by itself with its folder's, which says more."""
    folder = (
        f"{runs[0].directory.resolve().parent.name}, " if len(runs) == 1 and runs[0].name.startswith("seed") else ""
    )
    return folder + ", ".join(group.name for group in groups)


def _facts(run: Run, compared: bool) -> Iterator[tuple[str, str]]:
    """compared: whether its accuracies stand in the table of results."""
    summary, start = run.summary or {}, (run.starts or [{}])[0]
    yield "steps", f"{run.last} of {run.planned}" + ("" if run.summary else ", not finished")
    if (seconds := summary.get("seconds", run.clock[run.last])) > 0:
        yield "time", str(timedelta(seconds=round(seconds)))
    if ends := ends_of(run, "reward/mean"):
        yield f"reward, {ends.steps} step{'s' * (ends.steps > 1)} each", f"{ends.first} → {ends.last}"
    if "eval_after" in summary and not compared:
        before = f"{summary['eval_before']:.3f} → " if "eval_before" in summary else ""
        yield "accuracy", f"{before}{summary['eval_after']:.3f} on {summary['eval_n']} held-out problems"
    if "eval_prefill" in summary:
        yield "control", f"{summary['eval_prefill']:.3f} untrained, its reply begun for it"
    if known := [value for value in run.series("peak_rss_bytes")[1] if value is not None]:
        yield "peak memory", gib(known[-1])
    if "engine" in summary:
        yield "engine", str(summary["engine"])
    yield "model", str((run.config.get("model") or {}).get("path", "-"))
    if "at" in start:
        yield "started", moment(start["at"])
    if "machine" in start:
        yield "machine", str(start["machine"])


def _ends(runs: Sequence[Run]) -> list[tuple[str, list[Ends | None]]]:
    """The metrics that most want to be compared, at each run's beginning and end."""
    rewards = [name for run in runs for name in run.names if name.startswith("reward/") and name.endswith("/mean")]
    wanted = dict.fromkeys([*rewards, *("completion_length/mean", "completion_length/truncated", "entropy")])
    rows: dict[str, list[Ends | None]] = {}
    for name in wanted:
        ends = [ends_of(run, name) for run in runs]
        if any(ends) and not (name.startswith("reward/") and ends in rows.values()):  # the only function is the sum
            rows[name.removesuffix("/mean")] = ends
    return list(rows.items())


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return [str(run.directory) if names.count(run.name) > 1 else run.name for run in runs]


# ---- tables


def _versions(run: Run) -> dict[str, Any]:
    started = run.starts[-1].get("versions") if run.starts else {}
    return {**(started or {}), **(run.summary or {}).get("versions", {})}


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


def gib(value: float | None) -> str:
    return "-" if value is None else f"{value / GIB:.2f} GiB"


def moment(at: object) -> str:
    """Of a start: 2026-11-30 09:12:05 UTC."""
    return str(at).replace("T", " ").replace("+00:00", " UTC")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
