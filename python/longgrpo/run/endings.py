"""What a run ends with if it does not come to its end."""

from __future__ import annotations

import torch

from longgrpo.errors import TrainingError, UserError


def as_user_error(error: BaseException) -> UserError | None:
    """The error that a user is told of in place of `error`; None for a fault of the program, which has a traceback."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, SystemExit):
        return TrainingError(
            f"sys.exit({error.code!r}) was called in the run's process, by a function of yours or a library: "
            "raise an exception there"
        )
    if out_of_memory(error):
        return TrainingError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'the system gave no more'}\n"
            "lower train.token_budget, or see docs/troubleshooting.md, Out of memory"
        )
    return None


def out_of_memory(error: BaseException) -> bool:
    """Of the device or of the host, whose allocators raise a RuntimeError (C++'s own one since torch 2.15)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("can't allocate memory", "bad_alloc"))
    )
