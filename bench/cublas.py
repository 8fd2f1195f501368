"""bench_cuda with the cuBLAS of this Python's torch: `python bench/cublas.py build/gpu/bench_cuda [OPTION ...]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def loaded(name: str) -> Path:
    """The file of a library that this process has open."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if name in line:
            return Path(line.split()[-1])
    sys.exit(f"torch has not opened {name}: is it one for CUDA?")


def main() -> None:
    torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
    library = loaded("libcublas.so")
    path = f"{library.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    binary, *options = sys.argv[1:]
    os.execve(binary, [binary, "--cublas", str(library), *options], os.environ | {"LD_LIBRARY_PATH": path})


if __name__ == "__main__":
    main()
