"""Files and directories written whole or not at all: next to their place, synced, and renamed into it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from longgrpo.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the error of a disk that is full or fails into one that the command line reports."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); what was saved before is kept: make room, then resume"
        ) from error


def replace_directory(directory: Path, write: Callable[[Path], None], new: bool = False) -> None:
    """Writes a directory by `write(temporary)` and renames it to `directory`, whose old content stays until then.

    Raises UserError if it cannot be written, if another process writes it, and with `new` if it exists.
    """
    temporary, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("tmp", "old"))
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise UserError(f"{directory}: is no directory of its own, and is left as it is: move it away, then try again")
    with writing(directory):
        temporary.mkdir(parents=True, exist_ok=True)
    with _alone(temporary):
        if directory.exists() and new:
            temporary.rmdir()
            raise UserError(f"{directory} exists already: name a new directory")
        if old.exists() and not directory.exists():  # killed between the two renames below
            os.rename(old, directory)
        shutil.rmtree(old, ignore_errors=True)
        _empty(temporary)
        try:
            with writing(directory):
                write(temporary)
                for path in (temporary, *temporary.rglob("*")):
                    sync(path)
                if directory.exists():
                    os.rename(directory, old)
                os.rename(temporary, directory)
                sync(directory.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Raises UserError if another process is in here with the same directory."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another process is writing it: try again when it is done") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _empty(directory: Path) -> None:
    """Of what a process that was killed left in it."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_directory(directory: Path) -> None:
    """Removes a directory whole or not at all, as others see it. What a file system still holds of it (NFS, of a file
    that is open) is left under a name with a dot."""
    doomed = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            temporary.write_text(text, "utf-8")
            sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def read_json(path: Path, remedy: str) -> Any:
    """Raises UserError, which ends with `remedy`, for a file that cannot be read or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
