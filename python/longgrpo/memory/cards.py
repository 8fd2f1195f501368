"""What a card holds."""

from __future__ import annotations

from typing import NamedTuple

GIB = 1 << 30


class Card(NamedTuple):
    memory: int  # bytes, as nvidia-smi reports them
    multiprocessors: int


CARDS = {
    "h100-80": Card(81559 << 20, 132),
    "h200-141": Card(143771 << 20, 132),
    "rtx4090-24": Card(24564 << 20, 128),
    "t4-16": Card(15360 << 20, 40),
}

CONTEXT = int(1.4 * GIB)
"""Bytes of the CUDA context and the libraries' workspaces: 0.9 to 1.4 GiB a process, of which the larger is planned."""


def card(name: str) -> Card:
    """A card of CARDS, or one with so many GiB. Raises ValueError for anything else."""
    if name in CARDS:
        return CARDS[name]
    try:
        size = float(name)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise ValueError(f"card {name!r}: known cards are {', '.join(CARDS)}; or give its memory in GiB, such as 24")
    return Card(int(size * GIB), CARDS["h100-80"].multiprocessors)
