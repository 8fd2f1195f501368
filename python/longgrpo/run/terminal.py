"""What a run shows on stderr: lines that stay, and on a terminal a bar below them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from longgrpo.visible import listening, visible


class Part(NamedTuple):
    """Of a line: what is less important is left out first if the line does not fit."""

    rank: int
    text: str
    gap: str = "  "
    """Before it."""


def fitted(parts: Sequence[Part], width: int | None) -> str:
    """The parts in their order, as many of the most important as fit into `width` columns (None: all)."""
    kept = list(parts)
    while True:
        line = "".join(f"{part.gap}{part.text}" for part in kept).strip()
        if width is None or len(kept) <= 1 or len(line) <= width:
            return line
        kept.remove(max(kept, key=lambda part: part.rank))


class Terminal:
    """The lines and the bar of a run of `steps`."""

    def __init__(self, steps: int, done: int) -> None:
        self._console = Console(stderr=True)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[left]}"))
        self._bar = Progress(*columns, console=self._console, disable=not self.is_terminal)
        self._task = self._bar.add_task("train", total=steps, completed=max(done, 0), left="")

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def start(self) -> None:
        with listening():
            self._bar.start()

    def stop(self) -> None:
        with listening():
            self._bar.stop()

    def say(self, message: str) -> None:
        """Lines that stay; on a terminal they are broken between words."""
        with listening():
            if self.is_terminal:
                self._console.print(visible(message), markup=False, highlight=False)
            else:
                print(visible(message), file=sys.stderr, flush=True)

    def step(self, number: int, parts: Sequence[Part], left: timedelta) -> None:
        """The line of a step, whole, and how far the run is."""
        # The last column stays free: some terminals go on in the next line when it is filled.
        line = fitted(parts, self._console.width - 1 if self.is_terminal else None)
        with listening():
            self._bar.update(self._task, completed=number, left=f"{left} left")
        self.say(line)
