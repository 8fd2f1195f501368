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

pack = ops.offload_pack.default
unpack = ops.offload_unpack.default
drop = ops.offload_drop.default
free = ops.offload_free.default
sync = ops.offload_sync.default
unified = ops.offload_unified.default
host_budget = ops.offload_host_budget.default


def stats(engine: int) -> dict[str, int]:
    return dict(zip(STATS, ops.offload_stats(engine), strict=True))


def new(
    backend: str,
    device: torch.device,
    *,
    host_bytes: int,
    depths: tuple[int, int, int],
    on_full: str,
    schedule: str,
    poison: bool,
) -> int:
    """A new engine's handle. `depths`: prefetch, inflight, keep_last; `schedule`: "threaded", "lazy" or "seeded:N"."""
    if backend == "cuda":
        if not hasattr(ops, "offload_cuda_backend"):
            raise RuntimeError("this build of longgrpo has no CUDA part: install the wheel or build with nvcc 13")
        made = ops.offload_cuda_backend(device.index)
    elif backend == "count":
        made = ops.offload_count_backend()
    else:
        kind, _, seed = schedule.partition(":")
        made = ops.offload_host_backend(kind, int(seed or 0), poison)
    return ops.offload_new(made, host_bytes, depths, on_full, device)
