"""The run's event loop: async rewards and the calls of episodes run on it while the engine samples."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class EventLoop:
    """A loop in a thread of its own, from the first use until close(): what a function keeps on it, such as a session,
    stays usable for the whole run. A coroutine that does not await cannot be canceled: after give_up() the thread is
    left to it, and what is submitted afterwards runs in another."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_run, args=(self._loop,), name="calls", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def give_up(self) -> None:
        """Leaves the thread to what blocks it."""
        if self._loop:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = None

    def close(self) -> None:
        """Cancels what runs and ends the thread, unless something blocks it."""
        if self._loop is None:
            return
        loop = self._loop
        with suppress(FutureTimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(timeout=5)
        self.give_up()
        self._thread.join(timeout=1)
        if not self._thread.is_alive():
            loop.close()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        with suppress(SystemExit):  # of a task within a function, whose error its own future has
            loop.run_forever()
            return


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=1)  # one that does not let itself be canceled is left behind


async def bounded(call: Callable[[], Any], timeout: float | None) -> Any:
    """What `call` returns: a coroutine runs on the loop, a plain function in a thread of its own, so that nobody waits
    for one that hangs. After `timeout` seconds it is left to itself: TimeoutError."""
    work = asyncio.ensure_future(_contained(call))
    done, _ = await asyncio.wait({work}, timeout=timeout)
    if not done:
        work.cancel()  # asyncio.wait_for would wait for one that does not let itself be canceled
        raise TimeoutError
    return work.result()


async def _contained(call: Callable[[], Any]) -> Any:
    """The result of `call`. Its SystemExit would end the loop, its StopIteration the coroutine."""
    try:
        result = call() if is_async(call) else await _in_thread(call)
        return await result if inspect.isawaitable(result) else result
    except (SystemExit, KeyboardInterrupt, StopIteration) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def is_async(function: Any) -> bool:
    """An `async def`, or an object whose __call__ is one, with some of its arguments given or not."""
    function = getattr(function, "func", function)  # of a functools.partial
    return inspect.iscoroutinefunction(function) or (
        callable(function) and inspect.iscoroutinefunction(type(function).__call__)
    )


def _in_thread(call: Callable[[], Any]) -> asyncio.Future[Any]:
    """Not in a pool, whose threads would all be taken by as many calls that hang, and are waited for at exit."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if not result.done():
            result.set_result(value) if error is None else result.set_exception(error)

    def run() -> None:
        value, failed = None, None
        try:
            value = context.run(call)
        except (StopIteration, SystemExit, KeyboardInterrupt) as error:  # no future takes the first
            failed = RuntimeError(f"{type(error).__name__}: {error}")
        except BaseException as error:
            failed = error  # type: ignore[assignment]
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, value, failed)

    threading.Thread(target=run, name="call", daemon=True).start()
    return result
