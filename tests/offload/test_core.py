"""Properties of the torch-free core, with an asynchronous compute stream as a GPU has it.

Nothing is read before it is written, nothing overwritten before it is read, nothing left behind. The oracle is the
content of every tensor: poison lies wherever an order between two streams is missing.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

KIB = 1 << 10


@pytest.fixture(params=["threaded", "lazy", "seeded"])
def schedule(request, native):
    return getattr(native.Schedule, request.param)


depths = st.fixed_dictionaries(
    {"prefetch": st.integers(0, 3), "inflight": st.integers(1, 3), "keep_last": st.integers(0, 3)}
)
ACTIONS = ["pack", "pack", "pack", "unpack", "unpack", "give_back", "drop"]
actions = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1 << 30)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(
    program=actions,
    depth=depths,
    seed=st.integers(0, 1 << 30),
    host=st.sampled_from([0, 9000, 1 << 20]),
    full=st.integers(0, 1),
)
def test_any_program_reads_what_it_wrote(native, program, depth, seed, host, full):
    """Any order and number of unpacks, dropped records, slots held for long, a full arena; then nothing is left."""
    for schedule in (native.Schedule.threaded, native.Schedule.lazy, native.Schedule.seeded):
        on_full = (native.OnFull.keep, native.OnFull.pageable)[full]
        world = native.World(schedule, seed, host_bytes=host, on_full=on_full, **depth)
        live = []
        for action, value in program:
            if action == "pack":
                live.append(world.pack(value % 5000))
            elif live:
                record = live[value % len(live)]
                getattr(world, action)(record)
                if action == "drop":
                    live.remove(record)
        world.finish()
        stats = world.stats
        assert world.wrong == 0
        assert (stats["records"], stats["host_live"]) == (0, 0)


def step(world, layers, bytes_):
    for record in [world.pack(bytes_) for _ in range(layers)][::-1]:
        world.unpack(record)
        world.drop(record)
        world.give_back(record)


@pytest.mark.parametrize("depth", [(1, 2, 1), (0, 1, 0), (2, 1, 1), (3, 3, 2)])
def test_steady_steps(native, schedule, depth):
    """Every record is prefetched, nothing is allocated after the second step, memory is within its bound."""
    prefetch, inflight, keep_last = depth
    world = native.World(schedule, 5, prefetch=prefetch, inflight=inflight, keep_last=keep_last)
    layers, size = 12, 6 * KIB
    for i in range(4):
        step(world, layers, size)
        if i == 1:
            allocations = world.stats["allocations"]
    stats = world.stats
    assert stats["allocations"] == allocations
    if prefetch:
        assert stats["misses"] == 0
    assert stats["device_peak"] <= (inflight + keep_last + prefetch + 1) * size
    assert stats["host_peak"] <= layers * size
    world.finish()
    assert world.wrong == 0
    assert world.reads == 4 * layers


@pytest.mark.parametrize("prefetch", [1, 2])
def test_groups_come_back_together(native, schedule, prefetch):
    """Checkpoints with three inputs of different sizes, unpacked in their order and held until the layer is done."""
    world = native.World(schedule, 5, prefetch=prefetch)
    sizes = (4 * KIB, 512, 4 * KIB)
    for i in range(3):
        layers = [[world.pack(size, 100 * i + layer) for size in sizes] for layer in range(8)]
        for layer in layers[::-1]:
            for record in layer:
                world.unpack(record)
            for record in layer:
                world.drop(record)
                world.give_back(record)
        if i == 1:
            allocations = world.stats["allocations"]
    stats = world.stats
    assert stats["misses"] == 0
    assert stats["allocations"] == allocations
    assert stats["device_peak"] <= 3 * 4 * KIB + (prefetch + 1) * sum(sizes)
    world.finish()
    assert world.wrong == 0


def test_host_memory_is_exact(native):
    """Against the rule of torch's pinned allocator: the next power of two for each block."""
    world = native.World(native.Schedule.threaded, host_bytes=64 << 20, keep_last=0)
    sizes = [(1 << 20) + 300 * KIB + 512 * i for i in range(20)]
    records = [world.pack(size) for size in sizes]
    world.settle()
    stats = world.stats
    assert sum(sizes) <= stats["host_committed"] <= 1.01 * sum(sizes)
    assert sum(1 << (size - 1).bit_length() for size in sizes) > 1.4 * sum(sizes)
    for record in records:
        world.drop(record)


