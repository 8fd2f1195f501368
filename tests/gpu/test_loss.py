"""CUDA against the CPU path and against float64, for every option of the loss; streams, graphs, devices."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_grpo import check_fused, fused_and_oracle, lengths_of, near_a_clip

from longgrpo import GRPOLossConfig, grpo_loss, linear_grpo_loss, linear_logprob
from longgrpo.loss.types import LOSS_TYPES
from testing.cases import DTYPES, batches, configs, heads, make_batch, make_head, relative_error

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
MIB = 1 << 20
DEVICE = os.environ.get("LONGGRPO_GPU_TESTS_ON", "cuda")  # bench/gpu_dryrun.py: the CPU, whose ops are simulated


def rounds_its_rows(head, train_head: bool) -> bool:
    """A bias gradient sums rows that are rounded to the dtype: where they cancel, no bound on it holds."""
    return train_head and head.hidden.dtype != torch.float32


def to_device(x, device=DEVICE):
    return x.to(device) if isinstance(x, torch.Tensor) else x


def on_device(head, dtype, *, train_head: bool):
    """The head's arguments there, as leaves."""
    h = head.cast(dtype, train_head=train_head)
    moved = type(h)(**{k: to_device(v) for k, v in vars(h).items()})
    for x in (moved.hidden, moved.weight, moved.bias):
        if x is not None:
            x.detach_()
    moved.hidden.requires_grad_()
    moved.weight.requires_grad_(train_head)
    if moved.bias is not None:
        moved.bias.requires_grad_(train_head)
    return moved


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(head=heads(max_tokens=300), train_head=st.booleans(), entropy=st.booleans())
def test_logprob(head, train_head, entropy):
    assume(head.bias is None or not rounds_its_rows(head, train_head))
    mine, truth = (
        on_device(head, head.hidden.dtype, train_head=train_head),
        head.cast(torch.float64, train_head=train_head),
    )
    with torch.no_grad():
        cpu = linear_logprob(head.hidden, head.weight, head.target, entropy=entropy, **head.options)
    out = linear_logprob(mine.hidden, mine.weight, mine.target, entropy=entropy, **mine.options)
    expected = truth.logprob()
    torch.testing.assert_close(out.logp.cpu(), cpu.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logp.cpu().double(), expected[0], rtol=2e-5, atol=2e-5)
    total, wanted = out.logp.double().sum(), expected[0].sum()
    if entropy:
        torch.testing.assert_close(out.entropy.cpu().double(), expected[1], rtol=2e-5, atol=2e-5)
        total, wanted = total + out.entropy.double().sum(), wanted + expected[1].sum()
    for a, w in zip(torch.autograd.grad(total, mine.leaves), torch.autograd.grad(wanted, truth.leaves), strict=True):
        assert relative_error(a.cpu(), w) <= 2 * EPS[head.hidden.dtype] + 5e-6


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(batch=batches(), config=configs(), normalizer=st.sampled_from([None, 37.0]))
def test_token_loss(batch, config, normalizer):
    assume(not near_a_clip(batch, config))
    results = []
    for device in ("cpu", DEVICE):
        arguments = {k: to_device(v, device) for k, v in batch.arguments(config).items()}
        logp, entropy = (to_device(x.clone(), device).requires_grad_() for x in (batch.logp, batch.entropy))
        out = grpo_loss(logp, to_device(batch.advantages, device), **arguments, entropy=entropy, normalizer=normalizer,
                        config=config)  # fmt: skip
        grads = torch.autograd.grad(out.loss, (logp, entropy), allow_unused=True, materialize_grads=True)
        results.append([x.cpu() for x in (out.loss.detach(), *grads, *out.metrics.values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def cuda_and_cpu(head, batch, config, *, train_head, ref=None, **options):
    """(loss, gradients) of the fused loss on CUDA, and fused_and_oracle's of float64."""
    _, wanted = fused_and_oracle(head, batch, config, train_head=train_head, ref=ref)
    mine = on_device(head, head.hidden.dtype, train_head=train_head)
    extra = {}
    if ref is not None:
        extra = {"ref_hidden": to_device(ref.hidden), "ref_weight": to_device(ref.weight) if train_head else None}
    arguments = {k: to_device(v) for k, v in batch.arguments(config).items()}
    out = linear_grpo_loss(mine.hidden, mine.weight, mine.target, to_device(batch.advantages), **arguments, **extra,
                           config=config, **mine.options, **options)  # fmt: skip
    grads = torch.autograd.grad(4096.0 * out.loss, mine.leaves)
    return (out.loss.detach().cpu(), [g.cpu() for g in grads]), wanted


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(head=heads(max_tokens=300), config=configs(), seed=st.integers(0, 2**31), train_head=st.booleans(),
       on_policy=st.booleans(), importance=st.booleans())  # fmt: skip
def test_fused_loss(head, config, seed, train_head, on_policy, importance):
    assume(head.target.numel() != len(lengths_of(0)))
    with torch.no_grad():
        logp = linear_logprob(head.hidden, head.weight, head.target, **head.options).logp
    batch = make_batch(
        seed, lengths_of(len(logp)), logp=logp, importance=importance, off_policy=None if on_policy else 0.2
    )
    batch = batch.masked(head.target >= 0)
    assume(not near_a_clip(batch, config))
    check_fused(*cuda_and_cpu(head, batch, config, train_head=train_head), head.hidden.dtype)


@pytest.mark.parametrize("kl", ["exact_reverse", "exact_forward"])
@pytest.mark.parametrize("loss_type", ["dapo", "gmpo"])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_kl(kl, loss_type, train_head, dtype):
    config = GRPOLossConfig(loss_type=loss_type, kl=kl, beta=0.3, entropy_coef=0.01)
    head = make_head(1, 30, 24, 200, dtype, softcap=20.0, temperature=0.9, bias=True)
    ref = make_head(2, 30, 24, 200, dtype)
    ref.hidden = (head.hidden + 0.3 * ref.hidden).to(dtype)
    with torch.no_grad():
        logp = linear_logprob(head.hidden, head.weight, head.target, **head.options).logp
    batch = make_batch(3, [10, 0, 20], logp=logp, off_policy=0.1)
    check_fused(*cuda_and_cpu(head, batch, config, train_head=train_head, ref=ref), dtype)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", [64 * MIB, 256 * MIB])
def test_large_head(loss_type, train_head, dtype, workspace):
    """A real vocabulary, in several tiles: chunks where the head is frozen, whole rows where it is trained."""
    if train_head and loss_type not in ("dapo", "gmpo"):
        pytest.skip("two loss types stand for all of them here")
    head = make_head(1, 600, 256, 151_936, dtype, ignored=0.2)
    with torch.no_grad():
        cuda = on_device(head, dtype, train_head=False)
        logp = linear_logprob(cuda.hidden, cuda.weight, cuda.target).logp.cpu()
    batch = make_batch(3, [200, 400], logp=logp, off_policy=0.1)
    config = GRPOLossConfig(loss_type=loss_type, beta=0.04, epsilon_high=5.0 if loss_type == "cispo" else None,
                            max_completion_length=400)  # fmt: skip
    batch = batch.masked(head.target >= 0)
    if not near_a_clip(batch, config):
        check_fused(*cuda_and_cpu(head, batch, config, train_head=train_head, workspace=workspace), dtype)


@pytest.mark.parametrize("hidden_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_mixed_dtypes(hidden_dtype, weight_dtype):
    head = make_head(10, 40, 70, 5000)
    hidden, weight = head.hidden.to(hidden_dtype), head.weight.to(weight_dtype)
    leaves = [hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_()]
    logp = linear_logprob(*leaves, head.target.to(DEVICE)).logp
    truth = [x.double().requires_grad_() for x in (hidden, weight)]
    wanted = torch.log_softmax(truth[0] @ truth[1].T, -1).gather(-1, head.target[:, None])[:, 0]
    torch.testing.assert_close(logp.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    for a, w in zip(torch.autograd.grad(logp.sum(), leaves), torch.autograd.grad(wanted.sum(), truth), strict=True):
        assert relative_error(a.cpu(), w) <= 2 * EPS[torch.bfloat16]


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("workspace", [64 * MIB, 1024 * MIB])
def test_on_policy_ratio_is_exactly_one(train_head, workspace):
    """Scoring and training take two tilings of the same head: the library's GEMM must give both the same bits."""
    head = make_head(4, 1000, 256, 151_936, torch.bfloat16, temperature=0.7)
    h = on_device(head, torch.bfloat16, train_head=train_head)
    with torch.no_grad():
        old = linear_logprob(h.hidden, h.weight, h.target, workspace=workspace, **h.options).logp
    options = {"config": GRPOLossConfig(epsilon=0.0), "workspace": workspace, **h.options}
    advantages = torch.ones(1000, device=DEVICE)
    metrics = linear_grpo_loss(h.hidden, h.weight, h.target, advantages, old_logp=old, **options).metrics
    assert float(metrics["ratio_min"]) == float(metrics["ratio_max"]) == 1.0


def one_step(h, advantages, bounds, loss_type="dapo"):
    config = GRPOLossConfig(loss_type=loss_type, entropy_coef=0.01)
    out = linear_grpo_loss(
        h.hidden, h.weight, h.target, advantages, cu_seqlens=bounds, config=config, workspace=64 * MIB
    )
    return (out.loss.detach(), *torch.autograd.grad(out.loss, h.leaves))


def two_sequences(device=DEVICE):
    return torch.tensor([0, 100, 256], dtype=torch.int32, device=device)


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "gmpo"])
def test_deterministic_on_any_stream_and_never_waits(train_head, loss_type):
    h = on_device(make_head(6, 256, 128, 50_000, torch.bfloat16), torch.bfloat16, train_head=train_head)
    advantages, bounds = torch.randn(256, device=DEVICE), two_sequences()
    first = one_step(h, advantages, bounds, loss_type)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            second = one_step(h, advantages, bounds, loss_type)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_captured_into_a_graph():
    h = on_device(make_head(7, 256, 128, 50_000, torch.bfloat16), torch.bfloat16, train_head=True)
    advantages, bounds = torch.randn(256, device=DEVICE), two_sequences()
    eager = one_step(h, advantages, bounds)
    with torch.cuda.stream(torch.cuda.Stream()):  # warm-up as torch asks for it
        one_step(h, advantages, bounds)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one_step(h, advantages, bounds)
    advantages.neg_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured[1:], eager[1:], strict=True):
        assert not torch.equal(a, b)  # the new advantages were read
    advantages.neg_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    head = make_head(8, 256, 128, 5000, torch.bfloat16)
    results = []
    for device in ("cuda:0", "cuda:1"):
        h = type(head)(**{k: to_device(v, device) for k, v in vars(head).items()})
        h.hidden.requires_grad_()
        results.append([x.cpu() for x in one_step(h, torch.ones(256, device=device), two_sequences(device))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("train_head", [False, True])
def test_memory_stays_within_the_workspace(train_head):
    h = on_device(make_head(9, 4096, 512, 100_000, torch.bfloat16), torch.bfloat16, train_head=train_head)
    advantages, workspace = torch.randn(4096, device=DEVICE), 128 * MIB
    torch.ones(2, 2, device=DEVICE) @ torch.ones(2, 2, device=DEVICE)  # cuBLAS takes its own workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_grpo_loss(h.hidden, h.weight, h.target, advantages, workspace=workspace)
    peak = torch.cuda.max_memory_allocated() - before
    results = h.hidden.numel() * 2 + (h.weight.numel() * 4 if train_head else 0)
    assert peak <= workspace + results + 4 * MIB
    assert bool(out.loss.isfinite())


@pytest.mark.parametrize("tokens", [70_000, 1_000_000])
def test_no_length_limit(tokens):
    hidden = torch.randn(tokens, 8, device=DEVICE).requires_grad_()
    weight, target = torch.randn(16, 8, device=DEVICE), torch.randint(0, 16, (tokens,), device=DEVICE)
    advantage, bounds = torch.ones(1, device=DEVICE), torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    config = GRPOLossConfig(loss_type="grpo")
    loss = linear_grpo_loss(hidden, weight, target, advantage, cu_seqlens=bounds, config=config).loss
    (gradient,) = torch.autograd.grad(loss, hidden)
    oracle = hidden.detach()[-3:].double().requires_grad_()
    rows = torch.log_softmax(oracle @ weight.double().T, -1).gather(-1, target[-3:, None])
    (wanted,) = torch.autograd.grad(-rows.sum() / tokens, oracle)
    assert relative_error(gradient[-3:], wanted) < 1e-5


def test_errors_before_any_work():
    with pytest.raises(ValueError, match="weight is on cpu and hidden on"):
        linear_logprob(
            torch.randn(3, 4, device=DEVICE), torch.randn(9, 4), torch.zeros(3, dtype=torch.int64, device=DEVICE)
        )
    logp = linear_logprob(torch.randn(2, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE),
                          torch.tensor([9, 1], device=DEVICE)).logp  # fmt: skip
    assert logp.isnan().tolist() == [True, False]  # a target outside the vocabulary shows, without a wait
