"""Whose a run's directory is: one process works on it at a time, and a run writes only over what it made.

RUN/.longgrpo lists, a name a line, what the run has made in the directory. Everything else in it is left alone. A
process that works on the run holds a lock on this file, which the kernel drops when the process ends, however it ends
(a record lock, which NFS has too).
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from longgrpo.config.run import TrainConfig
from longgrpo.errors import ConfigError
from longgrpo.run import checkpoint
from longgrpo.run.files import remove_directory, writing

log = logging.getLogger(__name__)

MARK = ".longgrpo"
HEAD = "# What this run of longgrpo has made here, a name a line. It writes over nothing else.\n"
UNMARKED = ("config.yaml", "metrics.jsonl")
"""What a run that was made before there was a mark has in any case."""

_held: set[tuple[int, int]] = set()
"""Device and inode of the marks that this process has locked: a process's record locks do not exclude itself, and
closing any descriptor of such a file would drop them."""


def names_at_end(config: TrainConfig) -> list[str]:
    """What stands at the top of a run's directory of its end: it is of the newest saved step, or is not there."""
    sets = [f"_{name}" if name else "" for name in config.task.held_out]
    return ["adapter" if config.lora else "model", "summary.json", *(f"eval_after{name}.json" for name in sets)]


def names_of(config: TrainConfig) -> tuple[list[str], list[str]]:
    """What a run writes into its directory: from its beginning on, and at its end."""
    begun = ["config.yaml", "metrics.jsonl", "checkpoints", "evaluations"]
    begun += [name for name in config.log.to if name != "trackio"]  # has a folder of its own
    begun += ["run_id"] if {"wandb", "trackio"} & set(config.log.to) else []
    begun += ["completions"] if config.log.completions != 0 else []
    begun += ["tiles.json"] if config.memory.autotune is not False else []
    sets = [f"_{name}" if name else "" for name in config.task.held_out]
    begun += [f"eval_{when}{name}.json" for when in ("before", "prefill") for name in sets]
    return begun, names_at_end(config)


class Claim:
    """The right to write in a run's directory, until close() or the end of the process.

    Raises ConfigError for a directory that cannot be written, or that another process, or another Trainer of this one,
    works on.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self._mark, self._new = directory, directory / MARK, not directory.exists()
        with suppress(OSError):
            if _key(os.stat(self._mark)) in _held:
                raise ConfigError(f"{directory}: another Trainer of this process works on this run: close() it first")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            while (descriptor := self._locked()) is None:
                pass
        except OSError as error:
            raise ConfigError(f"{directory}: no run can be written there ({error.strerror})") from error
        facts = os.fstat(descriptor)
        _held.add(_key(facts))
        self._descriptor, self.close = descriptor, weakref.finalize(self, _release, descriptor, _key(facts))
        content = os.pread(descriptor, facts.st_size, 0)
        whole = content[: content.rfind(b"\n") + 1]
        os.ftruncate(descriptor, len(whole))  # a killed process leaves half a line
        self.made = {line for line in whole.decode(errors="replace").splitlines() if not line.startswith("#")}
        """The names that the run has made."""

    def _locked(self) -> int | None:
        """The descriptor of the mark, locked; None if it was removed meanwhile."""
        descriptor = os.open(self._mark, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise ConfigError(
                    f"{self.directory}: another process works on this run: wait until it has ended"
                ) from None
            log.warning("%s: its file system has no locks (%s): start one process at a time", self.directory, error)
        with suppress(OSError):
            if _key(os.stat(self._mark)) == _key(os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)
        return None

    @property
    def holds_run(self) -> bool:
        """Whether a run has begun in the directory."""
        unmarked = all((self.directory / name).is_file() for name in UNMARKED)
        return unmarked or ("config.yaml" in self.made and (self.directory / "config.yaml").exists())

    def adopt(self, config: TrainConfig) -> None:
        """Makes the names that there are of a run from before the mark its own, but for what the run reads."""
        if not self.holds_run:
            return
        begun, ended = names_of(config)
        lora = [config.lora.path, config.lora.merged] if config.lora else []
        read = [Path(path).resolve() for path in (config.model.path, *lora) if path]
        there = [self.directory / name for name in (*begun, *ended) if os.path.lexists(self.directory / name)]
        self._write([own.name for own in there if not any(path.is_relative_to(own.resolve()) for path in read)])

    def add(self, names: Iterable[str]) -> None:
        """Makes names the run's own, before what they name is made. Raises ConfigError as check() does."""
        fresh = [name for name in names if name not in self.made]
        self.check(fresh)
        self._write(fresh)

    def check(self, names: Iterable[str]) -> None:
        """Raises ConfigError if one of the names exists and is not the run's."""
        for name in names:
            if name not in self.made and os.path.lexists(self.directory / name):
                raise ConfigError(
                    f"{self.directory / name} exists, this run has not made it and would write over it: move it away, "
                    "or set another output_dir"
                )

    def _write(self, names: list[str]) -> None:
        text = "".join(f"{name}\n" for name in names)
        with writing(self._mark):
            os.write(self._descriptor, ((HEAD if os.fstat(self._descriptor).st_size == 0 else "") + text).encode())
            os.fsync(self._descriptor)
        self.made |= set(names)

    def withdraw_end(self, step: int) -> None:
        """Removes what the run has made of an earlier end (names_at_end), unless `step` is that end, saved already."""
        if step in map(checkpoint.step_of, checkpoint.checkpoints(self.directory)):
            return
        of_an_end = ("adapter", "model", "summary.json")
        for path in (self.directory / n for n in self.made if n in of_an_end or n.startswith("eval_after")):
            with writing(path):
                if path.is_dir() and not path.is_symlink():
                    remove_directory(path)
                else:
                    path.unlink(missing_ok=True)

    def undo(self) -> None:
        """Takes the claim back, if nothing was made: the directory is as it was."""
        if not self.made:
            with suppress(OSError):
                self._mark.unlink()
            if self._new:
                with suppress(OSError):
                    self.directory.rmdir()
        self.close()


class Unclaimed(Claim):
    """Of a rank that writes nothing: rank 0 has the claim."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.made = directory, set()

    def adopt(self, config: TrainConfig) -> None:
        pass

    def add(self, names: Iterable[str]) -> None:
        pass

    def check(self, names: Iterable[str]) -> None:
        pass

    def withdraw_end(self, step: int) -> None:
        pass

    def undo(self) -> None:
        pass

    def close(self) -> None:  # type: ignore[override]
        pass


def claim_new(parent: Path, name: str) -> Claim:
    """A claim of parent/name, made now, or parent/name-2 and so on: a second run never touches the first."""
    for candidate in itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2))):
        directory = parent / candidate
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{directory}: no run can be written there ({error.strerror})") from error
        claim = Claim(directory)
        claim._new = True
        return claim
    raise AssertionError


def _key(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _release(descriptor: int, key: tuple[int, int]) -> None:
    os.close(descriptor)
    _held.discard(key)