# ---- faults ----


def test_full_arena_keeps_on_the_device(native, schedule):
    world = native.World(schedule, host_bytes=8 * KIB)
    records = [world.pack(3 * KIB) for _ in range(8)]
    stats = world.stats
    assert stats["keeps"] == 5
    assert stats["bytes_out"] == 6 * KIB
    for record in records[::-1]:
        world.unpack(record)
    world.finish()
    assert world.wrong == 0


def test_full_arena_pageable(native, schedule):
    world = native.World(schedule, host_bytes=8 * KIB, on_full=native.OnFull.pageable)
    for record in [world.pack(3 * KIB) for _ in range(8)][::-1]:
        world.unpack(record)
    assert world.stats["pageable"] == 5
    assert world.stats["keeps"] == 0
    world.finish()
    assert world.wrong == 0


def test_full_arena_raises_with_the_numbers(native, schedule):
    world = native.World(schedule, host_bytes=8 * KIB, on_full=native.OnFull.raise_)
    records = [world.pack(3 * KIB) for _ in range(3)]
    with pytest.raises(RuntimeError, match=r"full: 3072 bytes asked for, 6144 bytes of 8192 bytes in use.*host_bytes"):
        world.pack(3 * KIB)
    assert world.stats["records"] == 3  # the one that failed is not among them
    for record in records:
        world.unpack(record)
    world.finish()
    step(world, 3, 2 * KIB)
    world.finish()
    assert world.wrong == 0


def test_refused_pinning_goes_through_the_bounce_buffer(native, schedule):
    world = native.World(schedule, host_bytes=32 << 20, pin_limit=(8 << 20) + (5 << 20))  # two bounce buffers, and 5
    for record in [world.pack(3 << 20) for _ in range(5)][::-1]:
        world.unpack(record)
    stats = world.stats
    assert 0 < stats["host_pinned"] <= 5 << 20 < stats["host_committed"]
    world.finish()
    assert world.wrong == 0


@pytest.mark.parametrize("pin_limit", [6 << 20, 100 << 10, 0])
def test_pinning_that_is_refused_from_the_start(native, schedule, pin_limit):
    """Smaller bounce buffers, or none: then copies are the driver's own. Never the end of the run."""
    world = native.World(schedule, host_bytes=32 << 20, pin_limit=pin_limit)
    for record in [world.pack(3 << 20) for _ in range(5)][::-1]:
        world.unpack(record)
    assert world.stats["host_pinned"] <= pin_limit
    world.finish()
    assert world.wrong == 0


def test_copy_that_fails(native, schedule):
    """Out, then in: the error comes through, nothing leaks, and the next step is like any other."""
    world = native.World(schedule)
    step(world, 6, 2 * KIB)
    world.fail_copy(3)
    with pytest.raises(RuntimeError, match="injected"):
        _ = [world.pack(2 * KIB) for _ in range(6)]
    world.finish()
    records = [world.pack(2 * KIB) for _ in range(6)]
    world.fail_copy(1)
    with pytest.raises(RuntimeError, match="injected"):
        _ = [world.unpack(record) for record in records[::-1]]
    world.finish()
    before = world.stats
    step(world, 6, 2 * KIB)
    world.finish()
    after = world.stats
    assert after["packs"] - before["packs"] == 6
    assert after["misses"] == before["misses"]
    assert after["host_live"] == 0
    assert world.wrong == 0


