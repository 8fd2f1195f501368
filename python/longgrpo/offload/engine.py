"""`OffloadEngine`: the Python face of the offload core.

Two hook calls for each saved tensor, one when the forward saves it and one when the backward wants it, and a small record between
them whose death frees the host memory. Copies, events and memory are the core's business (csrc/offload/engine.h).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from longgrpo._ops import offload as core
from longgrpo.offload import checkpoint as checkpoints

_BACKENDS = ("auto", "cuda", "host", "count")
_ON_FULL = ("keep", "pageable", "raise")
_SHORT = 512  # tokens; below this a copy's latency outweighs what its layer computes meanwhile
_EMPTY = torch.empty(0)

Module = TypeVar("Module", bound=torch.nn.Module)


class _Core:
    """An engine's handle. Records hold it too, so that a graph outlives `close()`."""

    __slots__ = ("__weakref__", "_free", "device", "handle")

    def __init__(self, handle: int, device: torch.device) -> None:
        self.handle = handle
        self.device = device
        self._free = core.free  # module globals may be gone when the interpreter ends

    def __del__(self) -> None:
        self._free(self.handle)


class _Versioned:
    """torch skips its check for in-place changes under saved-tensor hooks and would return a wrong gradient: so it is made here."""

    __slots__ = ("version", "watch")

    def __init__(self, tensor: Tensor) -> None:
        # detach() shares the version counter, and without the graph a saved output makes no reference cycle.
        self.watch = tensor.detach()
        self.version = tensor._version

    def check(self) -> None:
        if self.watch._version != self.version:
            raise RuntimeError(
                f"a tensor saved for the backward was changed in place: it is at version {self.watch._version}, "
                f"expected version {self.version}. Use the out-of-place operation, or change it before it is saved"
            )


class _Kept(_Versioned):
    """A saved tensor that stays where it is."""

    __slots__ = ()

    def unpack(self) -> Tensor:
        self.check()
        return self.watch


class _Offloaded(_Versioned):
    __slots__ = ("_drop", "core", "dtype", "id", "size", "stride")

    def __init__(self, tensor: Tensor, engine: _Core) -> None:
        super().__init__(tensor)
        self.core = engine
        self.size, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self._drop: Callable[[int, int], None] | None = None
        self.id = core.pack(engine.handle, tensor.detach())
        self._drop = core.drop
        self.watch.data = _EMPTY.to(tensor.dtype) if tensor.is_cpu else tensor.new_empty(0)  # the counter without the memory

    def unpack(self) -> Tensor:
        self.check()
        return core.unpack(self.core.handle, self.id, self.size, self.stride, self.dtype, self.core.device)

    def __del__(self) -> None:
        if self._drop is not None:
            self._drop(self.core.handle, self.id)


Record = _Kept | _Offloaded


