"""The ops as torch sees them: schemas, fake kernels, autograd registration, torch.compile, double backward."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longgrpo import GRPOLossConfig, OffPolicyCorrection, grpo_loss, linear_grpo_loss, linear_logprob
from longgrpo._ops import loss as loss_ops
from longgrpo.loss.config import packed
from testing.cases import make_batch, make_head

ops = torch.ops.longgrpo
HEAD = (None, None, 1.0, 0.0, 1.0)  # bias, token_temperature, temperature, softcap, logit_scale
MIB = 1 << 20


def head_tensors(train_head: bool) -> tuple:
    h = make_head(1, 12, 16, 40).cast(torch.float32, train_head=train_head)
    return h.hidden, h.weight, h.target


def token_tensors() -> tuple:
    n = 12
    return (torch.full((n,), 1 / n), torch.randn(n), torch.randn(n) - 2, torch.randn(n) - 2, torch.rand(n),
            torch.randn(n) - 2, torch.tensor([0, 5, n], dtype=torch.int32))  # fmt: skip


def op_samples():
    config = packed(GRPOLossConfig(beta=0.1, loss_type="grpo"), OffPolicyCorrection("sequence_mask"))
    for train_head in (False, True):
        head = head_tensors(train_head)
        yield "linear_logprob", (*head, *HEAD, True, not train_head, MIB)
        needs = (True, train_head, False)
        yield "linear_grpo_loss", (*head, *HEAD, *token_tensors(), None, None, *config, *needs, True, MIB, 12)
    head = tuple(t.detach() for t in head_tensors(False))
    yield "linear_logprob_backward", (*head, *HEAD, torch.randn(12), torch.randn(12), True, True, False, MIB)
    logp = (torch.randn(12) - 2).requires_grad_()
    yield "token_loss", (logp, *token_tensors(), torch.rand(12).requires_grad_(), *config)
    yield "scale_rows", (torch.randn(12, 16), torch.randn(12))
    yield "scale_rows_", (torch.randn(12, 16), torch.randn(12))


@pytest.mark.parametrize(("name", "arguments"), list(op_samples()), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(name, arguments, monkeypatch):
    # opcheck compares an op's outputs after the backward, which otherwise reuses the memory of its saved direction.
    monkeypatch.setattr(loss_ops, "_keeps_graph", lambda: True)
    torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize("train_head", [False, True])
def test_double_backward_is_refused(train_head):
    h = make_head(2, 12, 16, 40).cast(torch.float32, train_head=train_head)
    batch = make_batch(2, [5, 7])
    logp = linear_logprob(h.hidden, h.weight, h.target).logp
    fused = linear_grpo_loss(h.hidden, h.weight, h.target, batch.advantages, cu_seqlens=batch.cu_seqlens).loss
    for output in (logp.square().sum(), fused):
        (gradient,) = torch.autograd.grad(output, h.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            gradient.square().sum().backward()


def loss_of(hidden, weight, target, advantages, old_logp, cu_seqlens, fused: bool):
    config = GRPOLossConfig(loss_type="grpo", epsilon_high=0.28)
    kw = {"old_logp": old_logp, "cu_seqlens": cu_seqlens, "config": config}
    if fused:
        return linear_grpo_loss(hidden, weight, target, advantages, **kw).loss
    out = linear_logprob(hidden, weight, target, entropy=True)
    return grpo_loss(out.logp, advantages, entropy=out.entropy, **kw).loss + 0.01 * out.entropy.mean()


def compiled_equals_eager() -> None:
    """Runs in a process of its own: vLLM's CPU engine switches torch.compile off for the whole process."""
    batch = make_batch(3, [5, 7], masked=0.0)
    for fused in (True, False):
        for train_head in (False, True):
            h = make_head(3, 12, 16, 40).cast(torch.float32, train_head=train_head)
            args = (h.hidden, h.weight, h.target, batch.advantages, batch.old_logp, batch.cu_seqlens, fused)
            eager = loss_of(*args)
            compiled = torch.compile(loss_of, fullgraph=True)(*args)
            torch.testing.assert_close(compiled, eager)
            for a, b in zip(torch.autograd.grad(compiled, h.leaves), torch.autograd.grad(eager, h.leaves),
                            strict=True):  # fmt: skip
                torch.testing.assert_close(a, b)


