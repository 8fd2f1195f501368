"""The scoring kernel against float64 on the simulator, through the op's own signature: logits never reach memory."""

from __future__ import annotations

import pytest
import simulated
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testing.cases import Head, make_head

HALVES = (torch.bfloat16, torch.float16)
# (rows, hidden, vocabulary): tiles of 128 x 128, steps of 32, segments of 512 columns, chunks of 8 numbers.
RAGGED = [
    (1, 8, 1), (3, 24, 2), (128, 32, 128), (129, 40, 129), (40, 72, 511), (130, 33, 513), (17, 1, 700), (260, 96, 1025),
    (5, 200, 2700),
]  # fmt: skip
OPTIONS = {
    "plain": {},
    "a temperature each": {"temperature": None},
    "scale and temperature": {"logit_scale": 0.25, "temperature": 0.7, "spread": 6.0},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0, "bias": True, "temperature": None, "logit_scale": 2.0},
}


@pytest.fixture(params=list(simulated.SCHEDULES))
def schedule(request):
    simulated.kernels().set_schedule(simulated.SCHEDULES[request.param])
    yield request.param
    simulated.kernels().set_schedule(0)


def score(h: Head, splits: int = 0, workspace: int = 1 << 30, *, direction: bool = False):
    """(logp, entropy) of the kernel with the vocabulary in `splits` parts; 0: as its plan says, -1: of the rule."""
    each = isinstance(h.temperature, torch.Tensor)
    simulated.kernels().force_score(splits)
    try:
        logp, entropy, *_ = simulated.linear_logprob(
            h.hidden, h.weight, h.target, None if h.bias is None else h.bias.float(), h.temperature if each else None,
            1.0 if each else h.temperature, h.softcap or 0.0, h.logit_scale, True, direction, workspace,
        )  # fmt: skip
    finally:
        simulated.kernels().force_score(-1)
    return logp, entropy


def launches(run) -> int:
    before = simulated.kernels().launches()
    run()
    return simulated.kernels().launches() - before


def check(h: Head, **options) -> None:
    logp, entropy = score(h, **options)
    kept = h.target >= 0
    true_logp, true_entropy = (x.detach() for x in h.cast(torch.float64, train_head=False).logprob())
    torch.testing.assert_close(logp[kept].double(), true_logp[kept], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy[kept].double(), true_entropy[kept], rtol=1e-6, atol=1e-6)
    assert not logp[~kept].any()
    assert not entropy[~kept].any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_ragged_shapes(shape, dtype, options):
    check(make_head(sum(shape), *shape, dtype, ignored=0.2, **options))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(130, 104, 700), (9, 37, 1100)], ids=str)
def test_every_schedule(shape, dtype, schedule):
    check(make_head(1, *shape, dtype, ignored=0.2, bias=True, softcap=30.0))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 140), hidden=st.integers(1, 140), vocabulary=st.integers(1, 1300),
    dtype=st.sampled_from(HALVES), options=st.sampled_from(list(OPTIONS.values())), splits=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(rows, hidden, vocabulary, dtype, options, splits, seed):
    check(make_head(seed, rows, hidden, vocabulary, dtype, ignored=0.2, **options), splits=splits)


@pytest.mark.parametrize("dtype", HALVES)
def test_any_split_of_the_vocabulary_gives_the_same_bits(dtype, schedule):
    h = make_head(2, 40, 40, 3000, dtype)  # six segments
    whole = score(h, 1)
    for splits in (2, 3, 4, 5, 6, 100):
        for actual, wanted in zip(score(h, splits), whole, strict=True):
            assert torch.equal(actual, wanted)


