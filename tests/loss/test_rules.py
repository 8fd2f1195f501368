"""Rules that other losses break, a test each."""

from __future__ import annotations

import math

import pytest
import torch

from longgrpo import GRPOLossConfig, grpo_loss, linear_grpo_loss, linear_logprob
from longgrpo.loss import reference
from longgrpo.loss.tokens import LossTokens
from longgrpo.loss.types import KL_ESTIMATORS, LOSS_TYPES
from testing.cases import make_batch, make_head, relative_error

SAMPLED_KL = [kl for kl in KL_ESTIMATORS if not kl.startswith("exact")]


def a_config(loss_type: str, **options) -> GRPOLossConfig:
    return GRPOLossConfig(loss_type=loss_type, max_completion_length=64, **{"beta": 0.1, **options})


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("train_head", [False, True])
def test_masked_positions_change_nothing(loss_type, train_head):
    """make_batch fills masked positions with inf and NaN; here the hidden states hold them as well."""
    config = a_config(loss_type, entropy_coef=0.01)
    results = []
    for poison in (False, True):
        head = make_head(1, 40, 16, 100)
        with torch.no_grad():
            logp = linear_logprob(head.hidden, head.weight, head.target).logp
        batch = make_batch(1, [15, 25], logp=logp, importance=True, token_advantages=True)
        arguments = batch.arguments(config)
        advantages = batch.advantages
        if poison:
            head.hidden[~batch.mask] = float("nan")
        else:
            arguments = {
                k: v if v is None or k == "cu_seqlens" else v.nan_to_num(0, 0, 0) for k, v in arguments.items()
            }
            advantages = advantages.nan_to_num(0, 0, 0)
        h = head.cast(torch.float32, train_head=train_head)
        loss = linear_grpo_loss(h.hidden, h.weight, h.target, advantages, **arguments, config=config).loss
        results.append((loss, *torch.autograd.grad(loss, h.leaves)))
        assert bool((results[-1][1][~batch.mask] == 0).all())
    for a, b in zip(*results, strict=True):
        assert bool(b.isfinite().all())
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("train_head", [False, True])
def test_incoming_gradient_is_honoured(loss_type, train_head):
    config = a_config(loss_type)
    batch = make_batch(2, [15, 25])
    h = make_head(2, 40, 16, 100).cast(torch.float32, train_head=train_head)
    loss = linear_grpo_loss(
        h.hidden, h.weight, h.target, batch.advantages, **batch.arguments(config), config=config
    ).loss
    once = torch.autograd.grad(loss, h.leaves, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, h.leaves, retain_graph=True)
    again = torch.autograd.grad(loss, h.leaves)
    for a, b, c in zip(once, twice, again, strict=True):
        assert torch.equal(2 * a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("composed", [False, True])
def test_fp16_under_a_gradient_scaler(composed):
    """65536 / 2e5 tokens: a loss that forms dL/dhidden in fp16 before the scale underflows (one peer: 2.5e-2)."""
    head, config = make_head(3, 64, 64, 500, torch.float16), GRPOLossConfig()
    batch = make_batch(3, [32, 32], off_policy=None, zero_advantages=0)
    scale, normalizer = 65536.0, 2e5
    h, truth = head.cast(torch.float16, train_head=True), head.cast(torch.float64, train_head=True)
    arguments = {"cu_seqlens": batch.cu_seqlens, "normalizer": normalizer, "config": config}
    if composed:
        loss = grpo_loss(linear_logprob(h.hidden, h.weight, h.target).logp, batch.advantages, **arguments).loss
    else:
        loss = linear_grpo_loss(h.hidden, h.weight, h.target, batch.advantages, **arguments).loss
    per_token = -batch.advantages.double().repeat_interleave(32) * truth.logprob()[0]
    wanted = torch.autograd.grad(scale * per_token.sum() / normalizer, truth.leaves)
    for a, w in zip(torch.autograd.grad(scale * loss, h.leaves), wanted, strict=True):
        assert relative_error(a, w) <= 6e-4


@pytest.mark.parametrize("kl", SAMPLED_KL)
@pytest.mark.parametrize("distance", [25.0, 80.0, 500.0])
@pytest.mark.parametrize("side", [1, -1])
def test_far_reference_stays_finite_and_keeps_its_sign(kl, distance, side):
    near, far = torch.tensor([-1.0]), torch.tensor([-1.0 - distance])
    logp, ref = (far, near) if side > 0 else (near, far)
    logp.requires_grad_()
    loss = grpo_loss(logp, torch.zeros(1), ref_logp=ref, config=GRPOLossConfig(kl=kl, beta=1.0)).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    assert math.isfinite(float(loss.detach()))
    assert math.isfinite(float(gradient))
    if kl in ("abs", "k2", "k3", "k3_plus"):  # descent moves logp towards the reference
        assert float(gradient) * side < 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_huge_ratios_stay_finite(loss_type):
    logp = torch.tensor([-1.0, -300.0, -0.1]).requires_grad_()
    old = torch.tensor([-300.0, -1.0, -0.1])
    for advantage in (1.0, -1.0, 0.0):
        loss = grpo_loss(logp, torch.tensor([advantage]), cu_seqlens=torch.tensor([0, 3]), old_logp=old,
                         config=a_config(loss_type, beta=0.0)).loss  # fmt: skip
        assert bool(torch.autograd.grad(loss, logp)[0].isfinite().all())


def test_on_policy_ratio_is_exactly_one():
    """old_logp from a scoring pass: same bits, so no token is clipped even at epsilon 0."""
    head, config = make_head(4, 100, 32, 1000, temperature=0.7), GRPOLossConfig(epsilon=0.0)
    with torch.no_grad():
        old = linear_logprob(head.hidden, head.weight, head.target, **head.options).logp
    h = head.cast(torch.float32, train_head=True)
    metrics = linear_grpo_loss(h.hidden, h.weight, h.target, torch.ones(100), old_logp=old, config=config,
                               **h.options).metrics  # fmt: skip
    assert float(metrics["ratio_min"]) == float(metrics["ratio_max"]) == 1.0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("where", ["logp", "advantage"])
def test_nan_of_a_token_in_the_loss_is_not_swallowed(loss_type, where):
    """A gradient of 0 for a NaN would train on as if nothing had happened; a type without a ratio has its own."""
    logp, advantages = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1.0, -1.0, 1.0])
    (logp if where == "logp" else advantages)[1] = float("nan")
    logp.requires_grad_()
    given = {"cu_seqlens": torch.tensor([0, 3]), "old_logp": torch.tensor([-1.0, -2.0, -3.0])}
    config = a_config(loss_type, beta=0.0)
    loss = grpo_loss(logp, advantages, **given, config=config).loss
    assert math.isnan(float(loss.detach()))
    (gradient,) = torch.autograd.grad(loss, logp)
    tokens = LossTokens(advantages, mask=torch.ones(3, dtype=torch.bool), **given)
    (expected,) = torch.autograd.grad(reference.grpo_loss(logp, tokens, config=config), logp)
    assert gradient[1] != 0  # a NaN is not 0 either
    assert torch.equal(gradient.isnan(), expected.isnan())


