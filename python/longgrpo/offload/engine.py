"""`OffloadEngine`: the Python face of the offload core.

Two hook calls for each saved tensor, one when the forward saves it and one when the backward needs it, with a
small record between them that frees the host memory when it dies. Copies, events and memory are the core's
(csrc/offload/engine.h).
"""

from __future__ import annotations

import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from longgrpo._ops import offload as core
from longgrpo.offload.attention import attention_contexts
from longgrpo.offload.record import Core, Kept, Offloaded, Record

_BACKENDS = ("auto", "cuda", "host", "count")
_ON_FULL = ("keep", "pageable", "raise")
_SHORT = 512  # tokens; below this a copy's latency outweighs what its layer computes meanwhile

Module = TypeVar("Module", bound=torch.nn.Module)


class _Thread(threading.local):
    disabled = False
    seen = 0  # tensors that hooks saw


class OffloadEngine:
    """Moves tensors saved for the backward to host memory, and back one layer ahead of the backward.

    Args:
        host_bytes: budget of host memory; "auto": what cgroup and machine have left, shared by the ranks of the node.
        prefetch: number of records brought back ahead of the backward.
        inflight: number of tensors that may stay on the device until they are copied to the host.
        keep_last: number of the newest records, which stay on the device because the backward needs them first.
        min_bytes: smaller tensors are kept on the device.
        on_full: when the budget is spent, "keep" a tensor on the device, put it in "pageable" memory, or "raise".
        backend: "auto" takes "cuda" for CUDA and "host" for CPU tensors; "count" moves nothing and only counts.

    One engine serves one device, that of the first tensor it sees, with any number of models and graphs at a time.

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
    ) -> None:
        _require_at_least(0, prefetch=prefetch, keep_last=keep_last, min_bytes=min_bytes)
        _require_at_least(1, inflight=inflight)
        if host_bytes != "auto" and (not isinstance(host_bytes, int) or host_bytes < 0):
            raise ValueError(f"host_bytes must be 'auto' or a number of bytes >= 0, not {host_bytes!r}")
        if on_full not in _ON_FULL:
            raise ValueError(f"on_full must be one of {', '.join(_ON_FULL)}, not {on_full!r}")
        if backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, not {backend!r}")
        self._host_bytes = core.host_budget() if host_bytes == "auto" else int(host_bytes)
        self._depths = (prefetch, inflight, keep_last)
        self._min_bytes, self._on_full, self._backend = min_bytes, on_full, backend
        self._core: Core | None = None
        self._opening = threading.Lock()
        self._closed = False
        self._unified = False
        self._groups = itertools.count()
        self._local = _Thread()
        self._reported: set[str] = set()
        self._invisible = 0

    # ---- use ----

    @contextmanager
    def hooks(self) -> Iterator[OffloadEngine]:
        """Offloads what autograd saves in this region, except weights and tensors smaller than `min_bytes`.

        Meant for a region of non-reentrant checkpoints (`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`):
        of those, hooks see the tensors passed by position and nothing else. Hidden states passed by keyword stay on
        the device.
        """
        seen = self._local.seen
        with self._saving(lambda: next(self._groups)):
            yield self
        if torch.is_grad_enabled() and self._local.seen == seen and not self._local.disabled:
            self._report(
                "nothing was saved for the backward in an offload region. Checkpointed functions must take their "
                "hidden states by position: saved-tensor hooks cannot see tensors passed by keyword"
            )

    def checkpoint(self, fn: Callable[..., Any], *args: Any, selective: bool = False, **kwargs: Any) -> Any:
        """`torch.utils.checkpoint.checkpoint(fn, *args, use_reentrant=False, **kwargs)` with offloaded inputs.

        With `selective` the output and log-sum-exp of attention are offloaded too, and the recompute reads them
        back. This applies if attention is one dispatcher op without dropout (SDPA's fused kernels, flash-attn); a
        checkpoint without one is reported and recomputes everything.
        """
        if kwargs.setdefault("use_reentrant", False):
            raise ValueError("offload works with non-reentrant checkpoints: pass use_reentrant=False, or nothing")
        if self._local.disabled or not torch.is_grad_enabled():  # an outer checkpoint's recompute brings the input back
            return torch_checkpoint(fn, *args, **kwargs)
        group = next(self._groups)
        self._report_keywords({**fn.keywords, **kwargs} if isinstance(fn, functools.partial) else kwargs)
        if selective:
            if "context_fn" in kwargs:
                raise ValueError("selective=True brings its own context_fn: pass one or the other")
            if _compiled(fn):
                self._report(
                    "a compiled function runs eagerly in a selective checkpoint, whose dispatch mode torch.compile "
                    "does not see: leave selective out, or compile the whole step"
                )
            pack = functools.partial(self.pack, group=group)
            kwargs["context_fn"] = functools.partial(attention_contexts, pack, self._report)

        def inner(*args: Any, **kwargs: Any) -> Any:
            with self.disabled():
                return fn(*args, **kwargs)

        # These hooks see the checkpoint save its inputs; inside it, its own hooks are the innermost.
        with self._saving(lambda: group):
            return torch_checkpoint(inner, *args, **kwargs)

    def install(self, model: Module, *, selective: bool = False) -> Module:
        """Switches on gradient checkpointing in a transformers model (or its PEFT wrapper), through this engine."""
        wrapped: Any = model  # the library does without the classes of transformers and PEFT
        if not hasattr(wrapped, "gradient_checkpointing_enable"):
            name = type(model).__name__
            raise TypeError(f"{name} is not a transformers model: call its layers as engine.checkpoint(layer, hidden)")
        wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in wrapped.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = functools.partial(self.checkpoint, selective=selective)
        return model

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Offloads nothing on this thread within the block; tensors packed before can still come back."""
        before, self._local.disabled = self._local.disabled, True
        try:
            yield
        finally:
            self._local.disabled = before

    def stats(self) -> dict[str, float]:
        """Bytes, counts, seconds and GB/s since the engine was created.

        packs, bytes_out, bytes_in
        resident, hits, misses: unpacks of tensors that never left, that were prefetched, that were loaded on demand
        keeps, pageable: tensors for which the arena had no room
        invisible: bytes of hidden states passed by keyword
        host_live, host_peak, host_committed, host_pinned, host_budget
        device_live, device_peak: what the engine itself holds on the device
        stall_forward_s, stall_backward_s: how long compute waited for a copy
        copy_out_s, copy_in_s, gb_per_s_out, gb_per_s_in
        """
        raw = core.stats(self._core.handle) if self._core and self._core.here else dict.fromkeys(core.STATS, 0)
        out: dict[str, float] = {name: n for name, n in raw.items() if not name.endswith("_ns")}
        out |= {name.removesuffix("_ns") + "_s": n / 1e9 for name, n in raw.items() if name.endswith("_ns")}
        for way in ("out", "in"):
            ns = raw[f"copy_{way}_ns"]
            out[f"gb_per_s_{way}"] = raw[f"bytes_{way}"] / ns if ns else 0.0
        out["host_budget"], out["invisible"] = self._host_bytes, self._invisible
        return out

    def synchronize(self) -> None:
        """Waits until no copy is in flight and the host memory of every dropped record is free."""
        if self._core is not None and self._core.here:
            core.sync(self._core.handle)

    def close(self) -> None:
        """Stops packing. Memory is freed now, or when the last graph that still holds a record is gone."""
        self._closed = True
        self._core = None

    def __enter__(self) -> OffloadEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- records ----

    def pack(self, tensor: Tensor, group: int | None = None) -> Record:
        """A record of the tensor, offloaded if that is possible and worth it; `record.unpack()` brings it back.

        Records of one group come back together, in the order of packing; by default a record is a group by itself.
        """
        self._check_open()
        if not self._worth_it(tensor):
            return Kept(tensor)
        engine = self._core if self._core and self._core.here else self._open(tensor.device)
        if self._unified or tensor.device != engine.device:
            return Kept(tensor)
        if tensor.dim() and tensor.numel() < _SHORT * tensor.shape[-1]:
            self._report(
                f"a saved tensor of shape {tuple(tensor.shape)} has fewer than {_SHORT} tokens: its copies take longer "
                "than the layer they hide behind. Offload gains with longer sequences; a larger min_bytes keeps these"
            )
        return Offloaded(tensor, engine, next(self._groups) if group is None else group)

    def _worth_it(self, tensor: Tensor) -> bool:
        if tensor.nbytes < self._min_bytes or type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return False
        base = tensor._base if tensor._is_view() else tensor
        if isinstance(base, torch.nn.Parameter) or (base is not None and base.is_leaf and base.requires_grad):
            return False  # weights and other leaves live on anyway: their AccumulateGrad node holds them
        if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return False
        span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        return span <= 2 * tensor.numel()  # a thin slice of something large: its neighbors would travel with it

    # ---- hooks ----

    def _saving(self, group: Callable[[], int]) -> torch.autograd.graph.saved_tensors_hooks:
        """The saved-tensor hooks; `group` names the group of each tensor."""
        self._check_open()

        def pack(tensor: Tensor) -> Record:
            self._local.seen += tensor.numel() > 0  # torch 2.11's checkpoints save an empty one of their own
            return Kept(tensor) if self._local.disabled else self.pack(tensor, group())

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda record: record.unpack())

    # ---- the core ----

    def _open(self, device: torch.device) -> Core:
        with self._opening:
            if self._core is None or not self._core.here:
                handle = core.new(
                    self._make_backend(device),
                    device,
                    host_bytes=self._host_bytes,
                    depths=self._depths,
                    on_full=self._on_full,
                )
                self._core = Core(handle, device)
                self._unified = core.unified(handle)
                if self._unified:
                    self._report(f"{device} shares its memory with the host: offload gains nothing there and is off")
            return self._core

    def _make_backend(self, device: torch.device) -> int:
        on_device = "cuda" if device.type == "cuda" else "host"
        return core.make_backend(on_device if self._backend == "auto" else self._backend, device)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this OffloadEngine is closed: make a new one")

    def _report(self, text: str) -> None:
        """Warns, once for each kind of message."""
        kind = text[:20]
        if kind not in self._reported:
            self._reported.add(kind)
            warnings.warn(f"offload: {text}", stacklevel=3)

    def _report_keywords(self, keywords: dict[str, Any]) -> None:
        """Counts hidden states that go by keyword, and reports them with the remedy."""
        for name, value in keywords.items():
            is_hidden = isinstance(value, Tensor) and value.requires_grad and not value.is_leaf
            if is_hidden and value.nbytes >= self._min_bytes:
                self._invisible += value.nbytes
                self._report(
                    f"keyword tensor {name!r} ({value.nbytes} bytes) of a checkpointed function stays on the device: "
                    "saved-tensor hooks see only tensors passed by position. "
                    f"Call it as layer({name}, ...) and not layer({name}={name}, ...)"
                )


def _require_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, not {value!r}")


def _compiled(fn: Any) -> bool:
    """Whether torch.compile has wrapped a function, a layer or a part of it."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    fn = getattr(fn, "__self__", fn)
    return any(
        hasattr(part, "_torchdynamo_orig_callable") or getattr(part, "_compiled_call_impl", None) is not None
        for part in (fn.modules() if isinstance(fn, torch.nn.Module) else [fn])
    )
