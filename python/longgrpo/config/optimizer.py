"""The optimizers and the schedules that a config can name."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple


class Optimizer(NamedTuple):
    """Where a class is, the arguments that its name stands for, and the bytes of its state for each element."""

    module: str
    name: str
    arguments: dict[str, Any]
    state_bytes: int


OPTIMIZERS = {
    "adamw": Optimizer("torch.optim", "AdamW", {}, 8),
    "adamw_fused": Optimizer("torch.optim", "AdamW", {"fused": True}, 8),
    "sgd": Optimizer("torch.optim", "SGD", {}, 4),  # with momentum
    "adafactor": Optimizer("torch.optim", "Adafactor", {}, 0),  # of a matrix a row and a column
    "muon": Optimizer("torch.optim", "Muon", {}, 4),
    "adamw_8bit": Optimizer("bitsandbytes.optim", "AdamW8bit", {}, 2),
    "paged_adamw": Optimizer("bitsandbytes.optim", "PagedAdamW", {}, 8),
    "paged_adamw_8bit": Optimizer("bitsandbytes.optim", "PagedAdamW8bit", {}, 2),
}
SCHEDULES = (
    "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip


@lru_cache
def decay(
    schedule: str, learning_rate: float, warmup: int, steps: int, arguments: tuple[tuple[str, Any], ...]
) -> Callable[[int], float]:
    """transformers' schedule of this name, as the factor of the learning rate after a number of steps.

    Raises ValueError for arguments that it does not take.
    """
    import torch
    from transformers import get_scheduler

    # It reads the learning rate off an optimizer, and multiplies it by the factor.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], learning_rate)
    try:
        scheduler = get_scheduler(schedule, optimizer, warmup, steps, scheduler_specific_kwargs=dict(arguments))
    except (TypeError, ValueError) as error:
        raise ValueError(f"train.schedule = {schedule!r}, train.schedule_args = {dict(arguments)}: {error}") from error
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
