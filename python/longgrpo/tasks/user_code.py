"""Functions of the user, found by name: package.module:function or path/to/file.py:function."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longgrpo.errors import ConfigError

GIVEN = "given:"
"""Begins the name of an object that was given to the trainer and is in no file."""


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function or class that `spec` names. Raises ConfigError, which begins with `what`."""
    where, _, name = spec.rpartition(":")
    if spec.startswith(GIVEN):
        raise ConfigError(
            f"{what} {spec!r} was given to Trainer as an object: give it again, with "
            "Trainer.resume(directory, reward_functions=..., train_dataset=..., tools=..., ...)"
        )
    function: Callable[..., Any] | None = getattr(_module(where, f"{what} {spec!r}"), name, None)
    if not callable(function):
        raise ConfigError(f"{what} {spec!r}: {where} has no function {name!r}")
    return function


def _module(where: str, what: str) -> Any:
    if where.endswith(".py") and not Path(where).is_file():
        raise ConfigError(f"{what}: there is no file {where}")
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        description = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert description is not None  # it ends in .py
        assert description.loader is not None
        module = importlib.util.module_from_spec(description)
        sys.modules.setdefault(description.name, module)  # dataclasses and pickle look a class's module up here
        description.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:  # whatever the user's module does on import
        raise ConfigError(f"{what}: importing {where} failed: {type(error).__name__}: {error}") from error
