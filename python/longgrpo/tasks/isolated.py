"""A reward function in a process of its own: it can be stopped, and can break nothing else."""

from __future__ import annotations

import asyncio
import inspect
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from longgrpo.errors import ConfigError


@dataclass
class Notes:
    """What a reward function logs in one call, through TRL's log_extra and log_metric."""

    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: list[Any]) -> None:
        self.extra.setdefault(column, []).extend(values)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def arguments(self) -> dict[str, Any]:
        return {"log_extra": self.log_extra, "log_metric": self.log_metric}


class Worker:
    """Calls the function that `spec` names in a process that is started now, and again after it was stopped.

    Raises ConfigError if the function cannot be loaded there.
    """

    def __init__(self, spec: str, find: Callable[[str], Callable[..., Any]]) -> None:
        self._spec, self._find = spec, find
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")  # a fork would copy the engine's threads' locks, but not its threads
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._spec, self._find), daemon=True)
        self._process.start()
        theirs.close()
        if error := self._receive(None):
            self.close()
            raise ConfigError(error)

    def call(self, arguments: dict[str, Any], timeout: float | None) -> tuple[Any, Notes]:
        """What the function returned and logged. Raises TimeoutError, and RuntimeError if it raised or its process
        ended; after a timeout or an end the next call starts a new process."""
        if not self._process.is_alive():
            self._start()
        self._connection.send(arguments)
        values, notes, error = self._receive(timeout)
        if error:
            raise RuntimeError(error)
        return values, notes

    def _receive(self, timeout: float | None) -> Any:
        try:
            if self._connection.poll(timeout):
                return self._connection.recv()
        except EOFError:
            self._process.join()
            self.close()
            raise RuntimeError(f"nothing: its process ended with exit status {self._process.exitcode}") from None
        self.close()
        raise TimeoutError

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, spec: str, find: Callable[[str], Callable[..., Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the trainer's decides
    try:
        import transformers.trainer_callback  # noqa: F401 - the first call's trainer_state would wait for it

        function = find(spec)
    except Exception as error:
        connection.send(str(error))
        return
    connection.send(None)
    while True:
        try:
            arguments = connection.recv()
        except EOFError:  # the trainer is gone
            return
        notes, values, error_text = Notes(), None, None
        try:
            values = function(**arguments, **notes.arguments())
            if inspect.isawaitable(values):
                values = asyncio.run(_awaited(values))
        except Exception as error:
            error_text = f"{type(error).__name__}: {error}"
        connection.send((values, notes, error_text))


async def _awaited(values: Any) -> Any:
    return await values
