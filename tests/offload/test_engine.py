"""The engine under autograd. The oracle is torch.utils.checkpoint without offload; every comparison is bitwise."""

import gc
import threading
import warnings
import weakref
from functools import partial

import pytest
import torch

from longgrpo.offload import OffloadEngine
from testing.offload import (
    COLUMNS,
    ROWS,
    SCHEDULES,
    PoisonedEngine,
    chain,
    chain_gradients,
    gated,
    gone,
    like_a_fresh_engine,
    nested,
    residual,
    same,
    torch_checkpoint,
    weights_of,
)

# ---- round trip ----


def tensors():
    base = torch.randn(6, 8, 10)
    yield from (
        base.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn)
    )
    yield from ((base * 50).to(dtype) for dtype in (torch.int64, torch.int8, torch.uint8, torch.bool))
    yield base[2:5, 1:, ::3]  # gaps: kept, or offloaded with its span
    yield base.transpose(0, 2)
    yield base[1:]  # an offset
    yield torch.randn(4, 1).expand(4, 1000)
    yield torch.randn(1).expand(30, 40)
    yield from (torch.empty(0), torch.empty(3, 0, 2), torch.tensor(3.0))
    yield torch.randn(5, 5, dtype=torch.complex64).conj()
    yield torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("tensor", [*tensors()], ids=lambda t: f"{t.dtype}-{tuple(t.shape)}-{t.stride()}"[6:])
def test_round_trip(engine, tensor):
    want, shape = tensor.clone(), (tensor.shape, tensor.stride(), tensor.dtype)
    record = engine.pack(tensor)
    others = [engine.pack(torch.randn(300)) for _ in range(4)]  # past keep_last and inflight: the source is let go
    del tensor
    assert len(others) == 4
    for _ in range(2):
        back = record.unpack()
        assert (back.shape, back.stride(), back.dtype) == shape
        assert torch.equal(back.view(torch.uint8) if back.dtype.itemsize == 1 else back, want.view(torch.uint8) if want.dtype.itemsize == 1 else want)  # fmt: skip  # noqa: E501


def test_what_comes_back_is_memory_of_torchs_allocator(engine):
    """record_stream does nothing for other memory, and then a borrower on another stream is unprotected."""
    tensor = torch.randn(40, 30).t()
    want, record = tensor.clone(), engine.pack(tensor)
    others = [engine.pack(torch.randn(300)) for _ in range(4)]
    del tensor
    first, second = record.unpack(), record.unpack()
    assert first.untyped_storage().resizable()  # a blob's is not
    assert first.untyped_storage().nbytes() == want.nbytes
    assert first.data_ptr() != second.data_ptr()
    second.zero_()
    assert torch.equal(first, want)
    assert len(others) == 4


# ---- invariants ----


def test_steps_move_what_they_must_and_allocate_once(engine):
    weights, size = weights_of(10), ROWS * COLUMNS * 4
    for step in range(4):
        chain_gradients(engine.checkpoint, weights)
        if step == 1:
            allocations = engine.stats()["allocations"]
    stats = engine.stats()
    # Each layer takes x twice; the newest stays (keep_last) and so do the two in flight.
    assert stats["packs"] == 4 * 20
    assert stats["misses"] == 0
    assert stats["bytes_out"] == stats["packs"] * size - 4 * size
    assert stats["allocations"] == allocations
    assert stats["device_peak"] <= (2 + 1 + (1 + 1) * 2) * size  # inflight, keep_last, prefetch + 1 layers
    assert gone(engine)


def test_host_memory_is_bytes_plus_one_percent():
    engine = OffloadEngine(min_bytes=0, keep_last=0, host_bytes=64 << 20)
    records = [engine.pack(torch.zeros(1000 + i, 700)) for i in range(8)]
    total = sum(4 * (1000 + i) * 700 for i in range(8))
    assert total <= engine.stats()["host_committed"] <= 1.01 * total
    del records
    assert gone(engine)


def test_source_memory_is_released(engine):
    storages = []
    for _ in range(6):
        tensor = torch.randn(100)
        storages.append((engine.pack(tensor), weakref.ref(tensor.untyped_storage())))
        del tensor
    gc.collect()
    records = [record for record, _ in storages]
    assert len(records) == 6
    assert engine.stats()["device_live"] == 3 * 400