class OffloadEngine:
    """Moves tensors saved for the backward to host memory while the forward runs, and back one layer ahead of the backward.

    Args:
        host_bytes: budget of host memory; "auto" takes what the cgroup and the machine have left, shared by the node's ranks.
        prefetch: records brought back ahead of the backward.
        inflight: sources that may live on behind their copy out.
        keep_last: the newest records, which stay on the device because the backward wants them first.
        min_bytes: smaller tensors are kept on the device.
        on_full: what happens to a tensor when the budget is spent: "keep" it on the device, put it in "pageable" memory, "raise".
        backend: "auto" takes "cuda" for CUDA tensors and "host" for CPU tensors; "count" moves nothing and only keeps accounts.
        schedule, poison: the host backend's, for tests: "threaded", "lazy" or "seeded:N"; fill memory with NaN before its use.

    One engine serves one device, that of the first tensor it sees, any number of models on it and any number of graphs at once.

    Raises:
        ValueError: a negative size or an unknown name.
    """

    def __init__(
        self,
        host_bytes: int | str = "auto",
        prefetch: int = 1,
        inflight: int = 2,
        keep_last: int = 1,
        min_bytes: int = 1 << 20,
        on_full: str = "keep",
        backend: str = "auto",
        schedule: str = "threaded",
        poison: bool = False,
    ) -> None:
        for name, value, least in (
            ("prefetch", prefetch, 0), ("inflight", inflight, 1), ("keep_last", keep_last, 0), ("min_bytes", min_bytes, 0),
        ):  # fmt: skip
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, not {value!r}")
        if host_bytes != "auto" and (not isinstance(host_bytes, int) or host_bytes < 0):
            raise ValueError(f"host_bytes must be 'auto' or a number of bytes >= 0, not {host_bytes!r}")
        if on_full not in _ON_FULL:
            raise ValueError(f"on_full must be one of {', '.join(_ON_FULL)}, not {on_full!r}")
        if backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, not {backend!r}")
        kind, _, seed = schedule.partition(":")
        if not (schedule in ("threaded", "lazy") or (kind == "seeded" and seed.isdecimal())):
            raise ValueError(f"schedule must be 'threaded', 'lazy' or 'seeded:N', not {schedule!r}")
        self._host_bytes = core.host_budget() if host_bytes == "auto" else int(host_bytes)
        self._depths = (prefetch, inflight, keep_last)
        self._min_bytes, self._on_full = min_bytes, on_full
        self._backend, self._schedule, self._poison = backend, schedule, poison
        self._core: _Core | None = None
        self._open_lock = threading.Lock()
        self._closed = False
        self._off = False  # unified memory: nothing to gain
        self._local = threading.local()
        self._reported: set[str] = set()
        self._invisible = 0

    # ---- use ----

    @contextmanager
    def hooks(self) -> Iterator[OffloadEngine]:
        """Offloads every tensor that autograd saves in this region, apart from parameters and what is smaller than `min_bytes`.

        Meant for a region of non-reentrant checkpoints (`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`): of those,
        hooks see the tensors passed by position and nothing else. Hidden states passed by keyword stay on the device.
        """
        self._check_open()
        seen = self._seen
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield self
        if torch.is_grad_enabled() and self._seen == seen and not self._disabled:
            self.report("nothing was saved for the backward in an offload region. Checkpointed functions must take their hidden "
                        "states by position: saved-tensor hooks cannot see tensors passed by keyword")  # fmt: skip

    def checkpoint(self, fn: Callable[..., Any], *args: Any, selective: bool = False, **kwargs: Any) -> Any:
        """`torch.utils.checkpoint.checkpoint(fn, *args, use_reentrant=False, **kwargs)` with the inputs offloaded.

        With `selective` the output and log-sum-exp of attention are offloaded too, and the recompute takes them from there. This applies
        where attention is one dispatcher op without dropout (SDPA's fused kernels, flash-attn); it is reported where there was none.
        """
        return checkpoints.checkpoint(self, fn, *args, selective=selective, **kwargs)

    def install(self, model: Module, *, selective: bool = False) -> Module:
        """Switches gradient checkpointing on in a transformers model (or its PEFT wrapper), through this engine. Returns the model."""
        return checkpoints.install(self, model, selective=selective)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """On this thread nothing is offloaded inside; what was packed before can still come back."""
        before, self._local.disabled = self._disabled, True
        try:
            yield
        finally:
            self._local.disabled = before

    def stats(self) -> dict[str, float]:
        """Bytes, counts and seconds since the engine was made; rates in GB/s.

        packs, bytes_out, bytes_in; unpacks: resident (never left), hits (prefetched), misses (loaded on demand); keeps, pageable: the
        arena was full; invisible: bytes of hidden states passed by keyword; host_live / peak / committed / pinned / budget; device_live /
        peak: what the engine itself holds on the device; stall_forward_s, stall_backward_s: time compute waited for a copy.
        """
        raw: dict[str, float] = dict.fromkeys(core.STATS, 0) if self._core is None else dict(core.stats(self._core.handle))
        out = {name: value for name, value in raw.items() if not name.endswith("_ns")}
        out["host_budget"], out["invisible"] = self._host_bytes, self._invisible
        out["gb_per_s_out"] = raw["bytes_out"] / max(raw["copy_out_ns"], 1)
        out["gb_per_s_in"] = raw["bytes_in"] / max(raw["copy_in_ns"], 1)
        out |= {name[:-3] + "_s": value / 1e9 for name, value in raw.items() if name.endswith("_ns")}
        return out

    def synchronize(self) -> None:
        """Waits until no copy is in flight and the host memory of every dropped record is free."""
        if self._core is not None:
            core.sync(self._core.handle)

    def close(self) -> None:
        """No more packing. Memory is freed now, or when the last graph that still holds a record is gone."""
        self._closed = True
        self._core = None

    def __enter__(self) -> OffloadEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- records ----

    def pack(self, tensor: Tensor) -> Record:
        """A record of the tensor, offloaded where that is possible and worth it."""
        if not self._worth_it(tensor):
            return _Kept(tensor)
        engine = self._core or self._open(tensor.device)
        if self._off or tensor.device != engine.device:
            return _Kept(tensor)
        if tensor.dim() and tensor.numel() // tensor.shape[-1] < _SHORT:
            self.report(f"a saved tensor of shape {tuple(tensor.shape)} has fewer than {_SHORT} tokens: its copies take longer than "
                        "the layer they hide behind. Offload gains with longer sequences; raise min_bytes to keep these")  # fmt: skip
        return _Offloaded(tensor, engine)

    def _worth_it(self, tensor: Tensor) -> bool:
        if tensor.nbytes < self._min_bytes or type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return False
        base = tensor._base if tensor._is_view() else tensor
        if isinstance(base, torch.nn.Parameter) or (base is not None and base.is_leaf and base.requires_grad):
            return False  # weights and the caller's own leaves live on anyway
        if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return False
        span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        return span <= 2 * tensor.numel()  # a thin slice of something large: its neighbours would travel with it

    def _pack(self, tensor: Tensor) -> Record:
        self._local.seen = self._seen + 1
        if self._disabled:
            return _Kept(tensor)
        self._check_open()
        return self.pack(tensor)

    @staticmethod
    def _unpack(record: Record) -> Tensor:
        return record.unpack()

    @property
    def _disabled(self) -> bool:
        return getattr(self._local, "disabled", False)

    @property
    def _seen(self) -> int:
        return getattr(self._local, "seen", 0)

    # ---- the core ----

    def _open(self, device: torch.device) -> _Core:
        with self._open_lock:
            self._check_open()
            if self._core is None:
                backend = self._backend
                if backend == "auto":
                    backend = "cuda" if device.type == "cuda" else "host"
                handle = core.new(
                    backend,
                    device,
                    host_bytes=self._host_bytes,
                    depths=self._depths,
                    on_full=self._on_full,
                    schedule=self._schedule,
                    poison=self._poison,
                )
                self._core = _Core(handle, device)
                self._off = core.unified(handle)
                if self._off:
                    self.report(f"{device} shares its memory with the host: offload gains nothing there and is off")
            return self._core

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this OffloadEngine is closed: make a new one")

    def report(self, text: str) -> None:
        """Warns once for each kind of message."""
        kind = text[:24]
        if kind not in self._reported:
            self._reported.add(kind)
            warnings.warn(f"offload: {text}", stacklevel=3)

    def report_invisible(self, name: str, tensor: Tensor) -> None:
        """Hidden states that go by keyword are counted, and reported with the remedy."""
        if tensor.nbytes < self._min_bytes:
            return
        self._invisible += tensor.nbytes
        self.report(f"keyword tensor {name!r} ({tensor.nbytes} bytes) of a checkpointed function stays on the device: saved-tensor hooks "
                    f"see tensors passed by position alone. Call it as layer({name}, ...) and not layer({name}={name}, ...)")  # fmt: skip
