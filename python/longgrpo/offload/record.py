"""Records of saved tensors: kept where they are, or offloaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longgrpo._ops import offload as core


class Core:
    """An engine's handle. Records hold it too, so that a graph outlives `close()`."""

    __slots__ = ("__weakref__", "_free", "device", "handle")

    def __init__(self, handle: int, device: torch.device) -> None:
        self.handle = handle
        self.device = device
        self._free = core.free  # module globals may be gone when the interpreter ends

    def __del__(self) -> None:
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
        tensor: Tensor = core.unpack(self.core.handle, self.id, self.size, self.stride, self.dtype, self.core.device)
        return tensor

    def __del__(self) -> None:
        if self._drop is not None:
            self._drop(self.core.handle, self.id)
