"""What a reader wants to know first, in words: did it learn, and what ails it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from longgrpo.report.held_out import Result
from longgrpo.report.run import Run

MINUS = "\u2212"
ENDS = 10  # steps of which the first and the last values are the means


@dataclass(frozen=True)
class Spread:
    mean: float
    deviation: float
    """Standard deviation of the steps' values; 0 of a single one."""

    def __str__(self) -> str:
        """With two digits of the deviation, and the mean as far as that goes."""
        if not self.deviation:
            return f"{number(self.mean)} ± 0".replace("-", MINUS)
        decimals = min(max(1 - math.floor(math.log10(self.deviation)), 0), 12)
        return f"{self.mean:,.{decimals}f} ± {self.deviation:,.{decimals}f}".replace("-", MINUS)


@dataclass(frozen=True)
class Ends:
    """A metric at a run's beginning and at its end: of as many steps each, at most ENDS and at most half of all."""

    first: Spread
    last: Spread
    steps: int


@dataclass(frozen=True)
class Verdict:
    tone: str
    """One of "better", "same", "worse" and "unknown"."""
    title: str
    text: str


def ends_of(run: Run, name: str) -> Ends | None:
    """None for a metric without two finite values."""
    known = [value for step, value in zip(*run.series(name), strict=True) if step and value is not None]
    count = min(ENDS, len(known) // 2)
    return Ends(_spread(known[:count]), _spread(known[-count:]), count) if count else None


def _spread(values: Sequence[float]) -> Spread:
    return Spread(fmean(values), stdev(values) if len(values) > 1 else 0.0)


def verdict_of(runs: Sequence[Run], results: Sequence[Result | None]) -> Verdict:
    """Of one run, or of several that differ in their seeds only. results: of each run's first held-out set."""
    known = [result for result in results if result]
    if len(known) < len(runs):
        return Verdict("unknown", "Not measured", f"{_unmeasured(runs)} {_watched(runs)}")
    tones = {result.tone for result in known}
    tone = tones.pop() if len(tones) == 1 else "same"
    title = {"better": "It learned", "worse": "It got worse", "same": "No gain is shown"}[tone]
    learned = _learned(known[0]) if len(runs) == 1 else _learned_by_seeds(known)
    return Verdict(tone, title, f"{_progress(runs)}{learned} {_watched(runs)}")


def _learned(result: Result) -> str:
    if result.low == result.high == 0:
        solved = f"It solves {percent(result.after)} of {result.count} held-out problems"
        return f"{solved}, the same as before training: none was gained and none lost."
    contains = "" if result.tone != "same" else ", which contains 0: more held-out problems would narrow it"
    return (
        f"It solves {percent(result.after)} of {result.count} held-out problems, {percent(result.before)} before "
        f"training: a difference of {points(result.difference)} points, with a 95 % interval of "
        f"{points(result.low)} to {points(result.high)}{contains}."
    )


def _learned_by_seeds(results: Sequence[Result]) -> str:
    counts = {tone: sum(result.tone == tone for result in results) for tone in ("better", "worse")}
    said = [f"above 0 with {counts['better']} of {len(results)} seeds"]
    said += [f"below 0 with {counts['worse']}"] if counts["worse"] else []
    return (
        f"On average over {len(results)} seeds it solves {percent(fmean(result.after for result in results))} of the "
        f"held-out problems, {percent(fmean(result.before for result in results))} before training. The 95 % interval "
        f"of the difference lies {' and '.join(said)}."
    )


def _unmeasured(runs: Sequence[Run]) -> str:
    ends = [ends_of(run, "reward/mean") for run in runs]
    moved = [f"from {one.first} to {one.last}" for one in ends if one]
    rose = f" The reward of the sampled completions went {' and '.join(moved)}." if moved else ""
    if any("eval/accuracy" in run.names for run in runs):
        return f"{_progress(runs)}The held-out problems have not been evaluated again since training began.{rose}"
    return f"{_progress(runs)}No held-out problems say whether it learned (task.eval_n).{rose}"


def _progress(runs: Sequence[Run]) -> str:
    under_way = [run for run in runs if not run.summary]
    if not under_way:
        return ""
    which = "" if len(runs) == 1 else f" {', '.join(run.name for run in under_way)}"
    return f"Not at its end{which}: step {', '.join(f'{run.last} of {run.planned}' for run in under_way)}. "


def _watched(runs: Sequence[Run]) -> str:
    if not any((run.config.get("watch") or {}).get("enabled") for run in runs):
        return "The watch was off."
    found = [found for run in runs for found in run.findings]
    if not found:
        return "The watch found nothing that ails it."
    standing = dict.fromkeys(one.name for one in found if one.end is None)
    past = dict.fromkeys(one.name for one in found if one.name not in standing)
    said = [f"at the last step stands {', '.join(standing)}"] if standing else []
    said += [f"{', '.join(past)} came and went"] if past else []
    return f"The watch: {'; '.join(said)}."


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def points(difference: float) -> str:
    """Of a difference of shares, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", MINUS)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
