"""The offload core's ops (csrc/ops/offload.cpp) under Python names."""

from __future__ import annotations

import torch

from longgrpo._ops.library import ops

# The order of `Stats` in csrc/offload/engine.h.
STATS = (
    "packs", "bytes_out", "bytes_in", "resident", "hits", "misses", "keeps", "pageable", "records", "allocations",
    "host_live", "host_peak", "host_committed", "host_pinned", "host_budget", "device_live", "device_peak", "prefetch",
    "copy_out_ns", "copy_in_ns", "stall_forward_ns", "stall_backward_ns",
)  # fmt: skip

pack = torch.ops.longgrpo.offload_pack.default
unpack = torch.ops.longgrpo.offload_unpack.default
drop = torch.ops.longgrpo.offload_drop.default
free = torch.ops.longgrpo.offload_free.default
sync = torch.ops.longgrpo.offload_sync.default
unified = torch.ops.longgrpo.offload_unified.default
host_budget = torch.ops.longgrpo.offload_host_budget.default


def stats(engine: int) -> dict[str, int]:
    return dict(zip(STATS, ops.offload_stats(engine), strict=True))


def make_backend(name: str, device: torch.device) -> int:
    """The handle of the backend "cuda", "host" or "count", for tensors on `device`; `new` takes it."""
    if name == "cuda":
        if not hasattr(ops, "offload_cuda_backend"):
            raise RuntimeError("this build of longgrpo has no CUDA part: install the wheel or build with nvcc 13")
        return int(ops.offload_cuda_backend(device.index))
    return int(ops.offload_count_backend()) if name == "count" else make_host_backend("threaded")


def make_host_backend(schedule: str, seed: int = 0, poison: bool = False) -> int:
    """`schedule` orders the copies: "threaded", "lazy" or "seeded" (csrc/offload/host_backend.h). `poison` fills memory
    with NaN when it is handed out."""
    return int(ops.offload_host_backend(schedule, seed, poison))


def new(backend: int, device: torch.device, *, host_bytes: int, depths: tuple[int, int, int], on_full: str) -> int:
    """A new engine's handle. `depths`: prefetch, inflight, keep_last."""
    return int(ops.offload_new(backend, host_bytes, depths, on_full, device))
