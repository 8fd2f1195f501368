"""Data for the page's script, small and inert: JSON, compressed, in base64. Whoever unpacks it gets text that can be
seen (longgrpo.visible)."""

from __future__ import annotations

import base64
import gzip
import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from longgrpo.visible import visible

LONGEST_TEXT = 4000  # characters; a longer one loses its middle


def packed(data: Any) -> str:
    """base64(gzip(JSON)); the same data gives the same text."""
    text = json.dumps(_seen(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _seen(data: Any) -> Any:
    """Every text in it, made visible before JSON escapes it."""
    if isinstance(data, dict):
        return {_seen(key): _seen(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_seen(value) for value in data]
    return visible(data) if isinstance(data, str) else data


def shortened(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"


def shared_beginning(texts: Sequence[str]) -> str:
    """The whole lines that all of several different texts begin with."""
    if len(set(texts)) < 2:
        return ""
    first, last = min(texts), max(texts)  # what these two begin with, all do
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("\n", 0, length) + 1]


def by_halves(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread over all: the last, the first, the middle, ..."""
    order = dict.fromkeys([count - 1, 0] if count else [])
    parts = deque([(0, count - 1)])
    while parts:
        low, high = parts.popleft()
        middle = (low + high) // 2
        if low < middle < high:
            order[middle] = None
            parts += [(low, middle), (middle, high)]
    return list(order)
