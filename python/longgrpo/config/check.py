"""What every config class checks with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

UNBOUNDED = ("max_grad_norm", "epsilon_high", "delta")
"""Keys whose .inf means that there is no bound."""
FREE = ("parameters", "chat_template_kwargs")
"""Keys of arguments that are for functions of others."""


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless `condition` holds; the message names the value and the remedy."""
    if not condition:
        raise ValueError(message)


def require_sound(config: Any, key: str = "") -> None:
    """Raises ValueError, naming the key, for a number in a config that is NaN, infinite without a meaning, or beyond 64
    bits: each would be taken by the code that computes with it."""
    entries: list[tuple[Any, Any]]
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        entries = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    elif isinstance(config, Mapping):
        entries = list(config.items())
    elif isinstance(config, list | tuple):
        entries = list(enumerate(config))
    else:
        _require_sound_number(config, key)
        return
    for name, value in entries:
        if name not in FREE:
            require_sound(value, f"{key}.{name}" if key else str(name))


def _require_sound_number(value: Any, key: str) -> None:
    if isinstance(value, float):
        unbounded = value == math.inf and key.rpartition(".")[2] in UNBOUNDED
        require(math.isfinite(value) or unbounded, f"{key} = {value}: must be a finite number")
    if isinstance(value, int):
        require(-(2**63) <= value < 2**63, f"{key} = {value}: has more than 64 bits")