def test_out_of_order_is_a_counted_miss(native, schedule):
    world = native.World(schedule)
    records = [world.pack(2 * KIB) for _ in range(8)]
    for record in records:  # forward order, the worst
        world.unpack(record)
        world.give_back(record)
    assert world.stats["misses"] >= 3
    world.finish()
    assert world.wrong == 0


def test_device_out_of_memory(native, schedule):
    """First the prefetch goes, then there is an error with the size; a step that fits runs again."""
    world = native.World(schedule)
    world.limit_device(5 * KIB)  # one slot of 4 KiB, not two
    step(world, 8, 4 * KIB)
    assert world.stats["prefetch"] == 0
    records = [world.pack(6 * KIB) for _ in range(8)]
    with pytest.raises(RuntimeError, match="out of device memory while bringing back a tensor of 6144 bytes"):
        world.unpack(records[0])
    world.finish()
    step(world, 8, 4 * KIB)
    world.finish()
    assert world.wrong == 0


# ---- arena ----


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40000), max_size=40),
    order=st.randoms(use_true_random=False),
    pin_limit=st.sampled_from([1 << 40, 30000, 0]),
)
def test_arena(native, sizes, order, pin_limit):
    """Blocks never overlap, are 512-byte aligned, and coalesce to one."""
    arena = native.Arena(1 << 20, pin_limit)
    live = {}
    for size in sizes:
        address = arena.alloc(size)
        if address is None:
            assert arena.live + size > (1 << 20) - 4096 * len(sizes) - sum(-(-s // 512) * 512 for s in live.values())
            continue
        assert address % 512 == 0
        assert all(address + size <= other or other + n <= address for other, n in live.items())
        assert sum(n for _, n, _ in arena.pieces(address, size)) == size
        live[address] = size
        if order.random() < 0.4:
            address = order.choice(list(live))
            arena.free(address, live.pop(address))
    assert arena.live == sum(-(-size // 512) * 512 for size in live.values())
    for address, size in live.items():
        arena.free(address, size)
    assert arena.live == 0
    if arena.committed:
        growths, address = arena.committed, arena.alloc(arena.committed)
        assert address is not None
        assert arena.committed == growths


def test_arena_pins_by_halves(native):
    arena = native.Arena(64 << 20, 10 << 20)
    address = arena.alloc(32 << 20)
    assert 4 << 20 <= arena.pinned <= 10 << 20
    pieces = arena.pieces(address + 100, (32 << 20) - 200)
    assert pieces[0][0] == 0
    assert sum(n for _, n, _ in pieces) == (32 << 20) - 200
    assert [pinned for *_, pinned in pieces] == sorted((pinned for *_, pinned in pieces), reverse=True)


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.parametrize(
    ("cgroup", "files", "left"),
    [
        ("0::/job/step\n",
         {"job/memory.max": "9000000000", "job/memory.current": "1000000000",
          "job/step/memory.max": "max", "job/step/memory.current": "5"}, 8_000_000_000),
        ("5:cpu,memory:/job\n",
         {"memory/job/memory.limit_in_bytes": "7000000000", "memory/job/memory.usage_in_bytes": "2000000000"},
         5_000_000_000),
        ("0::/\n", {}, (50 << 30) - (4 << 30)),
    ],
)  # fmt: skip
def test_budget(native, tmp_path, monkeypatch, cgroup, files, left):
    write(tmp_path, "proc/meminfo", f"MemTotal:  {100 << 20} kB\nMemFree: 1 kB\nMemAvailable:  {50 << 20} kB\n")
    write(tmp_path, "proc/self/cgroup", cgroup)
    for name, text in files.items():
        write(tmp_path, f"sys/fs/cgroup/{name}", text + "\n")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert native.host_budget(str(tmp_path)) == left
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert native.host_budget(str(tmp_path)) == left // 4
