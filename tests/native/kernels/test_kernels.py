"""The row kernel by itself against float64, on the simulator: every block size that is launched, every schedule."""

from __future__ import annotations

import pytest
import simulated
import torch

# 256 threads up to 8192 columns, then 512; steps of 4096 and 8192 columns; segments of 512.
RAGGED = (1, 3, 4, 5, 31, 257, 4095, 4097, 8192, 8193, 16385, 20001, 32769, 70001)
CHIPS = {"nothing kept": (4, 48 << 10), "a part kept": (4, 100 << 10), "H100": (132, 227 << 10)}
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=list(simulated.SCHEDULES))
def schedule(request):
    simulated.kernels().set_schedule(simulated.SCHEDULES[request.param])
    yield request.param
    simulated.kernels().set_schedule(0)


def run_rows(logits: torch.Tensor, target: torch.Tensor, c, e, out_dtype, *, chip=CHIPS["H100"], temperature=1.0,
             softcap=0.0, bias=None):  # fmt: skip
    """(logp, entropy, signed row, row scale) of logits [N, V]. Padding holds NaN."""
    n, v = logits.shape
    stride = -(-v // 8) * 8
    tile = torch.full((n, stride), float("nan"))
    tile[:, :v] = logits
    logp, entropy, scale, row_scale = (torch.zeros(n) for _ in range(4))
    simulated.kernels().set_chip(*chip)
    simulated.kernels().rows(
        {
            "tokens": n, "hidden_size": 1, "vocabulary": v, "stride": stride, "target": target.data_ptr(),
            "logits": tile.data_ptr(), "hidden_dtype": 0, "weight_dtype": 0, "temperature": temperature,
            "softcap": softcap, "logit_scale": 1.0, "exact_kl": 0, "bias": simulated.address(bias),
            "out_dtype": simulated.DTYPES.index(out_dtype), "dweight_dtype": 0, "c": simulated.address(c),
            "e": simulated.address(e),
            "logp": logp.data_ptr(), "entropy": entropy.data_ptr(), "scale": scale.data_ptr(),
            "row_scale": row_scale.data_ptr(),
        }
    )  # fmt: skip
    simulated.kernels().set_chip(*CHIPS["a part kept"])
    first = 0 if out_dtype == torch.float32 else stride  # a half type has the second half of the row of logits
    return logp, entropy, tile.view(out_dtype)[:, first : first + v].clone(), row_scale


def oracle(logits, target, c, e, *, temperature=1.0, softcap=0.0, bias=None):
    """The same in float64: logp, entropy, dL/dlogits."""
    x = logits.double().requires_grad_()
    z = x if bias is None else x + bias.double()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    rows = torch.log_softmax(z / temperature, -1)
    logp = rows.gather(-1, target[:, None])[:, 0]
    entropy = -(rows.exp() * rows.clamp(min=-1e30)).sum(-1)
    total = (c.double() * logp).sum() + (0 if e is None else (e.double() * entropy).sum())
    (gradient,) = torch.autograd.grad(total, x)
    return logp.detach(), entropy.detach(), gradient


def check(logits, target, c, e, out_dtype, **options):
    chip = options.pop("chip", CHIPS["H100"])
    logp, entropy, signed, scale = run_rows(logits, target, c, e, out_dtype, chip=chip, **options)
    true_logp, true_entropy, gradient = oracle(logits, target, c, e, **options)
    torch.testing.assert_close(logp.double(), true_logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), true_entropy, rtol=1e-6, atol=1e-6)
    actual = scale.double()[:, None] * signed.double()
    for mine, true, one in zip(actual, gradient, scale.tolist(), strict=True):
        assert float((mine - true).norm()) <= (1e-6 + EPS[out_dtype]) * float(true.norm()) + 3e-7 * one


# What a chip keeps in shared memory matters for rows of several steps.
ROWS = [(v, chip) for chip in CHIPS for v in RAGGED if chip == "H100" or v in (4097, 8193, 20001, 70001)]


