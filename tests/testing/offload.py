"""The offload engine on a host backend that shows a copy in the wrong order."""

from __future__ import annotations

from typing import Any

import torch

from longgrpo._ops import offload as core
from longgrpo.offload import OffloadEngine

SCHEDULES = ["threaded", "lazy", "seeded:7"]


class PoisonedEngine(OffloadEngine):
    """Memory is full of NaN when it is handed out. Copies happen as fast as they can ("threaded"), as late as is legal
    ("lazy") or in a random legal order ("seeded:N")."""

    def __init__(self, schedule: str, **options: Any) -> None:
        super().__init__(**{"min_bytes": 0, "host_bytes": 1 << 20} | options)
        self._schedule = schedule

    def _make_backend(self, device: torch.device) -> int:
        kind, _, seed = self._schedule.partition(":")
        return core.make_host_backend(kind, int(seed or 0), poison=True)
