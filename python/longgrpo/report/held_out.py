"""What a run says of itself on held-out problems: the replies before training beside those after it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longgrpo.errors import DataError, UserError
from longgrpo.report.packed import packed, shared_beginning, shortened
from longgrpo.report.run import MISFITS, Run
from longgrpo.run.files import read_json
from longgrpo.tasks.evaluation import Evaluation, paired_interval

_BEFORE = re.compile(r"eval_before(?:_(\w+))?\.json")


@dataclass(frozen=True)
class Result:
    """A held-out set before training and after it."""

    name: str
    """Empty for the first set."""
    step: int
    """After which the second evaluation was."""
    count: int
    before: float
    after: float
    low: float
    high: float
    """The ends of the 95 % interval of the paired difference."""

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def tone(self) -> str:
        """Whether the interval leaves out 0: "better" or "worse"; else "same"."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "same"


@dataclass(frozen=True)
class Pair:
    """Two evaluations of one set."""

    result: Result
    before: Evaluation
    after: Evaluation


def pairs_of(run: Run) -> list[Pair]:
    """Each held-out set that was evaluated before training and later, with the newest evaluation; the first set is the
    first."""
    return sorted(_pairs(run), key=lambda pair: (pair.result.name != "", pair.result.name))


def _pairs(run: Run) -> Iterator[Pair]:
    for path in run.directory.glob("eval_before*.json"):
        if (named := _BEFORE.fullmatch(path.name)) and (newest := _newest(run, named[1] or "")):
            step, after_path = newest
            before, after = _read(path), _read(after_path)
            if before.questions != after.questions:
                raise DataError(
                    f"{after_path}: is of other problems than {path.name}; remove the one that is not the run's"
                )
            low, high = paired_interval(before.solved, after.solved)
            result = Result(
                named[1] or "", step, len(before.scores), before.accuracy, after.accuracy, low, high
            )  # fmt: skip
            yield Pair(result, before, after)


def _newest(run: Run, name: str) -> tuple[int, Path] | None:
    """The last evaluation of a set, and its step: of the run's end, else of a step that it has."""
    of = f"_{name}" if name else ""
    last = max(run.metrics)
    if run.summary and (path := run.directory / f"eval_after{of}.json").is_file():
        return last, path
    for step in sorted(run.metrics, reverse=True):
        if step and (path := run.directory / f"evaluations/step-{step:06d}{of}.json").is_file():
            return step, path
    return None


def _read(path: Path) -> Evaluation:
    remedy = "remove it: the report is then made without it"
    try:
        found = Evaluation(**read_json(path, remedy))
        if not (len(found.questions) == len(found.replies) == len(found.scores) > 0):
            raise ValueError("not one reply and score a problem")
        if not all(map(math.isfinite, found.scores)):
            raise ValueError("a score is not finite")
        found.metrics()
        return found
    except UserError as error:
        raise DataError(str(error)) from error
    except MISFITS as error:
        raise DataError(f"{path}: is no evaluation ({type(error).__name__}: {error}); {remedy}") from error


@dataclass(frozen=True)
class PackedPair:
    result: Result
    shown: int
    """Problems that are on the page."""
    text: str
    """See packed(): {"shared": the beginning of all prompts, "rows": [problem, ...]}."""


def packed_pair(pair: Pair, room: int) -> PackedPair:
    """The problems with both replies; only the first ones, if all of them need more than `room` characters."""
    shown = len(pair.before.questions)
    while len(text := packed(_rows(pair, shown))) > room and shown > 1:
        shown //= 2
    return PackedPair(pair.result, shown, text)


def _rows(pair: Pair, count: int) -> dict[str, Any]:
    before, after = pair.before, pair.after
    shared = shared_beginning([str(question) for question in before.questions])
    rows = [
        {
            "question": shortened(str(before.questions[i])[len(shared) :]),
            "before": _reply(before, i),
            "after": _reply(after, i),
        }
        for i in range(count)
    ]
    return {"shared": shared, "rows": rows}


def _reply(evaluation: Evaluation, i: int) -> dict[str, Any]:
    sampled = [score >= 1.0 for score in evaluation.sample_scores[i]] if evaluation.sample_scores else []
    return {
        "text": shortened(str(evaluation.replies[i])),
        "right": evaluation.solved[i],
        "score": float(evaluation.scores[i]),
        "sampled": f"{sum(sampled)} of {len(sampled)} sampled ones right" if sampled else "",
    }
