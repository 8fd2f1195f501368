"""What tests/gpu needs of hypothesis, for a machine with a GPU and without it: random examples, no shrinking."""

from __future__ import annotations

import functools
import inspect
import random

HealthCheck = ()  # there is none to suppress


class _Unsatisfied(Exception):
    pass


def assume(condition: object) -> bool:
    if not condition:
        raise _Unsatisfied
    return True


def settings(*, max_examples: int = 100, **_):
    def wrap(test):
        test.max_examples = max_examples
        return test

    return wrap


def given(**strategies):
    def wrap(test):
        @functools.wraps(test)
        def run(**fixtures):
            for seed in range(run.max_examples):
                source = random.Random(seed)
                drawn = {name: strategy.draw(source) for name, strategy in strategies.items()}
                try:
                    test(**fixtures, **drawn)
                except _Unsatisfied:
                    continue
                except Exception as error:
                    raise AssertionError(f"example {seed}: {drawn}") from error

        run.max_examples = getattr(test, "max_examples", 100)
        kept = [p for name, p in inspect.signature(test).parameters.items() if name not in strategies]
        run.__signature__ = inspect.Signature(kept)
        return run

    return wrap
