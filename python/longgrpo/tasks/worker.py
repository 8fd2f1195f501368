"""The process of an isolated reward function (longgrpo.tasks.isolated): requests come in as pickle, from the trainer;
answers go out as JSON."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import json
import os
import pickle
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from longgrpo.tasks.processes import MARK, end_marked

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


def main() -> None:
    requests, answers = os.fdopen(int(sys.argv[1]), "rb"), os.fdopen(int(sys.argv[2]), "wb")
    for pipe in (requests, answers):
        os.set_inheritable(pipe.fileno(), False)
    trainer = os.getppid()
    spec, limits, path = _read(requests)
    os.environ.pop("PYTHONPATH", None)  # the trainer's sys.path, which is the function's, but not its children's
    os.environ.update({} if path is None else {"PYTHONPATH": path})
    try:
        if not limits.network:
            _leave_network()  # before there are threads
        threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()
        import transformers.trainer_callback  # noqa: F401 - the first call's trainer_state would wait for it

        from longgrpo.tasks.load_reward import find_reward

        function = find_reward(spec)
        _limit(limits)
    except BaseException as error:
        _write(answers, str(error) or type(error).__name__)
        return
    _write(answers, None)
    loop = asyncio.new_event_loop()  # one for all calls: what a function keeps on it stays usable
    while (arguments := _read(requests)) is not None:
        _write(answers, _called(function, arguments, loop))


def _called(function: Any, arguments: dict[str, Any], loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    from longgrpo.tasks.isolated import Notes

    notes, here = Notes(), os.getpid()
    try:
        values = function(**arguments, **notes.arguments())
        if inspect.isawaitable(values):
            values = loop.run_until_complete(values)
        if values is not None and not isinstance(values, bool | int | float | str):
            values = list(values)
        answer = {"values": plain(values), "extra": plain(notes.extra), "metrics": plain(notes.metrics)}
    except BaseException as error:  # a function's sys.exit() as well
        answer = {"error": f"{type(error).__name__}: {error}"}
    if os.getpid() != here:
        os._exit(0)  # a child that the function forked, and that came back from it
    return answer


def plain(value: Any) -> Any:
    """A value as JSON has it: what it does not have is its text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # numpy's and torch's
        return plain(value.tolist())
    return str(value)


def _limit(limits: Any) -> None:
    """limits.memory_gib holds for what is allocated from here on, in each process; what they hold together, and how
    many they are, the trainer looks at as well."""
    if limits.memory_gib is not None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _set(resource.RLIMIT_AS, mapped + int(limits.memory_gib * 2**30))
    if limits.file_size_mib is not None:
        _set(resource.RLIMIT_FSIZE, int(limits.file_size_mib * 2**20))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError then, as of a full disk
    _set(resource.RLIMIT_CORE, 0)


def _set(kind: int, size: int) -> None:
    hard = resource.getrlimit(kind)[1]
    size = size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(kind, (size, size))


def _leave_network() -> None:
    """Into a network namespace of its own, which has no way out. Raises OSError if the kernel does not allow that."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET) == 0:  # root may
        return
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        raise OSError(
            f"limits.network: false: the kernel does not allow a network namespace here "
            f"({os.strerror(ctypes.get_errno())}); run the function in a container without a network instead"
        )
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)


def _end_with(trainer: int) -> None:
    """Ends all that carries this worker's mark when the trainer has ended, also in the middle of a call."""
    while os.getppid() == trainer:
        time.sleep(0.5)
    end_marked(os.environ[MARK], but=os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)


def _read(pipe: BinaryIO) -> Any:
    header = pipe.read(8)
    return pickle.loads(pipe.read(int.from_bytes(header, "little"))) if len(header) == 8 else None


def _write(pipe: BinaryIO, value: Any) -> None:
    data = json.dumps(value).encode()
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


if __name__ == "__main__":
    main()