@pytest.mark.parametrize("tokens", [70_000, 1_000_000])
def test_no_length_limit(tokens):
    """More than 65,536 tokens in one sequence (one peer dies there), a million in a call."""
    hidden = torch.randn(tokens, 4).requires_grad_()
    weight, target = torch.randn(8, 4), torch.randint(0, 8, (tokens,))
    cu_seqlens = torch.tensor([0, tokens])
    loss = linear_grpo_loss(hidden, weight, target, torch.ones(1), cu_seqlens=cu_seqlens,
                            config=GRPOLossConfig(loss_type="grpo")).loss  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, hidden)
    oracle = hidden.detach()[-3:].double().requires_grad_()
    rows = torch.log_softmax(oracle @ weight.double().T, -1).gather(-1, target[-3:, None])
    (wanted,) = torch.autograd.grad(-rows.sum() / tokens, oracle)
    assert relative_error(gradient[-3:], wanted) < 1e-5


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("shape", [(0,), (3,)], ids=["no tokens", "all masked"])
def test_nothing_to_train_on(train_head, shape):
    (tokens,) = shape
    h = make_head(5, tokens, 16, 100).cast(torch.float32, train_head=train_head)
    for config in (GRPOLossConfig(), GRPOLossConfig(loss_type="grpo", importance_level="sequence")):
        result = linear_grpo_loss(h.hidden, h.weight, h.target, torch.ones(1), mask=torch.zeros(tokens),
                                  cu_seqlens=torch.tensor([0, tokens]), config=config)  # fmt: skip
        assert float(result.loss.detach()) == 0
        assert float(result.metrics["tokens"]) == 0
        for gradient in torch.autograd.grad(result.loss, h.leaves):
            assert bool((gradient == 0).all())


def test_deterministic():
    head, batch = make_head(6, 300, 64, 2000), make_batch(6, [100, 200])
    config = a_config("dapo")
    runs = []
    for _ in range(3):
        h = head.cast(torch.float32, train_head=True)
        loss = linear_grpo_loss(h.hidden, h.weight, h.target, batch.advantages, **batch.arguments(config),
                                config=config).loss  # fmt: skip
        runs.append((loss, *torch.autograd.grad(loss, h.leaves)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
