"""Reward functions with TRL's signature: one number per completion, or None if it does not apply.

`rewards.N.parameters` of a config are further arguments. `column` names the column with the right answer.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

Reply = str | list[dict[str, Any]]
Values = list[float | None]

# A dash after a digit or a bracket is a minus between two numbers; a digit after a letter or ^ belongs to a name, a
# unit (cm2) or a power.
_SIGN = r"(?:(?<![A-Za-z0-9_^.)\]}])-|(?<![A-Za-z0-9_^]))"
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![A-Za-z0-9.])\.\d+)"
NUMBER = re.compile(rf"{_SIGN}{_DIGITS}(?:[eE][+-]?\d{{1,3}}(?!\w))?")
_QUOTIENT = re.compile(rf"{NUMBER.pattern}(?:\s*/\s*{NUMBER.pattern})?")
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SEPARATOR = re.compile(
    "(?<=\\d)(?:,?\\\\[,!]|\\{,\\}|[\u00a0\u2009\u202f])(?=\\d{3})"
)  # 1{,}000, 1,\!000, thin spaces
_MINUS = str.maketrans(dict.fromkeys("\u2212\ufe63\uff0d", "-"))
THINK = r"<think>(?!.*<think>).*?</think>.*"


def text_of(completion: Reply) -> str:
    """The reply as text: conversational completions are [{"role": "assistant", "content": text}]. Of several messages
    the assistant's last one: what a tool says is no answer."""
    if isinstance(completion, str):
        return completion
    own = [message["content"] for message in completion if message["role"] == "assistant"]
    return own[-1] if own else ""


def last_number(text: str) -> str | None:
    """The last number of a text, or quotient of two, without thousands separators: "so 1,024." -> "1024"; "-1/2",
    "\\frac{-1}{2}" -> "-1/2"."""
    text = _FRACTION.sub(r"\1/\2", _SEPARATOR.sub(",", text.translate(_MINUS)))
    numbers = _QUOTIENT.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def _value(number: str | None) -> Fraction | None:
    """Exactly, since a float cannot tell two long products apart. None if there is no number, or it divides by 0."""
    if number is None:
        return None
    above, _, below = number.partition("/")
    divisor = Fraction(Decimal(below or 1))
    return Fraction(Decimal(above.strip())) / divisor if divisor else None


def _pairs(completions: list[Reply], columns: dict[str, list[Any]], column: str) -> list[tuple[str, str]]:
    """The text of each reply and its right answer, "" if the row has none."""
    answers = ("" if right is None else str(right).strip() for right in columns[column])
    return [(text_of(reply), right) for reply, right in zip(completions, answers, strict=True)]


# ---- answers. None: the row has no answer of the kind


def exact_answer(completions: list[Reply], *, column: str = "answer", **columns: Any) -> Values:
    """1 if the reply is the answer and nothing else, surrounding space aside; None if the answer is empty."""
    return [float(reply.strip() == right) if right else None for reply, right in _pairs(completions, columns, column)]


def numeric_answer(
    completions: list[Reply], *, column: str = "answer", tolerance: float = 0.0, **columns: Any
) -> Values:
    """1 if the reply's last number is the answer's, to within `tolerance`; None if the answer has no number."""
    limit = Fraction(str(tolerance))
    pairs = ((_value(last_number(r)), _value(last_number(a))) for r, a in _pairs(completions, columns, column))
    return [
        None if right is None else float(number is not None and abs(number - right) <= limit) for number, right in pairs
    ]


def math_answer(
    completions: list[Reply],
    *,
    column: str = "answer",
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **columns: Any,
) -> Values:
    """1 if math-verify finds the reply's last expression equal to the answer, so that 1/2, 0.5 and \\frac{1}{2} are
    one; None if it cannot read the answer. LaTeX may stand in dollars, in \\boxed{} or by itself."""
    from math_verify import verify

    # math-verify's own time limit is an alarm, which only the main thread can set.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    for name in ("parser", "grader", "utils"):
        logging.getLogger(f"math_verify.{name}").setLevel(logging.CRITICAL)  # of an alarm it logs the traceback
    values: Values = []
    read: list[str] = []
    for reply, right in _pairs(completions, columns, column):
        gold = _parsed(right, limit) if right else []
        answer = _parsed(reply, limit) if gold else []
        values.append(float(verify(gold, answer, timeout_seconds=limit)) if gold else None)
        read.append(str(answer[-1]) if answer else "")
    if log_extra:
        log_extra("math_answer", read)
    return values


def _parsed(text: str, limit: int | None) -> list[Any]:
    """What a text may mean, as math-verify has it: a sympy expression or, if it cannot be read, its text."""
    from math_verify import parse

    text = text.strip().translate(_MINUS)
    found: list[Any] = parse(_delimited(text), parsing_timeout=limit)
    if _LOCAL_NUMBER.fullmatch(text):  # 1,22 is a decimal as well as two numbers
        found += parse(text, parsing_timeout=limit)
    return found


