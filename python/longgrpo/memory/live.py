"""Counting storages while code runs: what is alive, over time, and the peak. Works on any device, `meta`
included, where nothing is allocated at all."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longgrpo._ops import offload as core
from longgrpo.memory.internal import ring_bytes

_ITEM = torch.ops.aten._local_scalar_dense.default
_COPY = torch.ops.aten._to_copy.default
_UNPACK = core.unpack

Internal = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], int]
"""(op, args, kwargs, result) -> bytes that the op holds while it runs, besides what it takes and returns."""


class LiveStorages(TorchDispatchMode):
    """Within it every storage that an op returns counts until it dies.

    A dispatch mode does not see what an op allocates inside: `internal` states it, for the ops that it knows.
    """

    def __init__(self, internal: Internal = lambda *_: 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.now = self.peak = 0  # bytes
        self.label = "activations"
        """What new storages are counted as."""
        self.by_label: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._internal = internal
        self._alive: set[int] = set()
        self._slot = 0  # bytes of the largest record that the offload engine has brought back

    def add(self, tensors: Iterable[Any], label: str | None = None) -> None:
        """Counts the storages of `tensors` that are not counted yet."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._count(tensor.untyped_storage(), label or self.label)

    def hold(self, count: int, label: str) -> None:
        """Counts `count` bytes more (or fewer) that belong to no storage."""
        self.now += count
        self.by_label[label] += count
        self._look(0)

    def reset_peak(self) -> None:
        self.peak, self.at_peak = self.now, self.by_label.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ITEM and args[0].is_meta:
            return 1.0  # there is no value: any that no code refuses
        if func is _COPY and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        before = self.now
        if func is _UNPACK:  # into a slot of the engine, which is counted as a whole
            self._lent(result.untyped_storage())
        self.add(tree_leaves(result))
        if inside := self._internal(func, args, kwargs, result):
            self._look(inside, func)
        elif self.now > before:
            self._look(0)
        return result

    def _count(self, storage: torch.UntypedStorage, label: str) -> None:
        if storage._cdata in self._alive:
            return
        size = storage.nbytes()
        self.now += size
        self.by_label[label] += size
        self._watch(storage, size, label)

    def _watch(self, storage: torch.UntypedStorage, size: int, label: str) -> None:
        self._alive.add(storage._cdata)
        weakref.finalize(storage, self._forget, storage._cdata, size, label).atexit = False

    def _lent(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._alive:
            return  # the source itself, which had not left
        self._watch(storage, 0, self.label)
        if storage.nbytes() > self._slot:
            self.hold(ring_bytes(storage.nbytes()) - ring_bytes(self._slot), "offload's slots")
            self._slot = storage.nbytes()

    def _forget(self, key: int, size: int, label: str) -> None:
        self._alive.discard(key)
        self.now -= size
        self.by_label[label] -= size

    def _look(self, inside: int, op: Any = None) -> None:
        if self.now + inside > self.peak:
            self.peak = self.now + inside
            self.at_peak = self.by_label.copy()
            if inside:
                self.at_peak[f"inside {op.name()}"] = inside
