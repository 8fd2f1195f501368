"""Records of saved tensors: kept where they are, or offloaded."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from longgrpo._ops import offload as core


class Core:
    """An engine's handle. Records hold it too, so that a graph outlives `close()`. A forked child has the handle and
    not the threads that copy: there it is of no use, and waiting for them would never end."""

    __slots__ = ("__weakref__", "_free", "_pid", "_process", "device", "handle")

    def __init__(self, handle: int, device: torch.device) -> None:
        self.handle = handle
        self.device = device
        self._free = core.free  # module globals may be gone when the interpreter ends
        self._pid, self._process = os.getpid, os.getpid()

    @property
    def here(self) -> bool:
        """Whether this process made it."""
        return self._pid() == self._process

    def __del__(self) -> None:
        if self.here:
            self._free(self.handle)


class Record:
    """What a saved-tensor hook leaves in the graph in a tensor's place.

    torch skips its check for in-place changes under saved-tensor hooks and would return a wrong gradient: so it is made
    here.
    """

    __slots__ = ("version", "watch")

    def __init__(self, tensor: Tensor) -> None:
        # detach() shares the version counter, and without the graph a saved output makes no reference cycle.
        self.watch = tensor.detach()
        self.version = tensor._version

    def unpack(self) -> Tensor:
        raise NotImplementedError

    def check(self) -> None:
        if self.watch._version != self.version:
            raise RuntimeError(
                f"a tensor saved for the backward was changed in place: it is at version {self.watch._version}, "
                f"expected version {self.version}. Use the out-of-place operation, or change it before it is saved"
            )


class Kept(Record):
    """A saved tensor that stays where it is."""

    __slots__ = ()

    def unpack(self) -> Tensor:
        self.check()
        return self.watch


class Offloaded(Record):
    __slots__ = ("_drop", "core", "dtype", "id", "size", "stride")

    def __init__(self, tensor: Tensor, engine: Core, group: int) -> None:
        super().__init__(tensor)
        self.core = engine
        self.size, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self._drop: Callable[[int, int], None] | None = None
        self.id = core.pack(engine.handle, tensor.detach(), group)
        self._drop = core.drop
        self.watch.data = tensor.new_empty(0)  # the version counter without the memory

    def unpack(self) -> Tensor:
        self.check()
        if not self.core.here:
            raise RuntimeError("a tensor offloaded before a fork comes back in the parent, not in the child")
        tensor: Tensor = core.unpack(self.core.handle, self.id, self.size, self.stride, self.dtype, self.core.device)
        return tensor

    def __del__(self) -> None:
        if self._drop is not None and self.core.here:
            self._drop(self.core.handle, self.id)