def test_tiles_of_rows_give_the_same_bits():
    """A workspace of 16 rows, and a token beside other tokens."""
    h = make_head(3, 300, 24, 600, torch.bfloat16, temperature=None)
    kernels = simulated.kernels()
    workspace = 16 * (kernels.score_plan(300, 24, 600, 1 << 30)[2] // 300 + 1) + 64
    whole, tiles = score(h), score(h, workspace=workspace)
    assert launches(lambda: score(h, workspace=workspace)) > 2 * launches(lambda: score(h))
    alone = score(Head(h.hidden[77:78].clone(), h.weight, h.target[77:78], temperature=h.temperature[77:78]))
    for i in range(2):
        assert torch.equal(tiles[i], whole[i])
        assert torch.equal(alone[i], whole[i][77:78])


def test_a_workspace_for_no_row_is_refused():
    with pytest.raises(ValueError, match="is too small for a tile of 16 rows"):
        score(make_head(3, 300, 24, 600, torch.bfloat16), workspace=100)


@pytest.mark.parametrize("begin", [1, 4])  # rows that do not start on 16 bytes
def test_unaligned_operands(begin):
    h = make_head(4, 20, 64, 300, torch.bfloat16)

    def moved(x):
        return torch.cat([x.new_zeros(begin), x.flatten()])[begin:].view(x.shape)

    for hidden, weight in ((moved(h.hidden), h.weight), (h.hidden, moved(h.weight))):
        other = Head(hidden, weight, h.target)
        assert all(map(torch.equal, score(other), score(h)))


def test_a_poisoned_row_stays_alone(schedule):
    h = make_head(5, 20, 40, 600, torch.bfloat16)
    clean = score(h)
    h.hidden[7, 3] = float("nan")
    logp, entropy = score(h)
    kept = torch.arange(20) != 7
    assert bool(logp[7].isnan())
    assert bool(entropy[7].isnan())
    assert torch.equal(logp[kept], clean[0][kept])
    assert torch.equal(entropy[kept], clean[1][kept])


def test_extremes():
    h = make_head(6, 4, 16, 700, torch.bfloat16)
    bias = torch.zeros(700)
    bias[1::2] = -float("inf")  # half of the columns are impossible
    bias[100] = 60.0  # a confident token: 1 - p is 1e-23
    h.target[:] = torch.tensor([100, 0, 2, 699])
    h.bias = bias
    logp, entropy = score(h)
    rows = h.cast(torch.float64, train_head=False).rows().detach()
    true_logp = rows.gather(-1, h.target[:, None])[:, 0]
    assert bool(logp[3] == -float("inf"))
    assert -1e-15 < float(logp[0]) < 0
    torch.testing.assert_close(logp[:3].double(), true_logp[:3], rtol=1e-6, atol=1e-6)
    assert bool(entropy.isfinite().all())


def test_a_target_outside_the_vocabulary_shows():
    h = make_head(7, 3, 16, 130, torch.bfloat16)
    h.target[:] = torch.tensor([130, 5, 2**40])
    assert score(h)[0].isnan().tolist() == [True, False, True]


def test_it_serves_only_when_asked_and_only_what_it_knows():
    half = make_head(8, 20, 16, 300, torch.bfloat16)
    wide = make_head(8, 20, 16, 300, torch.float32)
    mixed = Head(half.hidden, wide.weight, half.target)
    assert launches(lambda: score(half)) == 2  # the kernel and its merge
    kernels = simulated.kernels()

    def products(h, splits=0, **options):
        """Multiply-adds of the library's GEMM, which the kernel does not need."""
        before = kernels.multiply_adds()
        score(h, splits, **options)
        return kernels.multiply_adds() - before

    assert products(half) == 0
    assert products(half, -1) > 0
    assert products(wide) > 0
    assert products(mixed) > 0
    assert products(half, direction=True) > 0  # a gradient
    kernels.set_chip(4, 64 << 10, 75)
    try:
        assert products(half) > 0
    finally:
        kernels.set_chip(4, 100 << 10)


def test_a_launch_is_one_wave():
    """Two blocks of 128 rows a multiprocessor, at most 2048 rows, all of the vocabulary's segments in use."""
    kernels = simulated.kernels()
    try:
        for processors in (108, 114, 128, 132):
            kernels.set_chip(processors, 99 << 10)
            for tokens in (1, 100, 2048, 8192, 163_840):
                rows, splits, workspace = kernels.score_plan(tokens, 4096, 151_936, 256 << 20)
                tiles = -(-rows // 128)
                assert rows <= 2048
                assert workspace <= 256 << 20
                assert 0.9 * 2 * processors < tiles * splits <= 2 * processors
    finally:
        kernels.set_chip(4, 100 << 10)


@pytest.mark.parametrize("shape", [(200, 96, 1100), (40, 37, 300)], ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_no_bank_conflicts(shape, dtype):
    """A step of a block: four warps load 16 times four matrices, and 1024 chunks are stored, eight lanes at a time."""
    rows, hidden, vocabulary = shape
    h = make_head(9, *shape, dtype)
    before = simulated.kernels().shared_accesses()
    score(h)
    accesses, conflicts = (a - b for a, b in zip(simulated.kernels().shared_accesses(), before, strict=True))
    steps = -(-rows // 128) * -(-vocabulary // 128) * -(-hidden // 32)
    assert accesses == steps * (4 * 16 * 4 + 1024 // 8)
    assert conflicts == 0
