"""The peak memory of one call, as the kernel counts it: whatever allocates, and on whatever thread, is in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

# Large blocks get a mapping of their own and give it back when they are freed, as on a heap without history.
FRESH_HEAP = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def status(field: str) -> int:
    """Bytes of a field of this process's /proc/self/status, such as VmRSS, or VmHWM since the last reset_peak()."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    # getrusage's ru_maxrss will not do: it starts at the parent's peak and cannot be reset.
    Path("/proc/self/clear_refs").write_text("5")


def peak_extra(call: Callable[[], object]) -> int:
    """Bytes by which this process's memory rose while `call` ran, its result still held: torch's on a GPU if it has
    one in use, the resident memory else."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        used = torch.cuda.memory_allocated()
        result = call()
        return torch.cuda.max_memory_allocated() - used
    reset_peak()
    before = status("VmRSS")
    result = call()
    extra = status("VmHWM") - before
    del result
    return extra


def in_fresh_process(*command: str, path: Path | None = None) -> str:
    """The last line that `python *command` prints, `path` on its search path; its error is raised with its last."""
    environment = os.environ | FRESH_HEAP
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines() or [f"exit {run.returncode}"]
    if run.returncode:
        raise RuntimeError(lines[-1])
    return lines[-1]
