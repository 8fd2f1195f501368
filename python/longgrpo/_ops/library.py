"""Opens the compiled libraries; importing this module registers `torch.ops.longgrpo`."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch

_MINIMUM_TORCH = (2, 11)


def _open(name: str) -> None:
    path = files("longgrpo") / name
    if not path.is_file():
        raise ImportError(f"longgrpo was installed without its compiled part {name}: install the wheel, or build it")
    torch.ops.load_library(str(path))


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _MINIMUM_TORCH:
        raise ImportError(f"longgrpo needs torch >= {'.'.join(map(str, _MINIMUM_TORCH))}, found {torch.__version__}")


_check_torch()
_open("_cpu.so")
# Built where nvcc was found. A CPU torch lacks what it links to; a CUDA torch takes it without a GPU too.
if torch.version.cuda and (files("longgrpo") / "_cuda.so").is_file():
    _open("_cuda.so")


_BAD_VALUE = "ValueError: "  # csrc/ops/box.h


class _Ops:
    """torch.ops.longgrpo. A value that a kernel refuses is a ValueError, which torch 2.15 no longer makes of it."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.longgrpo, name)
        if torch.compiler.is_compiling():  # a graph is traced over the operator itself
            return op

        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return op(*arguments, **options)
            except (RuntimeError, ValueError) as error:
                if _BAD_VALUE not in str(error):
                    raise
                raise ValueError(str(error).partition(_BAD_VALUE)[2]) from None

        setattr(self, name, call)
        return call


ops = _Ops()
