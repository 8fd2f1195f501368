"""The offload engine on a host backend that shows a copy in the wrong order, and functions to run on it."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from longgrpo._ops import offload as core
from longgrpo.offload import OffloadEngine

torch_checkpoint = partial(checkpoint, use_reentrant=False)
ROWS, COLUMNS = 5, 8
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


def gone(engine):
    """No record, no host memory; the graph that held them is dead."""
    gc.collect()
    engine.synchronize()
    stats = engine.stats()
    return stats["records"] == 0 and stats["host_live"] == 0


def residual(a, b, w):
    return torch.relu(a @ w) + b


def gated(a, b, w):
    return torch.sigmoid(a) * (b @ w)


def nested(ck, f, g):
    def outer(a, b, w):
        return ck(g, ck(f, a, b, w), b, w)

    return outer


def same(ours, theirs):
    return all(
        (a is None and b is None) or torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30))  # a NaN equals a NaN
        for a, b in zip(ours, theirs, strict=True)
    )


def chain(ck, x, weights):
    for w in weights:
        x = ck(residual, x, x, w)
    return x


def weights_of(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(COLUMNS, COLUMNS, generator=generator, requires_grad=True) for _ in range(n)]


def chain_gradients(ck, weights):
    chain(ck, torch.ones(ROWS, COLUMNS) * 0.5, weights).sum().backward()
    out = [w.grad for w in weights]
    for w in weights:
        w.grad = None
    return out


def like_a_fresh_engine(engine):
    before = engine.stats()
    ours = chain_gradients(engine.checkpoint, weights_of(6))
    assert same(ours, chain_gradients(torch_checkpoint, weights_of(6)))
    fresh = OffloadEngine(min_bytes=0, host_bytes=1 << 20)
    chain_gradients(fresh.checkpoint, weights_of(6))
    after, want = engine.stats(), fresh.stats()
    for name in ("packs", "bytes_out", "resident", "hits", "misses"):
        assert after[name] - before[name] == want[name], name
    assert gone(engine)
