"""Generators of an episode's own, behind the global ones of `random` and numpy: many environments seed and draw from
those, and would disturb the run and each other."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy


class Generators:
    """What random.NAME and numpy.random.NAME draw from while they are in use."""

    def __init__(self, seed: int) -> None:
        self.python = random.Random(seed)
        self.numpy = numpy.random.RandomState(seed % 2**32)


_IN_USE: ContextVar[Generators | None] = ContextVar("generators", default=None)


@contextmanager
def using(generators: Generators | None) -> Iterator[None]:
    """The global functions draw from `generators`, in this coroutine or thread and in those that it starts."""
    token = _IN_USE.set(generators)
    try:
        yield
    finally:
        _IN_USE.reset(token)


@contextmanager
def redirected() -> Iterator[None]:
    """In here `using` has an effect. Functions that were imported by name before (from random import choice) still draw
    from the global generator."""
    originals = [(module, name, getattr(module, name)) for module, name in _global_functions()]
    for module, name, function in originals:
        setattr(module, name, _redirected(function, name, "python" if module is random else "numpy"))
    try:
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def _redirected(function: Callable[..., Any], name: str, which: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        generators = _IN_USE.get()
        own = function if generators is None else getattr(getattr(generators, which), name)
        return own(*args, **kwargs)

    return functools.wraps(function)(call)


def _global_functions() -> Iterator[tuple[Any, str]]:
    """The functions of both modules that are methods of the one global generator."""
    for name in random.__all__:
        if isinstance(getattr(getattr(random, name), "__self__", None), random.Random):
            yield random, name
    for name in numpy.random.__all__:
        function = getattr(numpy.random, name)
        if isinstance(getattr(function, "__self__", None), numpy.random.RandomState) or name in ("seed", "get_state"):
            yield numpy.random, name
