"""The ranks of a run: processes that torchrun starts, one a GPU, each with a whole engine and its share of a step.

All ranks call the same collectives in the same order. With one rank each returns what it was given, and torch's process
group is not made.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from longgrpo.errors import ConfigError, TrainingError, UserError
from longgrpo.memory.ranks import Layout

T = TypeVar("T")
_ENDING = 5.0  # seconds: a killed process closes its connections, which others notice, some time before it has ended


class RankError(TrainingError):
    """Another rank has failed, and this one ends with it."""


class RankLost(RankError):
    """Another rank has died or hangs: there are no collectives any more."""

    missing: Sequence[int] = ()
    """Which, as far as that is known."""


class Ranks:
    """One rank: every collective is there, and does nothing."""

    rank = 0
    world = 1
    seconds = 0.0
    """Spent in collectives up to now, the wait for other ranks included."""
    lost = False
    """Whether another rank is gone."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and talks."""
        return self.rank == 0

    @property
    def layout(self) -> Layout:
        """Machines, and ranks on each."""
        return Layout(1, self.world)

    def gather(self, value: T, what: str = "values") -> list[T]:
        """What each rank gives, by rank, on all of them. `what` names it in an error."""
        return [value]

    def broadcast(self, value: T, what: str = "a value") -> T:
        """What rank 0 gives."""
        return value

    def sum(self, tensor: Tensor, what: str = "a tensor", *, to: int | None = None) -> None:
        """Adds up a tensor of one shape over the ranks, in place; with `to` only that rank has the sum."""

    def share(self, tensor: Tensor, source: int, what: str = "a tensor") -> None:
        """Copies a tensor of one shape from the rank `source`, in place."""

    def send(self, tensor: Tensor, source: int, to: int, what: str = "a tensor") -> None:
        """Copies a tensor in host memory from a rank to another, in place. What a third rank gives is not looked at."""

    def agree(self, error: BaseException) -> None:
        """Told of an error of this rank, every other raises RankError in its next collective, or has one of its own to
        tell of: then all are at the same place."""

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work()` on each rank, on the first of each machine before the others: it may leave files for them."""
        return work()

    def of_first(self, work: Callable[[], T], what: str = "a value") -> T:
        """What `work()` returns on rank 0; no other rank calls it."""
        return self.broadcast(work() if self.is_first else None, what)  # type: ignore[return-value]

    def mine(self, everything: Sequence[T]) -> Sequence[T]:
        """This rank's part of what all have."""
        return everything[self.rank :: self.world]

    def leave(self) -> None:
        """Waits for the others, unless one is gone, and ends the group."""


ALONE = Ranks()


def merged(parts: Sequence[Sequence[T]]) -> list[T]:
    """What the ranks' parts (Ranks.mine) are of, in its order."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


START = 300.0  # seconds that processes have to start, on machines that may be busy

_joined: list[Group] = []  # at most one


def join(timeout: float) -> Ranks:
    """The ranks that torchrun has started this process with; ALONE without torchrun. timeout: seconds after which a
    rank that does not come to a collective counts as lost.

    To be called before an engine is built: vLLM joins a group that exists, and makes one otherwise. The group lives
    until leave().
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not _joined:
        _joined.append(Group(timeout))
    return _joined[0]


def leave() -> None:
    """Waits for the other ranks, unless one is gone, and ends the group, if there is one."""
    while _joined:
        _joined.pop().leave()


def tells(error: BaseException) -> bool:
    """Whether this rank is to tell the user of the error that it ends with: rank 0 tells of those of all, if it can."""
    if int(os.environ.get("RANK", "0")) == 0:
        return True
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RankLost) and cause.missing:
            return 0 in cause.missing
        if getattr(cause, "agreed", False) or (isinstance(cause, RankError) and not isinstance(cause, RankLost)):
            return False
        cause = cause.__cause__
    return True


class Group(Ranks):
    """The ranks of a torchrun, on gloo for what is in host memory and NCCL for what is on a GPU.

    Each collective begins with a meeting: one number says whether a rank has failed, others whether all are at the same
    place. So an error of one rank ends all, wherever they are, and ranks that have come apart do not exchange garbage.
    """

    def __init__(self, timeout: float) -> None:
        on_gpu = torch.cuda.is_available()
        if on_gpu and torch.cuda.device_count() > 1 and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"this rank sees {torch.cuda.device_count()} GPUs, and its engine would take the first: start with "
                "`longgrpo train --ranks N`, or give torchrun --virtual-local-rank"
            )
        wait = timedelta(seconds=timeout)
        self._timeout, self._count = timeout, 0
        if dist.is_initialized():
            raise ConfigError("torch.distributed has a process group already: make the Trainer before any other engine")
        try:
            begin = timedelta(seconds=max(timeout, START))
            store, self.rank, self.world = next(rendezvous("env://", timeout=begin))
        except ValueError as error:
            raise ConfigError(
                f"RANK and WORLD_SIZE say that this process is a rank, and it cannot meet the others ({error}): "
                "start it with `longgrpo train --ranks N` or torchrun, or unset both"
            ) from error
        except RuntimeError as error:
            raise RankLost(f"the ranks did not all come within {begin.total_seconds():g} s: {error}") from error
        store.set_timeout(wait)
        self._store = PrefixStore("longgrpo", store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        self._arrive()
        self._store.set(f"process/{self.rank}", f"{socket.gethostname()} {os.getpid()}")
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=wait)
        hosts = self.gather(socket.gethostname(), "host names")
        self._leads_machine = hosts.index(hosts[self.rank]) == self.rank
        self._machines = len(set(hosts))

    @property
    def layout(self) -> Layout:
        return Layout(self._machines, -(-self.world // self._machines))

    def gather(self, value: T, what: str = "values") -> list[T]:
        own = pickle.dumps(value)  # before the meeting: what cannot be sent is an error of this rank
        parts: list[Any] = [None] * self.world
        with self._meeting(what):
            dist.all_gather_object(parts, own)
        return [value if rank == self.rank else pickle.loads(part) for rank, part in enumerate(parts)]

    def broadcast(self, value: T, what: str = "a value") -> T:
        box = [pickle.dumps(value) if self.is_first else None]
        with self._meeting(what):
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return value if self.is_first else pickle.loads(box[0] or b"")

    def sum(self, tensor: Tensor, what: str = "a tensor", *, to: int | None = None) -> None:
        with self._meeting(what):
            if to is None:
                dist.all_reduce(tensor)
            else:
                dist.reduce(tensor, dst=to)

    def share(self, tensor: Tensor, source: int, what: str = "a tensor") -> None:
        with self._meeting(what):
            dist.broadcast(tensor, src=source)

    def send(self, tensor: Tensor, source: int, to: int, what: str = "a tensor") -> None:
        with self._meeting(what):
            if source != to and self.rank == source:
                dist.send(tensor, dst=to)
            elif source != to and self.rank == to:
                dist.recv(tensor, src=source)

    def agree(self, error: BaseException) -> None:
        if isinstance(error, RankError) or getattr(error, "agreed", False):
            return  # all have it
        error.agreed = True  # type: ignore[attr-defined]
        with suppress(RankError), self._meeting("an error", error):
            pass

    def in_turn(self, work: Callable[[], T]) -> T:
        if self._leads_machine:
            result = work()
        self.gather(None, "what the first rank of each machine prepares")
        return result if self._leads_machine else work()

    def leave(self) -> None:
        with suppress(RankError):
            if not self.lost:
                self.gather(None, "the end")
        if not self.lost:
            dist.destroy_process_group()

    @contextmanager
    def _meeting(self, what: str, error: BaseException | None = None) -> Iterator[None]:
        if self.lost:
            raise RankLost(f"no rank can be met for {what} any more")
        start = time.perf_counter()
        try:
            self._arrive()
            place = zlib.crc32(what.encode())
            header = torch.tensor([error is not None, place, -place])
            dist.all_reduce(header, dist.ReduceOp.MAX)
            failed, highest, lowest = header.tolist()
            if failed:
                errors: list[Any] = [None] * self.world
                dist.all_gather_object(errors, None if error is None else _told(error))
            elif highest != -lowest:
                raise RankError(f"the ranks have come apart: rank {self.rank} is at {what}, another is elsewhere")
            else:
                yield
                return
        except RuntimeError as problem:  # torch's of a collective; no error of ours is one
            self.lost = True
            raise self._lost(what, time.perf_counter() - start) from problem
        finally:
            self.seconds += time.perf_counter() - start
        first = next(rank for rank, text in enumerate(errors) if text is not None)
        raise RankError(f"rank {first}: {errors[first]}")

    def _arrive(self) -> None:
        """Tells the others, should they miss this rank, how far it is."""
        self._count += 1
        with suppress(RuntimeError):  # the store may be gone with its rank: the collective will say so
            self._store.set(f"at/{self.rank}", str(self._count))

    def _lost(self, what: str, seconds: float) -> RankLost:
        """Says who did not come."""
        try:
            at = [int(self._store.get(f"at/{rank}")) for rank in range(self.world)]
            behind = [rank for rank, count in enumerate(at) if count < self._count]
            missing = self._ended(behind or list(range(self.world)), _ENDING if seconds < self._timeout else 0.0)
        except RuntimeError:
            missing, behind = [0], []
        if missing:
            text = f"rank {', '.join(map(str, missing))} has died: it did not come to {what}"
        elif behind:
            text = (
                f"rank {', '.join(map(str, behind))} did not come to {what} in {seconds:.0f} s: it has died, or hangs, "
                f"or needs longer than train.rank_timeout = {self._timeout:g} s"
            )
        else:
            text = f"a rank was lost during {what}"
        error = RankLost(text)
        error.missing = missing or behind
        return error

    def _ended(self, ranks: list[int], wait: float) -> list[int]:
        """Those whose processes have ended."""
        until = time.monotonic() + wait
        while not (ended := [rank for rank in ranks if self._is_dead(rank)]) and time.monotonic() < until:
            time.sleep(0.05)
        return ended

    def _is_dead(self, rank: int) -> bool:
        """Whether the process of a rank on this machine has ended; one elsewhere cannot be seen."""
        host, pid = self._store.get(f"process/{rank}").decode().rsplit(" ", 1)
        if host != socket.gethostname() or rank == self.rank:
            return False
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
