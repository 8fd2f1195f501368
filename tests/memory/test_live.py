"""The counter of live storages. The oracle: sizes worked out by hand, and torch's own record of its allocator."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from longgrpo import linear_logprob
from longgrpo.memory.internal import CPU, Internal
from longgrpo.memory.live import LiveStorages


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_storages_once_and_until_they_die(device):
    with LiveStorages() as live:
        x = torch.empty(100, device=device)
        y = x.view(10, 10)[2:]  # the same storage
        assert live.now == 400
        z = y + 1
        assert live.now == 400 + 320
        del x
        assert live.now == 400 + 320
        del y
        assert live.now == 320
        del z
        assert (live.now, live.peak) == (0, 720)


def test_what_was_there_before_counts_where_it_is_added():
    weight = torch.empty(50)
    part = weight[:3]
    with LiveStorages() as live:
        live.add([weight, part], "weights")
        live.reset_peak()
        (weight * 2).sum()
    assert live.now == 200
    assert live.peak == 200 + 200 + 4
    assert live.at_peak["weights"] == 200


def allocator_peak(run):
    """Bytes above what was allocated before, by the profiler's record of each allocation and release."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    now = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_op_states_what_the_allocator_sees(dtype, trained):
    tokens, hidden, vocabulary, workspace = 3000, 256, 4096, 8 << 20
    h = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    w = torch.randn(vocabulary, hidden).to(dtype).requires_grad_(trained)
    target = torch.randint(vocabulary, (tokens,))

    def run():
        linear_logprob(h, w, target, workspace=workspace).logp.sum().backward()
        h.grad = w.grad = None

    run()
    real = allocator_peak(run)
    with LiveStorages(Internal(CPU)) as live:
        live.add([h, w, target])
        given = live.now
        run()
    vectors = 16 * 4 * tokens  # logp, entropy and the order of the rows: a few numbers a token
    assert live.peak - given == pytest.approx(real, abs=vectors + 0.02 * real)
    assert real > workspace / 2  # or nothing was inside
