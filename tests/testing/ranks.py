"""Ranks as torchrun starts them, forked from a server that has imported everything once."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

PRELOADED = [
    "longgrpo.run.trainer", "longgrpo.cli", "longgrpo.train.ranks", "peft", "reasoning_gym",
    "transformers.models.llama", "testing.ranks",
]  # fmt: skip


class Ended(NamedTuple):
    status: int | None  # negative: by that signal; None: it still ran, and was killed
    said: str


@functools.cache
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Ranked:
    """`world` processes that each run target(*arguments); said by them goes to `logs`."""

    def __init__(self, world: int, logs: Path, target: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self._logs = [logs / f"rank-{rank}.log" for rank in range(world)]
        self.processes: list[BaseProcess] = [
            server().Process(target=_rank, args=(rank, world, port, log, environment, target, arguments))
            for rank, log in enumerate(self._logs)
        ]
        for process in self.processes:
            process.start()

    def end(self, seconds: float = 300) -> list[Ended]:
        """Waits for all, and kills those that need longer."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(until - time.monotonic(), 0))
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return [Ended(status, log.read_text()) for status, log in zip(statuses, self._logs, strict=True)]


def run_ranks(world: int, logs: Path, target: Callable[..., Any], *arguments: Any, **environment: str) -> list[Ended]:
    return Ranked(world, logs, target, *arguments, **environment).end()


def _rank(
    rank: int, world: int, port: int, log: Path, environment: dict[str, str], target: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    own = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1", **environment)
    sys.stdout.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.exit(target(*arguments))


# ---- targets


def command(*arguments: str) -> int:
    """The command line."""
    from longgrpo.cli import main

    return main(list(arguments))


def train_all(trees: dict[str, dict[str, Any]], directory: Path) -> None:
    """A run of each tree, in directory/NAME, one after the other."""
    from longgrpo.config.run import build_config
    from longgrpo.run.trainer import Trainer
    from longgrpo.train.ranks import leave

    for name, tree in trees.items():
        Trainer(build_config(tree), directory / name).run()
    leave()
