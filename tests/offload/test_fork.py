"""A forked child has the engine's memory and not its threads."""

import gc
import os
import signal

import pytest
import torch

from longgrpo.offload import OffloadEngine


def _in_a_child(work):
    """The exit status of a forked child that does this, killed after 20 seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_drops_a_live_engine():
    made = [OffloadEngine(min_bytes=0, keep_last=0)]
    record = [made[0].pack(torch.randn(600, 64)) for _ in range(4)]
    kept = made[0].pack(source := torch.randn(600, 64))

    def drop():
        with pytest.raises(RuntimeError, match="before a fork"):
            kept.unpack()
        made[0].synchronize()
        made[0].stats()
        again = torch.randn(600, 64)
        assert torch.equal(made[0].pack(again).unpack(), again)  # with a core of its own
        record.clear()
        made.clear()
        gc.collect()

    assert _in_a_child(drop) == 0
    assert torch.equal(kept.unpack(), source)
