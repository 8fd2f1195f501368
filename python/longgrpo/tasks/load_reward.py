"""Reward functions by their names in a config."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from longgrpo.config.task import RewardConfig
from longgrpo.errors import ConfigError
from longgrpo.tasks.builtin_rewards import BUILT_IN
from longgrpo.tasks.event_loop import is_async
from longgrpo.tasks.isolated import Worker
from longgrpo.tasks.reward_model import RewardModel
from longgrpo.tasks.rewards import Function, Reward
from longgrpo.tasks.user_code import load_function


def load_reward(config: RewardConfig, given: Mapping[str, Function] | None = None) -> Reward:
    """Finds a built-in, package.module:function or path/to/file.py:function, loads a model, or takes what was given."""
    if config.model:
        return Reward(config.label, RewardModel(config.model, **config.parameters), config.weight)
    assert config.function
    if given and config.function in given:
        own = given[config.function]
        return Reward(config.label, own, config.weight, config.parameters, on_error=config.on_error)
    function = None if config.isolate or config.limits else find_reward(config.function)
    # Nothing but the end of its process stops a function that does not wait.
    apart = function is None or (config.timeout is not None and not is_async(function))
    worker = Worker(config.function, config.limits) if apart else None
    return Reward(
        config.label, function, config.weight, config.parameters, config.timeout, config.on_error, worker
    )  # fmt: skip


def find_reward(spec: str) -> Function:
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if ":" not in spec:
        near = difflib.get_close_matches(spec, BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"reward function {spec!r}: {hint}built-ins are {', '.join(BUILT_IN)}; "
            "a function of your own is package.module:function or path/to/file.py:function"
        )
    return load_function(spec, "reward function")