@pytest.mark.parametrize("beyond", [False, True], ids=["logp", "beyond logp"])
@pytest.mark.parametrize("out_dtype", simulated.DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(("vocabulary", "chip"), ROWS)
def test_rows(vocabulary, chip, out_dtype, beyond, schedule):
    g = torch.Generator().manual_seed(vocabulary + 2 * simulated.DTYPES.index(out_dtype) + beyond)
    n = 3
    logits = 4 * torch.randn(n, vocabulary, generator=g)
    target = torch.randint(0, vocabulary, (n,), generator=g)
    c = torch.randn(n, generator=g) / 3e4
    e = torch.randn(n, generator=g) / 3e4 if beyond else None
    check(logits, target, c, e, out_dtype, chip=CHIPS[chip], temperature=0.7)
    check(logits, target, c, e, out_dtype, chip=CHIPS[chip], softcap=5.0, bias=torch.randn(vocabulary, generator=g))


@pytest.mark.parametrize("vocabulary", [300, 20001])
def test_extremes(vocabulary, schedule):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, vocabulary, generator=g)
    target = torch.tensor([0, vocabulary - 1, 5, 5, 5, 5])
    logits[0, 1::2] = -float("inf")
    logits[1, :] = -float("inf")  # the target alone is possible
    logits[1, -1] = 3.0
    logits[2] *= 1e6
    logits[3] *= 1e30
    logits[4, 5] = 60.0  # confident: 1 - p is 1e-23
    logits[5] += 3e7  # where one ulp is 2
    c = torch.ones(6)
    logp, entropy, signed, scale = run_rows(logits, target, c, None, torch.float32)
    gradients = scale.double()[:, None] * signed.double()
    true_logp, _, gradient = oracle(logits, target, c, None)
    fine = [0, 1, 2, 3, 5]
    torch.testing.assert_close(logp.double()[fine], true_logp[fine], rtol=1e-6, atol=1e-6)
    assert bool(signed.isfinite().all())
    # float64 log-softmax itself cannot see 1 - p = 1e-23: the sum over the others can.
    rest = torch.logsumexp(torch.cat([logits[4, :5], logits[4, 6:]]).double(), 0) - 60.0
    assert float(logp[4]) == pytest.approx(-float(rest.exp()), rel=1e-5)
    assert float(gradients[4, 5]) == pytest.approx(float(rest.exp()), rel=1e-5)
    torch.testing.assert_close(gradients[fine], gradient[fine].nan_to_num(), rtol=1e-4, atol=1e-6)
    assert float(entropy[1]) == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_stays_alone(poison, schedule):
    logits = torch.randn(3, 500)
    logits[1, 77] = poison
    clean = logits.clone()
    clean[1, 77] = 0
    target, c = torch.tensor([1, 2, 3]), torch.ones(3)
    logp, _, signed, _ = run_rows(logits, target, c, None, torch.bfloat16)
    fine, _, wanted, _ = run_rows(clean, target, c, None, torch.bfloat16)
    assert bool(logp[1].isnan())
    assert torch.equal(logp[[0, 2]], fine[[0, 2]])
    assert torch.equal(signed[[0, 2]], wanted[[0, 2]])


def test_skipped_rows_are_zero_whatever_they_hold(schedule):
    logits = torch.full((3, 500), float("nan"))
    logits[1] = torch.randn(500)
    logp, _, signed, scale = run_rows(logits, torch.tensor([-100, 7, 3]), torch.tensor([1.0, 2.0, 0.0]), None,
                                      torch.bfloat16)  # fmt: skip
    assert bool((signed[[0, 2]] == 0).all())
    assert scale[[0, 2]].tolist() == [0.0, 0.0]
    assert float(scale[1]) == pytest.approx(-2 * float(torch.expm1(logp[1])), rel=1e-6)
    assert float(logp[1]) < 0


def test_a_target_outside_the_vocabulary_shows():
    logp, _, _, _ = run_rows(torch.randn(2, 50), torch.tensor([50, 3]), torch.ones(2), None, torch.float32)
    assert bool(logp[0].isnan())
    assert bool(logp[1].isfinite())


def score(h, chunk: int, rows: int = 16, **needs):
    kernels = simulated.kernels()
    kernels.force_tiles(rows, chunk)
    try:
        return simulated.linear_logprob(h.hidden, h.weight, h.target, None, None, 0.9, 0.0, 1.0, True,
                                        needs.get("direction", False), 1 << 40, False)  # fmt: skip
    finally:
        kernels.force_tiles(0, 0)


def test_both_tilings_give_the_same_bits():
    """Whole rows and chunks of whole segments, with and without a gradient: on policy the ratio is exactly 1."""
    from testing.cases import make_head

    h = make_head(1, 20, 8, 70_001, torch.bfloat16, spread=4.0)
    whole = score(h, 0)
    others = [score(h, 32768), score(h, 32768, direction=True), score(h, 0, 20, direction=True)]
    for other in (*others, score(h, 11_776, direction=True), score(h, 512)):
        assert torch.equal(other[0], whole[0])
        assert torch.equal(other[1], whole[1])


