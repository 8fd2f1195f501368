"""The engine under autograd. The oracle is torch.utils.checkpoint without offload; every comparison is bitwise."""

import gc
import threading
import warnings
import weakref
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from longgrpo.offload import OffloadEngine
from testing.offload import SCHEDULES, PoisonedEngine

torch_checkpoint = partial(checkpoint, use_reentrant=False)
ROWS, COLUMNS = 5, 8


@pytest.fixture(params=SCHEDULES)
def engine(request):
    with PoisonedEngine(request.param) as made:
        yield made


def gone(engine):
    """No record, no host memory; the graph that held them is dead."""
    gc.collect()
    engine.synchronize()
    stats = engine.stats()
    return stats["records"] == 0 and stats["host_live"] == 0


# ---- random graphs ----


def residual(a, b, w):
    return torch.relu(a @ w) + b


def gated(a, b, w):
    return torch.sigmoid(a) * (b @ w)


def transposed(a, b, w):
    return (a.t().contiguous().t() @ w) * b[:, :1]


def views(a, b, w):
    return torch.cat([a[:, 2:], b[:, :2]], 1) @ w


def saved_output(a, b, w):
    return torch.exp(torch.tanh(a @ w)) - b.expand(1, *b.shape)[0]


FUNCTIONS = (residual, gated, transposed, views, saved_output)


def nested(ck, f, g):
    def outer(a, b, w):
        return ck(g, ck(f, a, b, w), b, w)

    return outer


graphs = st.fixed_dictionaries({
    "nodes": st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 99), st.integers(0, 99), st.booleans()),
        min_size=1, max_size=7,
    ),
    "steps": st.integers(1, 2),
    "retain": st.booleans(),
    "partial": st.booleans(),
    "seed": st.integers(0, 1 << 20),
})  # fmt: skip
engines = st.fixed_dictionaries({
    "prefetch": st.integers(0, 2),
    "inflight": st.integers(1, 2),
    "keep_last": st.integers(0, 2),
    "min_bytes": st.sampled_from([0, 0, ROWS * COLUMNS * 4 + 1]),
    "host_bytes": st.sampled_from([1 << 20, 1 << 20, 600]),
    "on_full": st.sampled_from(["keep", "pageable"]),
    "schedule": st.one_of(st.sampled_from(["threaded", "lazy"]), st.integers(0, 999).map(lambda n: f"seeded:{n}")),
})  # fmt: skip


def forward(graph, ck, leaf, weights):
    nodes = [leaf * 1.0]
    for f, g, i, j, is_nested in graph["nodes"]:
        function = nested(ck, FUNCTIONS[f], FUNCTIONS[g]) if is_nested else FUNCTIONS[f]
        nodes.append(ck(function, nodes[-1 - i % len(nodes)], nodes[j % len(nodes)], weights[(i + j) % len(weights)]))
    return sum(node.square().mean() for node in nodes[1:])


def gradients(graph, ck):
    generator = torch.Generator().manual_seed(graph["seed"])
    leaf = torch.randn(ROWS, COLUMNS, generator=generator, requires_grad=True)
    weights = [(torch.randn(COLUMNS, COLUMNS, generator=generator) * 0.3).requires_grad_() for _ in range(2)]
    out = []
    for _ in range(graph["steps"]):
        loss = forward(graph, ck, leaf, weights)
        out.append(loss.detach())
        if graph["partial"]:
            out += torch.autograd.grad(loss, weights[:1], retain_graph=True, allow_unused=True)
        if graph["retain"]:
            loss.backward(retain_graph=True)
        loss.backward()
        out += [tensor.grad for tensor in (leaf, *weights)]
    return out


def same(ours, theirs):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.long
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graph=graphs, options=engines)
def test_random_graphs_have_the_gradients_of_torch(graph, options):
    engine = PoisonedEngine(**options)
    assert same(gradients(graph, engine.checkpoint), gradients(graph, torch_checkpoint))
    engine.synchronize()
    assert engine.stats()["records"] == 0
    assert engine.stats()["host_live"] == 0


@settings(max_examples=100, deadline=None)
@given(graph=graphs, options=engines)
def test_hooks_around_whole_graphs(graph, options):
    """Everything autograd saves outside checkpoints goes through the engine as well."""
    engine = PoisonedEngine(**options)
    with engine.hooks():
        ours = gradients(graph, lambda f, *args: f(*args))
    assert same(ours, gradients(graph, lambda f, *args: f(*args)))


@settings(max_examples=30, deadline=None)
@given(first=graphs, second=graphs, options=engines, order=st.booleans())
def test_interleaved_graphs(first, second, options, order):
    engine = PoisonedEngine(**options)

    def run(ck):
        leaf = torch.linspace(-1, 1, ROWS * COLUMNS).reshape(ROWS, COLUMNS).requires_grad_()
        weights = [torch.eye(COLUMNS).requires_grad_(), torch.ones(COLUMNS, COLUMNS).requires_grad_()]
        losses = [forward(graph, ck, leaf, weights) for graph in (first, second)]
        for loss in losses if order else losses[::-1]:
            loss.backward()
        return [tensor.grad for tensor in (leaf, *weights)]

    assert same(run(engine.checkpoint), run(torch_checkpoint))


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
    for _ in range(4):
        engine.pack(torch.randn(300))  # past keep_last and inflight: the source is let go
    del tensor
    for _ in range(2):
        back = record.unpack()
        assert (back.shape, back.stride(), back.dtype) == shape
        assert torch.equal(back.view(torch.uint8) if back.dtype.itemsize == 1 else back, want.view(torch.uint8) if want.dtype.itemsize == 1 else want)  # fmt: skip  # noqa: E501


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


# ---- in-place changes ----


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
