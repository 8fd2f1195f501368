"""Reward functions: TRL's signature, the built-ins, and how several become one number a completion."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longgrpo.train.config import RewardConfig
from longgrpo.train.data import Prompt, Reply
from longgrpo.train.errors import ConfigError, RewardError

Function = Callable[..., Sequence[float | None]]
"""f(prompts, completions, completion_ids, **columns) -> one number, or None for "not applicable", a completion."""

NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


@dataclass(frozen=True)
class Reward:
    """A named function and its weight in the sum."""

    name: str
    function: Function
    weight: float = 1.0

    def __call__(
        self, prompts: list[Prompt], completions: list[Reply], completion_ids: list[list[int]], columns: dict[str, list]
    ) -> Tensor:
        """[B] float64, NaN where the function answered None. Raises RewardError, naming the function."""
        arguments = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        try:
            values = self.function(**arguments)
        except Exception as error:
            raise RewardError(
                f"reward function {self.name} raised {type(error).__name__}: {error} ({_where(error)})"
            ) from error
        return self._checked(values, len(completions))

    def _checked(self, values: Any, count: int) -> Tensor:
        if not isinstance(values, (Sequence, Tensor)) or isinstance(values, str):
            raise RewardError(
                f"reward function {self.name} returned {type(values).__name__}: "
                "must be a list of one number or None a completion"
            )
        if len(values) != count:
            raise RewardError(f"reward function {self.name} returned {len(values)} values for {count} completions")
        for i, value in enumerate(values):
            try:
                usable = value is None or math.isfinite(value)
            except TypeError:
                usable = False
            if not usable:
                raise RewardError(
                    f"reward function {self.name} returned {value!r} for completion {i}: must be a finite number, "
                    "or None where it does not apply"
                )
        return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


def weighted_sum(rewards: Sequence[Reward], values: dict[str, Tensor]) -> Tensor:
    """[B] float64: for each completion the weighted sum of the functions that apply; NaN where none does."""
    stacked = torch.stack([values[reward.name] for reward in rewards])  # [functions, B]
    weights = torch.tensor([reward.weight for reward in rewards], dtype=stacked.dtype)
    total = torch.nan_to_num(stacked * weights[:, None], nan=0.0).sum(0)
    return total.masked_fill(stacked.isnan().all(0), math.nan)


def load_reward(config: RewardConfig) -> Reward:
    """Finds a built-in, package.module:function or path/to/file.py:function."""
    spec = config.function
    if spec in BUILT_IN:
        return Reward(spec, BUILT_IN[spec], config.weight)
    where, colon, name = spec.rpartition(":")
    if not colon:
        near = difflib.get_close_matches(spec, BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"reward function {spec!r}: {hint}built-ins are {', '.join(BUILT_IN)}; "
            "a function of your own is package.module:function or path/to/file.py:function"
        )
    function = getattr(_module(where, spec), name, None)
    if not callable(function):
        raise ConfigError(f"reward function {spec!r}: {where} has no function {name!r}")
    return Reward(name, function, config.weight)


def _module(where: str, spec: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        if not Path(where).is_file():
            raise ConfigError(f"reward function {spec!r}: there is no file {where}")
        description = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert description is not None  # it ends in .py
        assert description.loader is not None
        module = importlib.util.module_from_spec(description)
        sys.modules.setdefault(description.name, module)  # dataclasses and pickle look a class's module up here
        description.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's module does on import
        raise ConfigError(
            f"reward function {spec!r}: importing {where} failed: {type(error).__name__}: {error}"
        ) from error


def _where(error: BaseException) -> str:
    frame = inspect.getinnerframes(error.__traceback__)[-1] if error.__traceback__ else None
    return f"{frame.filename}:{frame.lineno}" if frame else "unknown place"


def text_of(completion: Reply) -> str:
    """The reply as text: conversational completions are [{"role": "assistant", "content": text}]."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def last_number(text: str) -> str | None:
    """The last number of a text without thousands separators: "so 1,024." -> "1024"."""
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


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

    return get_score_answer_fn(name)


def exact_answer(completions: list[Reply], answer: list[str], **_: Any) -> list[float]:
    """1 where the reply is the answer and nothing else, surrounding space aside."""
    return [float(text_of(c).strip() == str(right)) for c, right in zip(completions, answer, strict=True)]


def graded_error(completions: list[Reply], answer: list[str], **_: Any) -> list[float | None]:
    """0.5 / (1 + |error|) of the reply's last number, 0 without a number, None where the answer is not numeric."""
    return [_graded(last_number(text_of(c)), str(right)) for c, right in zip(completions, answer, strict=True)]


def _graded(number: str | None, right: str) -> float | None:
    if not NUMBER.fullmatch(right):
        return None
    return 0.0 if number is None else 0.5 / (1.0 + abs(float(number) - float(right.replace(",", ""))))


BUILT_IN: dict[str, Function] = {function.__name__: function for function in (score_answer, exact_answer, graded_error)}
