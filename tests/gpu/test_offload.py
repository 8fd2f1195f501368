"""The offload engine on a GPU. The oracle is torch.utils.checkpoint without offload; every comparison is bitwise."""

from __future__ import annotations

import gc
import os
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longgrpo.offload import OffloadEngine

torch_checkpoint = partial(checkpoint, use_reentrant=False)
DEVICE = os.environ.get("LONGGRPO_GPU_TESTS_ON", "cuda")
ROWS, COLUMNS, LAYERS = 4096, 512, 8
MIB = 1 << 20


def layer(x, w):
    return torch.relu(x @ w) + x


def gradients(ck, device=DEVICE, steps=2, retain=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLUMNS, generator=generator).to(device)
    weights = [(torch.randn(COLUMNS, COLUMNS, generator=generator) * 0.02).to(device) for _ in range(LAYERS)]
    for w in weights:
        w.requires_grad_()
    for _ in range(steps):
        y = x
        for w in weights:
            y = ck(layer, y, w)
        loss = y.square().mean()
        if retain:
            loss.backward(retain_graph=True)
        loss.backward()
    return [w.grad for w in weights]


def same(ours, theirs):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def engine():
    with OffloadEngine(min_bytes=0, keep_last=0) as made:
        yield made


def test_round_trip(engine):
    for make in (lambda: torch.randn(1000, 700), lambda: torch.randn(3, 5).t(), lambda: torch.empty(0)):
        tensor = make().to(DEVICE)
        want, record = tensor.clone(), engine.pack(tensor)
        others = [engine.pack(torch.randn(300, device=DEVICE)) for _ in range(4)]  # the source is let go
        del tensor
        assert len(others) == 4
        back = record.unpack()
        assert back.device == want.device
        assert back.stride() == want.stride()
        assert torch.equal(back, want)


@pytest.mark.parametrize("retain", [False, True])
def test_gradients(engine, retain):
    assert same(gradients(engine.checkpoint, retain=retain), gradients(torch_checkpoint, retain=retain))
    stats = engine.stats()
    assert stats["bytes_out"] >= (LAYERS - 1) * ROWS * COLUMNS * 4
    assert stats["bytes_in"] > 0
    assert stats["host_pinned"] == stats["host_committed"] > 0
    gc.collect()
    engine.synchronize()
    assert engine.stats()["records"] == engine.stats()["host_live"] == 0


def test_on_a_side_stream(engine):
    expected = gradients(torch_checkpoint)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ours = gradients(engine.checkpoint)
    assert same(ours, expected)


def test_a_borrower_on_another_stream(engine):
    """The side stream reads late, and the loan ends at once. record_stream keeps its memory from the next tensor."""
    inputs = [torch.randn(ROWS, COLUMNS, device=DEVICE) for _ in range(LAYERS)]
    want = [x.sum(dtype=torch.float64) for x in inputs]
    records = [engine.pack(x) for x in inputs]
    del inputs
    engine.synchronize()
    side, sums = torch.cuda.Stream(), []
    for record in records[::-1]:
        x = record.unpack()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            sums.append(x.sum(dtype=torch.float64))
        x.record_stream(side)
        del x
        torch.full((ROWS, COLUMNS), float("nan"), device=DEVICE)
    assert same(sums[::-1], want)


@pytest.mark.parametrize("on_full", ["keep", "pageable"])
def test_a_full_arena(on_full):
    """Two of eight inputs fit. Pageable memory goes through the pinned bounce buffers, in the copies' own order."""
    with OffloadEngine(min_bytes=0, keep_last=0, host_bytes=2 * ROWS * COLUMNS * 4, on_full=on_full) as engine:
        for _ in range(3):
            assert same(gradients(engine.checkpoint), gradients(torch_checkpoint))
        assert engine.stats()["keeps" if on_full == "keep" else "pageable"] > 0


def test_the_device_holds_few_inputs(engine):
    def peak(ck):
        gradients(ck)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(ck)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    saved = (LAYERS - 4) * ROWS * COLUMNS * 4  # inflight 2, and two slots of the ring
    assert peak(engine.checkpoint) <= peak(torch_checkpoint) - saved + MIB


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    with OffloadEngine(min_bytes=0, keep_last=0) as engine:
        assert same(gradients(engine.checkpoint, "cuda:1"), gradients(torch_checkpoint, "cuda:1"))
    assert torch.cuda.current_device() == 0