def test_nested_checkpoints_do_not_pack_twice(engine):
    """Inside a checkpoint the recompute brings the inner input back, as in torch."""
    w = weights_of(1)[0]
    x = torch.randn(ROWS, COLUMNS) * 1.0
    out = engine.checkpoint(nested(engine.checkpoint, residual, gated), x, x, w)
    assert engine.stats()["packs"] == 2
    out.sum().backward()
    assert gone(engine)


def test_graph_dropped_without_backward(engine):
    out = chain(engine.checkpoint, torch.randn(ROWS, COLUMNS), weights_of(6))
    assert engine.stats()["records"] == 12
    del out
    like_a_fresh_engine(engine)


def test_saved_outputs_make_no_cycle(engine):
    gc.disable()
    try:
        with engine.hooks():
            y = torch.randn(50, 3, requires_grad=True).exp().tanh()
        del y
        engine.synchronize()
        assert engine.stats()["records"] == 0
    finally:
        gc.enable()


def test_two_models_at_once(engine):
    a, b = weights_of(4, 1), weights_of(4, 2)
    x = torch.randn(ROWS, COLUMNS)

    def run(ck):
        (chain(ck, x, a) * chain(ck, x + 1, b)).mean().backward()
        out = [w.grad for w in a + b]
        for w in a + b:
            w.grad = None
        return out

    assert same(run(engine.checkpoint), run(torch_checkpoint))


def test_two_threads(engine):
    want = chain_gradients(torch_checkpoint, weights_of(6))
    ok = []

    def work():
        for _ in range(10):
            ok.append(same(chain_gradients(engine.checkpoint, weights_of(6)), want))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ok == [True] * 20


def test_unpacked_tensor_outlives_engine_and_graph():
    engine = OffloadEngine(min_bytes=0, keep_last=0, inflight=1)
    tensor = torch.randn(300)
    records = [engine.pack(tensor.clone()) for _ in range(3)]
    back = records[0].unpack()
    engine.close()
    del engine, records
    gc.collect()
    assert torch.equal(back, tensor)


# ---- faults ----


class Boom(Exception):
    pass


def test_exception_in_forward(engine):
    def explode(*_):
        raise Boom

    with pytest.raises(Boom):
        engine.checkpoint(explode, chain(engine.checkpoint, torch.randn(ROWS, COLUMNS), weights_of(4)))
    like_a_fresh_engine(engine)


def test_exception_in_backward(engine):
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, _):
            raise Boom

    x = chain(engine.checkpoint, torch.randn(ROWS, COLUMNS), weights_of(3))
    x = chain(engine.checkpoint, Explode.apply(x), weights_of(3))
    with pytest.raises(Boom):
        x.sum().backward()
    del x
    like_a_fresh_engine(engine)


def test_exception_in_recompute(engine):
    calls = []

    def second_time(a, w):
        calls.append(1)
        if len(calls) == 2:
            raise Boom
        return a @ w

    w = weights_of(1)[0]
    out = engine.checkpoint(second_time, chain(engine.checkpoint, torch.randn(ROWS, COLUMNS), weights_of(3)), w)
    with pytest.raises(Boom):
        out.sum().backward()
    del out
    like_a_fresh_engine(engine)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("on_full", ["keep", "pageable"])
def test_arena_full(on_full, schedule):
    engine = PoisonedEngine(schedule, host_bytes=700, on_full=on_full)
    assert same(chain_gradients(engine.checkpoint, weights_of(8)), chain_gradients(torch_checkpoint, weights_of(8)))
    assert engine.stats()["keeps" if on_full == "keep" else "pageable"] > 0
    assert gone(engine)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_arena_full_raises(schedule):
    engine = PoisonedEngine(schedule, host_bytes=700, on_full="raise")
    with pytest.raises(RuntimeError, match=r"host arena is full: 160 bytes asked for, \d+ bytes of 700 bytes in use"):
        chain_gradients(engine.checkpoint, weights_of(8))
    assert gone(engine)
    assert same(chain_gradients(engine.checkpoint, weights_of(1)), chain_gradients(torch_checkpoint, weights_of(1)))


def test_out_of_order_unpack(engine):
    tensors_ = [torch.randn(40) for _ in range(8)]
    records = [engine.pack(t.clone()) for t in tensors_]
    assert all(torch.equal(r.unpack(), t) for r, t in zip(records, tensors_, strict=True))
    assert engine.stats()["misses"] > 0


# ---- what is offloaded ----


