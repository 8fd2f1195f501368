"""What a notebook or a script gives to a run as objects: reward functions, data sets and callbacks.

In the config, and so in the run's config.yaml, "given:NAME" stands for each. Whoever resumes the run gives them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longgrpo.config.run import TrainConfig, build_config, config_tree
from longgrpo.errors import ConfigError
from longgrpo.tasks.user_code import GIVEN

NAMES = ("reward_functions", "train_dataset", "eval_dataset", "tools", "environment_factory", "callbacks")

TOOL = "tool-"
"""Begins the name of a tool: a reward function may have the same."""


def config_with(config: TrainConfig | Mapping[str, Any], given: Mapping[str, Any]) -> TrainConfig:
    """The config in which the given objects stand for its rewards and its task.

    reward_functions: functions with TRL's signature, each with weight 1; they take the place of `rewards`.
    train_dataset, eval_dataset: sequences of rows, or what can be iterated over; eval_dataset may be a dict, whose
    first set is the first. tools, environment_factory: see
    longgrpo.tasks.environment. callbacks: see longgrpo.run.callbacks. None is the same as not given.
    """
    if unknown := sorted(set(given) - set(NAMES)):
        raise ConfigError(f"Trainer has no argument {unknown[0]!r}: it takes {', '.join(NAMES)}")
    if not isinstance(config, TrainConfig | Mapping):
        raise ConfigError(
            f"config is a {type(config).__name__}: give a mapping, as a YAML file has it, or what load_config returns "
            "(docs/from-trl.md has the names of TRL's options here)"
        )
    if isinstance(config, TrainConfig) and not any(given.get(name) is not None for name in NAMES[:-1]):
        return config
    tree = config_tree(config) if isinstance(config, TrainConfig) else dict(config)
    if given.get("reward_functions") is not None:
        names = [GIVEN + label for label in _labels(given["reward_functions"])]
        if [reward.get("function") for reward in tree.get("rewards") or []] != names:  # else it is resumed
            tree["rewards"] = [{"function": name} for name in names]
    task = tree["task"] = dict(tree.get("task") or {})
    if given.get("train_dataset") is not None:
        task["name"] = f"{GIVEN}train_dataset"
    if given.get("tools") is not None:
        task["tools"] = [f"{GIVEN}{TOOL}{label}" for label in _labels(given["tools"])]
    if given.get("environment_factory") is not None:
        task["environment"] = f"{GIVEN}environment_factory"
    first, *further = _sets(given)
    if first[0]:
        task |= {"eval_name": f"{GIVEN}{first[0]}"} | _size(first[1], task, "eval_n")
        sets = dict(task.get("eval_sets") or {})
        for name, rows in further:
            own = dict(sets.get(name) or {})
            sets[name] = own | {"name": f"{GIVEN}{name}"} | _size(rows, own, "n")
        task["eval_sets"] = sets
    return build_config(tree)


def objects_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The objects by their names in the config."""
    functions: Sequence[Callable[..., Any]] = given.get("reward_functions") or ()
    objects = dict(zip(_labels(functions), functions, strict=True))
    objects |= {name: rows for name, rows in _sets(given) if name}
    tools = given.get("tools") or ()
    objects |= {f"{TOOL}{label}": tool for label, tool in zip(_labels(tools), tools, strict=True)}
    objects |= {name: given[name] for name in ("train_dataset", "environment_factory") if given.get(name) is not None}
    return {GIVEN + name: value for name, value in objects.items()}


def _labels(functions: Sequence[Callable[..., Any]]) -> list[str]:
    return [getattr(function, "__name__", type(function).__name__) for function in functions]


def _sets(given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The held-out sets by name, the first one first; ("", None) if there is none."""
    data = given.get("eval_dataset")
    if data is None:
        return [("", None)]
    return list(data.items()) if isinstance(data, dict) else [("eval_dataset", data)]


def _size(rows: Any, own: Mapping[str, Any], key: str) -> dict[str, int]:
    """As many problems as the config says, or as there are."""
    wanted = own.get(key, 200)
    return {key: min(wanted, len(rows)) if hasattr(rows, "__len__") else wanted}
