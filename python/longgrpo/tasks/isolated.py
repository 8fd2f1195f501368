"""A reward function in a process of its own: it can be stopped, and can break nothing else.

What it returns comes back as JSON, never as pickle, which could run code in the trainer. When it is stopped, its whole
process group ends, and every process that still carries the worker's mark in its environment.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import select
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longgrpo.config.task import LimitsConfig
from longgrpo.errors import ConfigError
from longgrpo.tasks.processes import MARK, end_marked, marked

LONGEST = 1 << 30  # bytes of an answer
TICK = 0.2  # seconds between two looks at memory and processes
HEADER = struct.Struct("<Q")


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
    """Calls the function that `spec` names (see tasks.rewards.find_reward) in a process that is started now, and again
    after it was stopped. limits: of its resources.

    Raises ConfigError if the function cannot be loaded there, or the kernel does not grant a limit.
    """

    def __init__(self, spec: str, limits: LimitsConfig | None = None) -> None:
        self._spec, self._limits = spec, limits or LimitsConfig()
        self._start()

    def _start(self) -> None:
        self._mark = secrets.token_hex(16)
        theirs, write = os.pipe()
        self._answers, answers = os.pipe()
        environment = {**os.environ, MARK: self._mark, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "longgrpo.tasks.worker", str(theirs), str(answers)]
        # Its own session: a Ctrl-C of the terminal reaches the trainer, which decides.
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=(theirs, answers), start_new_session=True, stdin=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(answers)
        self._requests = os.fdopen(write, "wb")
        try:
            self._send((self._spec, self._limits, os.environ.get("PYTHONPATH")))
            error = self._receive(None, watched=False)
            self._loaded = _held(self._process.pid)  # bytes
        except RuntimeError as ended:
            error = str(ended)
        if error:
            self.close()
            raise ConfigError(f"{error}")

    def call(self, arguments: dict[str, Any], timeout: float | None) -> tuple[Any, Notes]:
        """What the function returned and logged. Raises TimeoutError, and RuntimeError if it raised, went beyond a
        limit or its process ended; after a timeout or an end the next call starts a new process."""
        if self._process.poll() is not None:
            self.close()
            self._start()
        self._send(arguments)
        answer = self._receive(timeout)
        if answer.get("error"):
            raise RuntimeError(str(answer["error"]))
        extra, metrics = answer["extra"], answer["metrics"]
        return answer["values"], Notes(extra, {name: [float(v) for v in values] for name, values in metrics.items()})

    def _send(self, value: Any) -> None:
        data = pickle.dumps(value)
        with suppress(BrokenPipeError):  # the answer says that it has ended
            self._requests.write(HEADER.pack(len(data)) + data)
            self._requests.flush()

    def _receive(self, timeout: float | None, watched: bool = True) -> Any:
        """The next answer, whatever the process does meanwhile."""
        deadline = None if timeout is None else time.monotonic() + timeout
        data, wanted = b"", HEADER.size
        header = True
        while True:
            left = TICK if deadline is None else min(TICK, max(deadline - time.monotonic(), 0))
            ready, _, _ = select.select([self._answers], [], [], left)
            if ready:
                part = os.read(self._answers, min(wanted - len(data), 1 << 20))
                if not part:
                    self.close()
                    raise RuntimeError(f"nothing: its process ended with exit status {self._process.returncode}")
                data += part
                if len(data) == wanted and header:
                    (wanted,) = HEADER.unpack(data)
                    if wanted > LONGEST:
                        self.close()
                        raise RuntimeError(f"{wanted:,} bytes: an answer has at most {LONGEST:,}")
                    data, header = b"", False
                if len(data) == wanted and not header:
                    return self._parsed(data)
                continue
            if deadline is not None and time.monotonic() >= deadline:
                self.close()
                raise TimeoutError
            if watched and (beyond := self._beyond()):
                self.close()
                raise RuntimeError(f"nothing: {beyond}, and was ended")

    def _parsed(self, data: bytes) -> Any:
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            self.close()
            raise RuntimeError(f"what is no answer ({error})") from None
        return answer

    def _beyond(self) -> str:
        """The limit that the processes together have passed; "" if none."""
        limits = self._limits
        if limits.processes is None and limits.memory_gib is None:
            return ""
        found = marked(self._mark)
        if limits.processes is not None and len(found) > limits.processes:
            return f"it had {len(found)} processes, limits.processes is {limits.processes}"
        held = (sum(map(_held, found)) - self._loaded) / 2**30
        if limits.memory_gib is not None and held > limits.memory_gib:
            return f"it held {held:.2f} GiB, limits.memory_gib is {limits.memory_gib}"
        return ""

    def close(self) -> None:
        """Ends the process, its group, and whoever carries its mark."""
        if self._requests.closed:
            return
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        end_marked(self._mark)
        self._process.wait()
        with suppress(OSError):
            self._requests.close()
        os.close(self._answers)


def _held(process: int) -> int:
    """Bytes of a process in RAM; of those that it shares, its part."""
    with suppress(OSError, IndexError, ValueError):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return 0
