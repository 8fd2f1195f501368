"""A saved tensor that is changed in place raises in the backward, whether it was offloaded or kept."""

import pytest
import torch

from longgrpo.offload import OffloadEngine
from testing.offload import like_a_fresh_engine


def multiply_twice(engine, change):
    w = torch.ones(40, 3, requires_grad=True)
    h = w * 2.0
    with engine.hooks():
        out = h * h
    change(h)
    out.sum().backward()


@pytest.mark.parametrize("change", [lambda h: h.mul_(3), lambda h: h.view(-1)[0].zero_(), lambda h: h.detach().add_(1)])
def test_change_in_place_after_packing_raises(engine, change):
    with pytest.raises(RuntimeError, match="changed in place"), torch.no_grad(), torch.enable_grad():
        multiply_twice(engine, change)
    like_a_fresh_engine(engine)


def test_change_in_place_is_seen_after_the_source_is_gone(engine):
    h = torch.ones(40, 3)
    part = h[1:]
    record = engine.pack(h)
    del h
    others = [engine.pack(torch.randn(5)) for _ in range(4)]
    part.add_(1)
    with pytest.raises(RuntimeError, match="version 1, expected version 0"):
        record.unpack()
    assert others


def test_small_kept_tensors_are_checked_too():
    with pytest.raises(RuntimeError, match="changed in place"):
        multiply_twice(OffloadEngine(), lambda h: h.detach().add_(1))


def test_torch_itself_does_not_notice():
    """The reason for our check: were torch to make it one day, ours could go."""
    w = torch.ones(40, requires_grad=True)
    h = w * 2.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        out = h * h
    with torch.no_grad():
        h.mul_(3)
    out.sum().backward()
    assert not torch.equal(w.grad, torch.full((40,), 8.0))