def test_parameters_leaves_and_small_tensors_stay():
    engine = OffloadEngine(min_bytes=100)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    frozen = torch.nn.Parameter(torch.randn(64, 64), requires_grad=False)
    x = torch.randn(8, 64, requires_grad=True)
    with engine.hooks():
        y = (x @ weight) @ frozen.t()
    assert engine.stats()["packs"] == 0
    y.sum().backward()
    small = engine.pack(torch.randn(5))
    assert engine.stats()["packs"] == 0
    assert small is not None


def test_disabled(engine):
    x = torch.randn(ROWS, COLUMNS)
    with engine.disabled():
        out = chain(engine.checkpoint, x, weights_of(3))
    assert engine.stats()["packs"] == 0
    out.sum().backward()
    with torch.no_grad():
        chain(engine.checkpoint, x, weights_of(3))
    assert engine.stats()["packs"] == 0


def test_keyword_hidden_states_are_reported(engine):
    w = weights_of(1)[0]
    h = torch.randn(ROWS, COLUMNS) @ w

    def layer(hidden_states=None, weight=None):
        return hidden_states @ weight

    with pytest.warns(UserWarning, match=r"'hidden_states' \(160 bytes\).*position.*layer\(hidden_states, \.\.\.\)"):
        out = engine.checkpoint(layer, hidden_states=h, weight=w)
    assert engine.stats()["invisible"] == 160
    assert engine.stats()["packs"] == 0
    out.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once an engine
        engine.checkpoint(partial(layer, hidden_states=h), weight=w)
    assert engine.stats()["invisible"] == 320


def test_hooks_that_see_nothing_are_reported(engine):
    w = weights_of(1)[0]
    h = torch.randn(ROWS, COLUMNS) @ w
    with pytest.warns(UserWarning, match="nothing was saved.*by position"), engine.hooks():
        torch_checkpoint(lambda hidden_states: hidden_states @ w, hidden_states=h)


def test_short_sequences_are_reported():
    engine = OffloadEngine(min_bytes=0)
    with pytest.warns(UserWarning, match="fewer than 512 tokens"):
        engine.pack(torch.randn(2, 255, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OffloadEngine(min_bytes=0).pack(torch.randn(2, 256, 8))


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefetch": -1}, "prefetch must be an integer >= 0, not -1"),
        ({"inflight": 0}, "inflight must be an integer >= 1, not 0"),
        ({"keep_last": -2}, "keep_last"),
        ({"min_bytes": -1}, "min_bytes"),
        ({"host_bytes": -5}, "host_bytes must be 'auto' or a number of bytes >= 0, not -5"),
        ({"host_bytes": "all"}, "host_bytes"),
        ({"on_full": "drop"}, "on_full must be one of keep, pageable, raise, not 'drop'"),
        ({"backend": "tpu"}, "backend must be one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        OffloadEngine(**options)


def test_closed_engine(engine):
    out = chain(engine.checkpoint, torch.randn(ROWS, COLUMNS), weights_of(4))
    engine.close()
    with pytest.raises(RuntimeError, match="closed: make a new one"):
        engine.checkpoint(residual, *[torch.randn(3, 3)] * 3)
    with pytest.raises(RuntimeError, match="closed"), engine.hooks():
        pass
    out.sum().backward()  # what was packed still comes back


def test_reentrant_is_refused(engine):
    with pytest.raises(ValueError, match="use_reentrant=False"):
        engine.checkpoint(residual, torch.ones(2), torch.ones(2), torch.ones(2), use_reentrant=True)


def test_cuda_backend_without_cuda_part():
    if hasattr(torch.ops.longgrpo, "offload_cuda_backend"):
        pytest.skip("this build has it")
    with pytest.raises(RuntimeError, match="no CUDA part"):
        OffloadEngine(backend="cuda", min_bytes=0).pack(torch.randn(4))


# ---- counting ----


def test_counting_backend_on_meta_tensors_agrees_with_the_host_backend():
    def run(device, backend):
        engine = OffloadEngine(min_bytes=0, host_bytes=1 << 20, backend=backend)
        weights = [torch.randn(COLUMNS, COLUMNS, device=device, requires_grad=True) for _ in range(6)]
        chain(engine.checkpoint, torch.randn(ROWS, COLUMNS, device=device) * 1.0, weights).sum().backward()
        return engine.stats()

    counted, real = run("meta", "count"), run("cpu", "host")
    for name in ("packs", "bytes_out", "bytes_in", "hits", "misses", "host_peak", "host_committed", "device_peak"):
        assert counted[name] == real[name], name
