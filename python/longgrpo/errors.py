"""The errors that a user can act on. The command line prints them without a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class UserError(Exception):
    """Something that the user can put right: the message names the value and the remedy."""


class ConfigError(UserError):
    """A config file or an override that cannot be run."""


class DataError(UserError):
    """A task that does not exist, or that gives no usable prompts."""


class RewardError(UserError):
    """A reward function that raised, or returned something other than one number or None a completion."""


class TrainingError(UserError):
    """A run that must not go on: its numbers are no longer finite."""


class PublishError(UserError):
    """An engine that does not run what was trained. The weights have moved, and are not what the last step left."""


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