_LOCAL_NUMBER = re.compile(r"-?\d+(?: \d{3})*(?:,\d+)?")
_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
_PROSE = re.compile(r"[^\W\d_]{2,}[^\w\n]+[^\W\d_]{2,}|\n")  # two words, or lines
_LATEX_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_RUN = re.compile(r"(?:[^\s${}]|\{(?:[^{}$]|\{[^{}$]*\})*\})+")  # up to a space outside of braces


def _delimited(text: str) -> str:
    """LaTeX that stands by itself in the delimiters that math-verify looks for: without them it reads 3\\sqrt{13} as 3.
    A text is one expression, unless it is prose, which has expressions among its words."""
    if _DELIMITED.search(text):
        return text
    if not _PROSE.search(_LATEX_WORDS.sub("", text)):
        return f"\\boxed{{{text}}}"
    return _RUN.sub(_in_dollars, text)


def _in_dollars(run: re.Match[str]) -> str:
    expression = run[0].rstrip(".,:;!?")
    latex = re.search(r"\\[A-Za-z]|\^", expression)
    return f"${expression}${run[0][len(expression) :]}" if latex else run[0]


def graded_error(completions: list[Reply], *, column: str = "answer", **columns: Any) -> Values:
    """0.5 / (1 + |error|) of the reply's last number, 0 without a number, None if the answer is not a number."""
    return [_graded(_value(last_number(reply)), right) for reply, right in _pairs(completions, columns, column)]


def _graded(number: Fraction | None, right: str) -> float | None:
    value = _value(last_number(right)) if _is_number(right) else None
    if value is None:
        return None
    return 0.0 if number is None else float(Fraction(1, 2) / (1 + abs(number - value)))


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text.translate(_MINUS)) is not None


def score_answer(completions: list[Reply], answer: list[str], metadata: list[dict[str, Any]], **_: Any) -> list[float]:
    """The score that the reasoning_gym task gives the reply. A numeric answer is compared with the reply's last number,
    and is right (1) or wrong (0)."""
    return [
        _score(text_of(completion), {"answer": right, "metadata": data})
        for completion, right, data in zip(completions, answer, metadata, strict=True)
    ]


def _score(reply: str, entry: dict[str, Any]) -> float:
    scorer = _task_scorer(entry["metadata"]["source_dataset"])
    if not _is_number(str(entry["answer"])):
        return float(scorer(reply.strip(), entry))
    number = last_number(reply)  # "17" contains "7": the task would give it half a point
    return float(number is not None and "/" not in number and scorer(number, entry) == 1.0)


@lru_cache
def _task_scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym import get_score_answer_fn

    scorer: Callable[[str, dict[str, Any]], float] = get_score_answer_fn(name)
    return scorer


# ---- form


def matches_format(
    completions: list[Reply], pattern: str = THINK, reply_prefix: list[str | None] | None = None, **_: Any
) -> list[float]:
    """1 if the whole reply matches the regular expression, whose dot matches line ends too. Default: one block of
    thought, <think>...</think>, before the rest. What the prompt begins of the reply (reply_prefix) belongs to it."""
    prefixes = reply_prefix or [None] * len(completions)
    texts = ((prefix or "") + text_of(reply) for prefix, reply in zip(prefixes, completions, strict=True))
    return [float(re.fullmatch(pattern, text, re.DOTALL) is not None) for text in texts]


def target_length(completion_ids: list[list[int]], target: int, **_: Any) -> list[float]:
    """-|tokens - target| / target, at least -1 (after L1, arXiv:2503.04697)."""
    return [-min(abs(len(ids) - target) / target, 1.0) for ids in completion_ids]


def soft_overlong(completion_ids: list[list[int]], max_length: int, buffer: int, **_: Any) -> list[float]:
    """DAPO's soft punishment (arXiv:2503.14476, eq. 13): 0 up to max_length - buffer tokens, from there down to -1 at
    max_length."""
    return [-min(max(len(ids) - (max_length - buffer), 0) / buffer, 1.0) for ids in completion_ids]


async def environment_reward(environments: list[Any], **_: Any) -> Values:
    """What each environment's get_reward() returns, as in TRL; None if there is no environment."""
    values: Values = []
    for environment in environments:
        value = None if environment is None else environment.get_reward()
        values.append(await value if inspect.isawaitable(value) else value)
    return values


BUILT_IN: dict[str, Callable[..., Any]] = {
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
        environment_reward,
    )
}
HIGHEST = {name: 1.0 for name in BUILT_IN} | {"graded_error": 0.5, "target_length": 0.0, "soft_overlong": 0.0}
HIGHEST["environment_reward"] = math.inf
"""What a completion can earn at most; infinite if nobody knows."""
