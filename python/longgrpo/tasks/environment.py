"""Environments: what answers the turns of an episode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from longgrpo.errors import ConfigError
from longgrpo.tasks.tools import Tool, distinct, load_tools, methods_of
from longgrpo.tasks.user_code import load_function


class Environment(Protocol):
    """One an episode. Every method may be `async` or not. Rewards get it as `environments`."""

    def __init__(self, *, seed: int, **columns: Any) -> None:
        """columns: of the problem's row, as the rewards get them. seed: the same for all episodes of a group, which
        begin alike. What a class draws from the global generators of random and numpy follows it too."""

    async def reply(self, text: str, message: Mapping[str, Any]) -> str | list[dict[str, Any]] | None:
        """The answer to a turn: the user's next message as text, messages, or None: the episode is over. text: of the
        turn; message: the same as a message. Not asked for a turn that calls tools."""

    async def close(self) -> None:
        """After the rewards; not required."""


class EnvironmentType:
    """What task.environment names: a class with the protocol above, or TRL's (reset, and public methods as tools).

    Raises ConfigError for one that is neither, and for TRL's dict of several.
    """

    def __init__(self, factory: Callable[..., Any], what: str) -> None:
        if isinstance(factory, Mapping):
            raise ConfigError(
                f"{what}: is a dict of {len(factory)} factories, and a run has one environment: give a class that "
                "reads from the row's columns which of them it plays"
            )
        self._factory = factory
        self._trl = callable(getattr(factory, "reset", None)) or not inspect.isclass(factory)
        self.tools: list[Tool] = []
        if self._trl:
            try:
                probe = factory()  # as TRL does: what it offers is asked of an instance
            except Exception as error:
                raise ConfigError(
                    f"{what}: cannot be made without arguments: {type(error).__name__}: {error}"
                ) from error
            if not callable(getattr(probe, "reset", None)):
                raise ConfigError(f"{what}: an environment_factory returns objects that have a method reset")
            self.tools = [Tool(method, what) for method in methods_of(probe)]
        elif not callable(getattr(factory, "reply", None)):
            raise ConfigError(
                f"{what}: {factory.__name__} has neither `reply` (longgrpo.tasks.environment.Environment) nor `reset` "
                "(TRL's environments)"
            )

    def make(self, seed: int, columns: Mapping[str, Any], prompt: Any) -> tuple[Any, Any, list[Tool]]:
        """An environment, what it adds to the prompt's last message (or None), and its tools. May take long."""
        if not self._trl:
            return self._factory(seed=seed, **columns), None, []
        environment = self._factory()
        opening = environment.reset(**{**columns, "prompt": prompt})
        return environment, opening, [tool.of(environment) for tool in self.tools]


def load_environment(spec: str | None, given: Mapping[str, Any] | None = None) -> EnvironmentType | None:
    """Raises ConfigError for one that cannot be imported, or is none."""
    if spec is None:
        return None
    what = f"task.environment {spec!r}"
    factory = given[spec] if given and spec in given else load_function(spec, "task.environment")
    return EnvironmentType(factory, what)


def offered(specs: Sequence[str], environment: EnvironmentType | None, given: Mapping[str, Any] | None) -> list[Tool]:
    """The tools of every episode: those of task.tools and those of the environment. Raises ConfigError."""
    return distinct([*load_tools(specs, given), *(environment.tools if environment else [])])
