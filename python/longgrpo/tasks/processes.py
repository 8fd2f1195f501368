"""The processes of an isolated reward function: all that began with its mark in their environment."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

MARK = "LONGGRPO_WORKER"  # the variable


def marked(mark: str) -> list[int]:
    """Every process that began with the mark in its environment: also one that has left its group and its parent."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):  # a zombie has none
                    found.append(int(entry.name))
    return found


def end_marked(mark: str, but: int | None = None) -> None:
    """Ends them all, but one; again until there is none, for some may have forked meanwhile."""
    while found := [process for process in marked(mark) if process != but]:
        for process in found:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
