"""What every config class checks with."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless `condition` holds; the message names the value and the remedy."""
    if not condition:
        raise ValueError(message)