def test_torch_compile_takes_the_ops():
    code = "import test_ops; test_ops.compiled_equals_eager()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=500)


def test_import_needs_torch_alone():
    """transformers, vllm, peft and the rest are imported where they are used."""
    code = (
        "import sys, torch; before = set(sys.modules); import longgrpo; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "known = {m.split('.')[0] for m in before} | set(sys.stdlib_module_names) | {'longgrpo'}; "
        "assert new <= known, new - known"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_gradient_carries_no_graph():
    h = make_head(4, 12, 16, 40).cast(torch.float32, train_head=False)
    (gradient,) = torch.autograd.grad(linear_logprob(h.hidden, h.weight, h.target).logp.sum(), h.hidden)
    assert not gradient.requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_activation_checkpointing(fused, train_head, use_reentrant):
    batch = make_batch(5, [5, 7], masked=0.0)
    h = make_head(5, 12, 16, 40).cast(torch.float32, train_head=train_head)
    rest = (h.target, batch.advantages, batch.old_logp, batch.cu_seqlens, fused)
    plain = torch.autograd.grad(loss_of(h.hidden, h.weight, *rest), h.leaves)
    loss = checkpoint(loss_of, h.hidden, h.weight, *rest, use_reentrant=use_reentrant)
    loss.backward()
    for leaf, wanted in zip(h.leaves, plain, strict=True):
        assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_casts_what_it_casts_for_linear(fused):
    """The numbers of operands cast by hand, gradients in the dtypes of the leaves."""
    batch = make_batch(6, [5, 7], masked=0.0)
    h = make_head(6, 12, 16, 40).cast(torch.float32, train_head=True)
    rest = (h.target, batch.advantages, batch.old_logp, batch.cu_seqlens, fused)
    by_hand = loss_of(h.hidden.bfloat16(), h.weight.bfloat16(), *rest)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss_of(h.hidden, h.weight, *rest)
        nested = torch.nn.functional.linear(h.hidden, h.weight)
    assert nested.dtype == torch.bfloat16
    assert torch.equal(cast, by_hand)
    for a, b in zip(torch.autograd.grad(cast, h.leaves), torch.autograd.grad(by_hand, h.leaves), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert not torch.equal(cast, loss_of(h.hidden, h.weight, *rest))


def test_autocast_serves_the_exact_kl_too():
    h, reference = (make_head(seed, 12, 16, 40).cast(torch.float32, train_head=False) for seed in (7, 8))
    config = GRPOLossConfig(loss_type="dapo", beta=0.1, kl="exact_reverse")
    arguments = {"ref_weight": reference.weight, "config": config, "cu_seqlens": torch.tensor([0, 12])}
    half = [x.bfloat16() for x in (h.hidden, h.weight, reference.hidden)]
    wanted = linear_grpo_loss(*half[:2], h.target, torch.ones(1), ref_hidden=half[2],
                              **{**arguments, "ref_weight": reference.weight.bfloat16()}).loss  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_grpo_loss(h.hidden, h.weight, h.target, torch.ones(1), ref_hidden=reference.hidden, **arguments)
    assert torch.equal(cast.loss, wanted)


def test_without_an_entropy_bonus_the_head_runs_no_second_time():
    """The entropy is a metric then: its gradient is none, and the direction that the forward kept is the gradient."""
    hidden, weight = torch.randn(32, 16, requires_grad=True), torch.randn(50, 16)
    logp, entropy = linear_logprob(hidden, weight, torch.arange(32), entropy=True)
    ran = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func.name())
            return func(*args, **(kwargs or {}))

    config = GRPOLossConfig(loss_type="dapo")
    loss = grpo_loss(logp, torch.randn(32), entropy=entropy, config=config).loss
    with Watch():
        loss.backward()
    assert hidden.grad is not None
    assert "longgrpo::linear_logprob_backward" not in ran
