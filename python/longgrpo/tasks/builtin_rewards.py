"""Reward functions with TRL's signature: one number per completion, or None if it does not apply.

`rewards.N.parameters` of a config are further arguments. `column` names the column with the right answer.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

Reply = str | list[dict[str, Any]]
Values = list[float | None]

NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
THINK = r"<think>(?!.*<think>).*?</think>.*"


def text_of(completion: Reply) -> str:
    """The reply as text: conversational completions are [{"role": "assistant", "content": text}]."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def last_number(text: str) -> str | None:
    """The last number of a text without thousands separators: "so 1,024." -> "1024"."""
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def _pairs(completions: list[Reply], columns: dict[str, list[Any]], column: str) -> list[tuple[str, str]]:
    """The text of each reply and its right answer."""
    return [(text_of(reply), str(right)) for reply, right in zip(completions, columns[column], strict=True)]


# ---- answers


def exact_answer(completions: list[Reply], *, column: str = "answer", **columns: Any) -> list[float]:
    """1 if the reply is the answer and nothing else, surrounding space aside."""
    return [float(reply.strip() == right) for reply, right in _pairs(completions, columns, column)]


def numeric_answer(
    completions: list[Reply], *, column: str = "answer", tolerance: float = 0.0, **columns: Any
) -> Values:
    """1 if the reply's last number is the answer's, to within `tolerance`; None if the answer has no number."""
    return [_numeric(last_number(r), last_number(a), tolerance) for r, a in _pairs(completions, columns, column)]


def _numeric(number: str | None, right: str | None, tolerance: float) -> float | None:
    if right is None:
        return None
    return float(number is not None and abs(float(number) - float(right)) <= tolerance)


def math_answer(
    completions: list[Reply],
    *,
    column: str = "answer",
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **columns: Any,
) -> Values:
    """1 if math-verify finds the reply's last expression equal to the answer (LaTeX or plain), so that 1/2, 0.5 and
    \\frac{1}{2} are one; None if it cannot read the answer."""
    from math_verify import parse, verify

    # math-verify's own time limit is an alarm, which only the main thread can set.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    for name in ("parser", "grader", "utils"):
        logging.getLogger(f"math_verify.{name}").setLevel(logging.CRITICAL)  # of an alarm it logs the traceback
    values: Values = []
    read: list[str] = []
    for reply, right in _pairs(completions, columns, column):
        gold = parse(right, parsing_timeout=limit)
        answer = parse(reply, parsing_timeout=limit) if gold else []
        values.append(float(verify(gold, answer, timeout_seconds=limit)) if gold else None)
        read.append(str(answer[-1]) if answer else "")
    if log_extra:
        log_extra("math_answer", read)
    return values


def graded_error(completions: list[Reply], *, column: str = "answer", **columns: Any) -> Values:
    """0.5 / (1 + |error|) of the reply's last number, 0 without a number, None if the answer is not numeric."""
    return [_graded(last_number(reply), right) for reply, right in _pairs(completions, columns, column)]


def _graded(number: str | None, right: str) -> float | None:
    if not NUMBER.fullmatch(right):
        return None
    return 0.0 if number is None else 0.5 / (1.0 + abs(float(number) - float(right.replace(",", ""))))


def score_answer(completions: list[Reply], answer: list[str], metadata: list[dict[str, Any]], **_: Any) -> list[float]:
    """The score that the reasoning_gym task gives the reply. A numeric answer is compared with the reply's last number,
    and is right (1) or wrong (0)."""
    return [
        _score(text_of(completion), {"answer": right, "metadata": data})
        for completion, right, data in zip(completions, answer, metadata, strict=True)
    ]


def _score(reply: str, entry: dict[str, Any]) -> float:
    scorer = _task_scorer(entry["metadata"]["source_dataset"])
    if not NUMBER.fullmatch(str(entry["answer"])):
        return float(scorer(reply.strip(), entry))
    number = last_number(reply)  # "17" contains "7": the task would give it half a point
    return float(number is not None and scorer(number, entry) == 1.0)


@lru_cache
def _task_scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym import get_score_answer_fn

    scorer: Callable[[str, dict[str, Any]], float] = get_score_answer_fn(name)
    return scorer


# ---- form


def matches_format(completions: list[Reply], pattern: str = THINK, **_: Any) -> list[float]:
    """1 if the whole reply matches the regular expression, whose dot matches line ends too. Default: one block of
    thought, <think>...</think>, before the rest."""
    return [float(re.fullmatch(pattern, text_of(reply), re.DOTALL) is not None) for reply in completions]


def target_length(completion_ids: list[list[int]], target: int, **_: Any) -> list[float]:
    """-|tokens - target| / target, at least -1 (after L1, arXiv:2503.04697)."""
    return [-min(abs(len(ids) - target) / target, 1.0) for ids in completion_ids]


def soft_overlong(completion_ids: list[list[int]], max_length: int, buffer: int, **_: Any) -> list[float]:
    """DAPO's soft punishment (arXiv:2503.14476, eq. 13): 0 up to max_length - buffer tokens, from there down to -1 at
    max_length."""
    return [-min(max(len(ids) - (max_length - buffer), 0) / buffer, 1.0) for ids in completion_ids]


BUILT_IN: dict[str, Callable[..., Sequence[float | None]]] = {
    function.__name__: function
    for function in (
        score_answer,
        exact_answer,
        numeric_answer,
        math_answer,
        graded_error,
        matches_format,
        target_length,
        soft_overlong,
    )
}
HIGHEST = {name: 1.0 for name in BUILT_IN} | {"graded_error": 0.5, "target_length": 0.0, "soft_overlong": 0.0}
"""What a completion can earn at most."""
