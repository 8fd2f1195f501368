"""The errors that a user can act on. The command line prints them without a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from longgrpo.visible import visible

F = TypeVar("F", bound=Callable[..., Any])


class UserError(Exception):
    """An error that the user can correct: the message names the value and the remedy. It quotes what others wrote: what
    cannot be seen of that is shown as signs."""

    def __str__(self) -> str:
        return visible(super().__str__())


class ConfigError(UserError):
    """A config file or an override that cannot be run."""


class DataError(UserError):
    """A task that does not exist, or that gives no usable prompts."""


class RewardError(UserError):
    """A reward function that raised, or returned something other than one number or None per completion."""


class EpisodeError(UserError):
    """A tool or an environment that failed, in a run whose task.on_error is raise."""


class TrainingError(UserError):
    """A run that must not continue: its numbers are no longer finite."""


class WeightSyncError(UserError):
    """An engine that does not use the trained weights. The weights have moved, and are not those of the last step."""


def root_cause(error: BaseException) -> BaseException:
    """The error that began it: transformers, for one, says of any failed import only that it failed."""
    while (earlier := error.__cause__) is not None:
        error = earlier
    return error


def renamed(**names: str) -> Callable[[F], F]:
    """A decorator: a keyword argument of a former name, as in `renamed(normaliser="normalizer")`, is answered with the
    present one (TypeError)."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    raise TypeError(f"{old} is now {new}")
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