def test_backward_of_a_frozen_head_in_chunks():
    """No scale goes out with it: the direction is dL/dhidden itself."""
    from testing.cases import make_head, relative_error

    h = make_head(2, 20, 8, 300, ignored=0.2)
    c = torch.randn(20)
    simulated.kernels().force_tiles(16, 64)
    try:
        actual, _, _ = simulated.linear_logprob_backward(
            h.hidden, h.weight, h.target, None, None, 1.0, 0.0, 1.0, c, None, True, False, False, 1 << 40, None, None
        )
    finally:
        simulated.kernels().force_tiles(0, 0)
    truth = h.cast(torch.float64, train_head=False)
    (wanted,) = torch.autograd.grad((c.double() * truth.logprob()[0]).sum(), truth.hidden)
    assert relative_error(actual, wanted) < 1e-6


EXACT = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}  # what the dtype rounds, and the sums


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", simulated.DTYPES, ids=["f32", "bf16", "f16"])
def test_both_passes_in_chunks(dtype, trains, schedule):
    """Ragged chunks and tiles. One token likes the end of the vocabulary, which is met last: its p_y is below e^-87."""
    from testing.cases import relative_error

    n, h, v = 37, 8, 2100
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(n, h, generator=g).to(dtype), torch.randn(v, h, generator=g).to(dtype)
    hidden[5], weight[1900:, 0] = 0, 12
    hidden[5, 0] = 10  # 120 from the vocabulary's end, which is met last
    target = torch.randint(0, 1000, (n,), generator=g)
    weight[target[5], 0] = 0
    c = torch.randn(n, generator=g) / 2e5
    kernels = simulated.kernels()
    kernels.force_tiles(16, 512)
    try:
        head = (hidden, weight, target, None, None, 1.0, 0.0, 1.0)
        logp, _, direction, normalizer = simulated.linear_logprob(*head, False, True, 1 << 40, True)
        if trains:
            rest = (c, None, False, True, False, 1 << 40, logp, normalizer)
            d_weight = simulated.linear_logprob_backward(*head, *rest)[1]
    finally:
        kernels.force_tiles(0, 0)
    truth = hidden.double().requires_grad_(), weight.double().requires_grad_()
    true_logp = torch.log_softmax(truth[0] @ truth[1].T, -1).gather(-1, target[:, None])[:, 0]
    wanted = torch.autograd.grad((c.double() * true_logp).sum(), truth)
    assert float(true_logp[5]) < -87
    torch.testing.assert_close(logp.double(), true_logp.detach(), rtol=1e-6, atol=1e-6)
    assert relative_error(c[:, None].double() * direction.double(), wanted[0]) < EXACT[dtype]
    if trains:
        assert relative_error(d_weight, wanted[1]) < EXACT[dtype]


def test_the_rule_of_the_tiling():
    """H100, H = 4096, V = 151936: whole output tiles of the GEMMs, within the workspace, two passes for a trained head
    in a small one, and no chunks if all of it fits. tests/native/counting has the launches, bytes and waves."""
    kernels = simulated.kernels()
    kernels.set_chip(*CHIPS["H100"])
    try:
        for workspace, trains in ((256, False), (1024, False), (256, True)):
            splits, rows, _, held = kernels.plan(8192, 4096, 151_936, 1, trains, workspace << 20)
            assert splits is trains
            assert trains or rows % 128 == 0
            assert held <= workspace << 20
        assert kernels.plan(64, 4096, 151_936, 1, False, 256 << 20)[:3] == (False, 64, 151_936)
    finally:
        kernels.set_chip(*CHIPS["a part kept"])


@pytest.mark.parametrize("begin", [0, 1])  # a vector access at 1 is for the sanitized build to see
@pytest.mark.parametrize(("columns", "dtype"), [(7, torch.float32), (64, torch.bfloat16), (1030, torch.float16)])
def test_scale_rows(columns, dtype, begin, schedule):
    x, scale = torch.empty(begin + 5000 * columns, dtype=dtype)[begin:].view(5000, columns).normal_(), torch.randn(5000)
    scale[3] = 0
    x[3] = float("nan")
    wanted = (x.float() * scale[:, None]).to(dtype)
    wanted[3] = 0
    assert torch.equal(simulated.scale_rows(x, scale), wanted)
