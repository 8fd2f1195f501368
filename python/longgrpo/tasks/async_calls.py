"""Coroutines run beside the trainer, in a thread that is given up if one of them blocks it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")


class AsyncCalls:
    """An event loop in a thread. A coroutine that does not await cannot be canceled: after `give_up` the thread is
    left to it, and those started afterwards run in another."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_run, args=(self._loop,), name="rewards", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def give_up(self) -> None:
        """Leaves the thread to what blocks it."""
        if self._loop:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = None

    def close(self) -> None:
        """Ends the thread, unless something blocks it."""
        if self._loop:
            loop = self._loop
            self.give_up()
            self._thread.join(timeout=5)
            if not self._thread.is_alive():
                loop.close()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        with suppress(SystemExit):  # of a task within a function, whose error its own future has
            loop.run_forever()
            return
