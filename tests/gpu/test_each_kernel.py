"""Small calls that launch every kernel but those of bench_cuda's scoring, and move bytes through the offload: what
compute-sanitizer looks at. `python bench/gpu_dryrun.py` checks on the simulator that none is missing."""

from __future__ import annotations

import pytest
import torch
from test_grpo import check_fused
from test_loss import cuda_and_cpu, on_device, to_device
from test_offload import gradients, same, torch_checkpoint

from longgrpo import GRPOLossConfig, OffPolicyCorrection, grpo_loss, linear_logprob
from longgrpo.offload import OffloadEngine
from testing.cases import make_batch, make_head, relative_error

LONG = 40_000  # columns of a row that takes the largest block


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_passes_of_logprob(dtype, train_head):
    """Chunks, and for a trained head its weight's gradient."""
    head = make_head(1, 20, 16, LONG, dtype, bias=dtype == torch.float32)
    mine, truth = (
        on_device(head, dtype, train_head=train_head),
        head.cast(torch.float64, train_head=train_head),
    )
    logp = linear_logprob(mine.hidden, mine.weight, mine.target, **mine.options).logp
    wanted = truth.logprob()[0]
    torch.testing.assert_close(logp.cpu().double(), wanted, rtol=2e-5, atol=2e-5)
    results = zip(
        torch.autograd.grad(logp.sum(), mine.leaves), torch.autograd.grad(wanted.sum(), truth.leaves), strict=True
    )
    for a, w in results:
        assert relative_error(a.cpu(), w) <= (2e-2 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize(("loss_type", "kl"), [("dapo", "exact_reverse"), ("gmpo", "k3")])
def test_passes_of_a_fused_loss(loss_type, kl, train_head):
    """Whole rows in two tiles, beside a reference, and a sweep over the sequences."""
    config = GRPOLossConfig(loss_type=loss_type, kl=kl, beta=0.1, entropy_coef=0.01)
    head = make_head(2, 30, 24, 2000, torch.bfloat16)
    ref = make_head(3, 30, 24, 2000, torch.bfloat16) if kl == "exact_reverse" else None
    with torch.no_grad():
        logp = linear_logprob(head.hidden, head.weight, head.target).logp
    batch = make_batch(4, [10, 20], logp=logp, off_policy=0.1)
    workspace = 600 << 10 if ref else 400 << 10  # of 16 to 29 rows
    check_fused(
        *cuda_and_cpu(head, batch, config, train_head=train_head, ref=ref, workspace=workspace), torch.bfloat16
    )  # fmt: skip


def test_mixed_operands():
    head = make_head(5, 20, 16, 3000)
    mine = on_device(head, torch.float32, train_head=True)
    half = mine.weight.detach().bfloat16().requires_grad_()
    logp = linear_logprob(mine.hidden, half, mine.target).logp
    expected = torch.log_softmax(mine.hidden.double() @ half.double().T, -1).gather(-1, mine.target[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(logp.sum(), half)[0].isfinite().all()


@pytest.mark.parametrize("importance", ["token_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["dapo", "gmpo"])
def test_the_token_loss(loss_type, importance):
    config, correction = GRPOLossConfig(loss_type=loss_type), OffPolicyCorrection(importance, cap=1.5, threshold=0.1)
    batch = make_batch(6, [30, 40, 700], off_policy=0.3, engine=0.5)
    arguments = {name: to_device(value) for name, value in batch.arguments(config).items()}
    out = grpo_loss(
        to_device(batch.logp), to_device(batch.advantages), **arguments, correction=correction, config=config
    )  # fmt: skip
    wanted = batch.oracle(config, correction=correction)
    torch.testing.assert_close(out.loss.cpu().double(), wanted, rtol=1e-5, atol=1e-6)


def test_offload():
    with OffloadEngine(min_bytes=0, keep_last=0) as engine:
        assert same(gradients(engine.checkpoint), gradients(torch_checkpoint))
        assert engine.stats()["bytes_in"] > 0
