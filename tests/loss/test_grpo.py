"""The losses against the papers in plain torch, float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import longgrpo.loss.grpo as grpo
from longgrpo import GRPOLossConfig, LinearGRPOLoss, grpo_loss, linear_grpo_loss, linear_logprob
from longgrpo.loss import reference
from longgrpo.loss.flatten import rows_known_on_host
from longgrpo.loss.types import KL_ESTIMATORS, LOSS_TYPES
from testing.cases import (
    DTYPES,
    NO_CORRECTION,
    Head,
    batches,
    configs,
    corrections,
    heads,
    make_batch,
    make_head,
    relative_error,
)

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def near_a_clip(batch, config, correction=NO_CORRECTION) -> bool:
    """fp32 and float64 may fall on two sides of a clip: such a draw says nothing."""
    if near_a_cut(batch, correction):
        return True
    if batch.old_logp is None:
        return False
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    edges = [1 - config.epsilon, 1 + high, high, config.delta or 1e9, math.exp(high), math.exp(-config.epsilon)]
    d = (batch.logp - batch.old_logp).double()
    means = [d[a:b][batch.mask[a:b]].mean() for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)]
    ratios = torch.cat([d[batch.mask], torch.stack(means).nan_to_num()]).exp()
    return any(bool(((ratios - edge).abs() < 1e-4).any()) for edge in edges)


def near_a_cut(batch, correction) -> bool:
    """The same of the correction's cap and threshold."""
    old = batch.logp if batch.old_logp is None else batch.old_logp
    for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        keep = batch.mask[a:b]
        moved = float((old - batch.logp)[a:b][keep].double().mean().nan_to_num())
        if correction.threshold is not None and abs(moved - correction.threshold) < 1e-4:
            return True
        if correction.importance != "none" and bool(keep.any()):
            d = (old - batch.tokens.sampling_logp)[a:b][keep].double()
            ratios = torch.cat([d, d.mean()[None]]).exp()
            for edge in (correction.cap, 1 / correction.cap):
                if bool(((ratios - edge).abs() < 1e-4).any()):
                    return True
    return False


@settings(max_examples=600, deadline=None)
@given(batch=batches(), config=configs(), correction=corrections(), normalizer=st.sampled_from([None, 37.0]))
def test_any_loss(batch, config, correction, normalizer):
    assume(not near_a_clip(batch, config, correction))
    logp, entropy = batch.logp.clone().requires_grad_(), batch.entropy.clone().requires_grad_()
    result = grpo_loss(
        logp, batch.advantages, **batch.arguments(config), entropy=entropy, normalizer=normalizer,
        correction=correction, config=config,
    )  # fmt: skip
    logp64, entropy64 = (x.detach().double().requires_grad_() for x in (logp, entropy))
    expected = batch.oracle(config, normalizer, correction, logp=logp64, entropy=entropy64)
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=2e-5, atol=2e-5)
    actual = torch.autograd.grad(result.loss, (logp, entropy), allow_unused=True, materialize_grads=True)
    if expected.requires_grad:
        wanted = torch.autograd.grad(expected, (logp64, entropy64), allow_unused=True, materialize_grads=True)
    else:
        wanted = (torch.zeros_like(logp64), torch.zeros_like(entropy64))
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.double(), w, rtol=1e-4, atol=1e-6)
    assert bool((actual[0][~batch.mask] == 0).all())


def fused_and_oracle(
    head: Head, batch, config, *, train_head: bool, ref: Head | None = None, correction=NO_CORRECTION, **options
):
    """(loss, gradients) of the fused op; (loss, gradients, sums of the magnitudes that make each of them) of float64
    autograd. Gradients are scaled so that none is subnormal in fp16."""
    scale = 4096.0
    arguments = batch.arguments(config)
    mine, truth = head.cast(head.hidden.dtype, train_head=train_head), head.cast(torch.float64, train_head=train_head)
    extra = {} if ref is None else {"ref_hidden": ref.hidden, "ref_weight": ref.weight if train_head else None}
    result = linear_grpo_loss(mine.hidden, mine.weight, mine.target, batch.advantages, **arguments, **extra,
                              config=config, correction=correction, **mine.options, **options)  # fmt: skip
    shift = torch.zeros(len(head.hidden), len(head.weight), dtype=torch.float64, requires_grad=True)  # [N, V]
    rows = replace(truth, bias=shift if truth.bias is None else shift + truth.bias).rows()
    logp, entropy = reference.logprob_and_entropy(rows, head.target)
    exact = None
    if ref is not None:
        weight = ref.weight if train_head else head.weight
        ref_rows = reference.log_softmax_rows(
            ref.hidden.double(), weight.double(),
            **{**truth.options, "bias": None if truth.bias is None else truth.bias.detach()},
        )  # fmt: skip
        exact = reference.exact_kl(rows, ref_rows, config.kl)
    batch = batch.masked(head.target >= 0)
    expected = batch.oracle(config, correction=correction, logp=logp, entropy=entropy, exact=exact)
    leaves = [*truth.leaves, shift]
    *gradients, d_logits = (
        torch.autograd.grad(scale * expected, leaves, allow_unused=True, materialize_grads=True)
        if expected.requires_grad
        else [torch.zeros_like(x) for x in leaves]
    )
    magnitudes = [d_logits.abs() @ truth.weight.detach().abs()]
    if train_head:
        magnitudes += [d_logits.abs().T @ truth.hidden.detach().abs(), d_logits.abs().sum(0)]
    ours = torch.autograd.grad(scale * result.loss, mine.leaves)
    return (result.loss, ours), (expected.detach(), gradients, magnitudes[: len(gradients)])


def check_fused(actual, wanted, dtype: torch.dtype) -> None:
    """The loss within fp32's error, each gradient within that of its dtype: a row of logits' gradient is rounded once
    before it is summed, and the sum once. Where a sum cancels, its terms' rounding is what remains. What the dtype has
    no number for is left out."""
    torch.testing.assert_close(actual[0].double(), wanted[0], rtol=1e-4, atol=1e-5)
    for whole in zip(actual[1], *wanted[1:], strict=True):
        gradient, expected, magnitude = (x[whole[1].abs() < torch.finfo(dtype).max] for x in whole)
        bound = EPS[dtype] * (expected.norm() + magnitude.norm()) + 3e-5 * expected.norm()
        assert float((gradient.double() - expected).norm()) <= float(bound)


def lengths_of(tokens: int) -> list[int]:
    return [tokens // 3, 0, tokens - tokens // 3]


@settings(max_examples=200, deadline=None)
@given(head=heads(), config=configs(), seed=st.integers(0, 2**31), train_head=st.booleans(), on_policy=st.booleans(),
       importance=st.booleans(), metrics=st.booleans(), correction=corrections())  # fmt: skip
def test_any_fused_loss(head, config, seed, train_head, on_policy, importance, metrics, correction):
    assume(head.target.numel() != len(lengths_of(0)))  # importance would be read as the sequences'
    with torch.no_grad():
        logp = linear_logprob(head.hidden, head.weight, head.target, **head.options).logp
    batch = make_batch(seed, lengths_of(len(logp)), logp=logp, importance=importance, engine=0.5,
                       off_policy=None if on_policy else 0.2)  # fmt: skip
    batch = batch.masked(head.target >= 0)
    assume(not near_a_clip(batch, config, correction))
    both = fused_and_oracle(head, batch, config, train_head=train_head, metrics=metrics, correction=correction)
    check_fused(*both, head.hidden.dtype)


@pytest.mark.parametrize("kl", ["exact_reverse", "exact_forward"])
@pytest.mark.parametrize(
    ("loss_type", "level"), [("dapo", "token"), ("dapo", "sequence"), ("gmpo", "token"), ("vespo", "token")]
)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_kl(kl, loss_type, level, train_head, dtype):
    config = GRPOLossConfig(loss_type=loss_type, importance_level=level, kl=kl, beta=0.3, entropy_coef=0.01)
    head = make_head(1, 30, 24, 200, dtype, softcap=20.0, temperature=0.9, bias=True)
    ref = make_head(2, 30, 24, 200, dtype)
    ref.hidden = (head.hidden + 0.3 * ref.hidden).to(dtype)
    with torch.no_grad():
        logp = linear_logprob(head.hidden, head.weight, head.target, **head.options).logp
    batch = make_batch(3, [10, 0, 20], logp=logp, off_policy=0.1)
    check_fused(*fused_and_oracle(head, batch, config, train_head=train_head, ref=ref), dtype)


@settings(max_examples=60, deadline=None)
@given(config=configs(), seed=st.integers(0, 2**31), train_head=st.booleans())
def test_micro_batches_give_the_whole_gradient(config, seed, train_head):
    head = make_head(seed, 60, 16, 120)
    with torch.no_grad():
        logp = linear_logprob(head.hidden, head.weight, head.target).logp
    lengths = [7, 20, 0, 13, 20]
    batch = make_batch(seed, lengths, logp=logp)
    normalizer = {"grpo": 5, "sapo": 5, "luspo": 5, "gmpo": 5, "dr_grpo": 5 * 64}.get(
        config.loss_type, int(batch.mask.sum())
    )
    leaves = head.cast(torch.float32, train_head=train_head)

    def run(first: int, last: int, normalizer: float | None):
        span = slice(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last]))
        arguments = {k: v if v is None or k == "cu_seqlens" else v[span] for k, v in batch.arguments(config).items()}
        arguments["cu_seqlens"] = batch.cu_seqlens[first : last + 1] - batch.cu_seqlens[first]
        return linear_grpo_loss(
            leaves.hidden[span],
            leaves.weight,
            leaves.target[span],
            batch.advantages[first:last],
            **arguments,
            normalizer=normalizer,
            config=config,
        ).loss

    whole = run(0, 5, None)
    parts = run(0, 1, normalizer) + run(1, 3, normalizer) + run(3, 5, normalizer)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(parts, leaves.leaves), torch.autograd.grad(whole, leaves.leaves), strict=True):
        assert relative_error(a, b) < 1e-5 or float(b.norm()) < 1e-6


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_fused_equals_composed(loss_type):
    config = GRPOLossConfig(loss_type=loss_type, beta=0.04, entropy_coef=0.01, max_completion_length=50)
    head = make_head(4, 50, 32, 300)
    with torch.no_grad():
        logp = linear_logprob(head.hidden, head.weight, head.target).logp
    batch = make_batch(5, [20, 30], logp=logp, importance=True)
    h = head.cast(torch.float32, train_head=False)
    fused = linear_grpo_loss(h.hidden, h.weight, h.target, batch.advantages, **batch.arguments(config), config=config)
    out = linear_logprob(h.hidden, h.weight, h.target, entropy=True)
    composed = grpo_loss(out.logp, batch.advantages, **batch.arguments(config), entropy=out.entropy, config=config)
    torch.testing.assert_close(fused.loss, composed.loss, rtol=1e-6, atol=1e-6)
    for name, value in composed.metrics.items():
        torch.testing.assert_close(fused.metrics[name], value, rtol=1e-5, atol=1e-6)
    a, b = (torch.autograd.grad(x.loss, h.hidden)[0] for x in (fused, composed))
    assert relative_error(a, b) < 2e-5


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("metrics", [True, False])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gmpo", "vespo"])
def test_rows_that_the_host_leaves_out_change_nothing(loss_type, metrics, train_head, monkeypatch):
    """A GPU's pass is planned on the host: fewer rows in another order give the same loss, metrics and gradients."""
    config = GRPOLossConfig(loss_type=loss_type)
    head, batch = make_head(8, 60, 32, 300), make_batch(8, [20, 15, 10, 15], importance=True)
    advantages = batch.advantages.clone()
    advantages[1] = advantages[3] = 0
    results, rows = [], []
    for planned in (False, True):
        monkeypatch.setattr(grpo, "_plans_on_host", lambda device, planned=planned: planned)
        leaves = head.cast(torch.float32, train_head=train_head)
        out = linear_grpo_loss(leaves.hidden, leaves.weight, leaves.target, advantages, **batch.arguments(config),
                               config=config, metrics=metrics)  # fmt: skip
        results.append((out, torch.autograd.grad(out.loss, leaves.leaves)))
        rows.append(rows_known_on_host(leaves.target.shape, advantages, batch.mask, batch.cu_seqlens, config,
                                       config.needs_sequences, metrics))  # fmt: skip
    (a, gradients), (b, planned_gradients) = results
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=1e-7)
    for name in a.metrics:
        torch.testing.assert_close(a.metrics[name], b.metrics[name], rtol=1e-5, atol=1e-6)
    for x, y in zip(gradients, planned_gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    visited = int(batch.mask.sum())
    assert len(rows[0].order) == visited if metrics or config.needs_sequences else rows[0].active
    assert rows[0].active == (
        visited if config.needs_sequences else int(batch.mask[:20].sum() + batch.mask[35:45].sum())
    )


def test_module_is_the_function():
    head, batch = make_head(6, 20, 16, 90), make_batch(6, [20])
    config = GRPOLossConfig(loss_type="grpo")
    arguments = batch.arguments(config)
    module = LinearGRPOLoss(config, temperature=0.8)
    a = module(head.hidden, head.weight, head.target, batch.advantages, **arguments)
    b = linear_grpo_loss(head.hidden, head.weight, head.target, batch.advantages, **arguments, temperature=0.8,
                         config=config)  # fmt: skip
    assert torch.equal(a.loss, b.loss)


def test_padded_equals_flat():
    """[B, T] with a mask is the same loss as its flat tokens with cu_seqlens."""
    head, config = make_head(7, 24, 16, 90), GRPOLossConfig(loss_type="grpo", beta=0.1)
    batch = make_batch(7, [8, 8, 8])
    flat = batch.arguments(config)
    padded = {k: v.view(3, 8) for k, v in flat.items() if v is not None and k != "cu_seqlens"}
    a = linear_grpo_loss(head.hidden, head.weight, head.target, batch.advantages, **flat, config=config)
    b = linear_grpo_loss(head.hidden.view(3, 8, 16), head.weight, head.target.view(3, 8), batch.advantages, **padded,
                         config=config)  # fmt: skip
    assert torch.equal(a.loss, b.loss)


def test_metrics_count_what_they_say():
    old = torch.zeros(6)
    logp = torch.tensor([0.0, 0.5, -0.5, 0.5, -0.5, 9.0]).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    mask = torch.tensor([1, 1, 1, 1, 1, 0]).bool()
    result = grpo_loss(logp, advantages, mask=mask, old_logp=old, ref_logp=old - 0.1,
                       config=GRPOLossConfig(beta=0.1, kl="k2"))  # fmt: skip
    ratios = logp.detach()[:5].exp()
    expected = {
        "tokens": 5, "clip_high": 1 / 5, "clip_low": 1 / 5, "ratio_min": ratios.min(), "ratio_max": ratios.max(),
        "ratio_mean": ratios.mean(), "kl": ((logp.detach()[:5] + 0.1) ** 2 / 2).mean(), "active": 1.0,
    }  # fmt: skip
    for name, value in expected.items():
        assert float(result.metrics[name]) == pytest.approx(float(value), rel=1e-6), name
        assert not result.metrics[name].requires_grad


def test_detach_is_what_gives_a_gradient():
    """The article's experiment: exp(q - q.detach()) has value 1 and a gradient, exp(q - q) has value 1 and none."""
    logp = torch.tensor([-1.0, -2.0]).requires_grad_()
    for detach in (True, False):
        loss = grpo_loss(logp, torch.tensor([1.0, -1.0]), config=GRPOLossConfig(detach=detach)).loss
        (gradient,) = torch.autograd.grad(loss, logp)
        assert float(loss.detach()) == 0.0
        assert bool((gradient != 0).all()) == detach


EXACT_ON_POLICY = {"k2": "reverse", "k3_plus": "reverse", "forward_unbiased": "forward"}


@pytest.mark.parametrize("kl", [k for k in KL_ESTIMATORS if not k.startswith("exact")])
def test_expected_gradient_of_each_estimator(kl):
    """Summed over the vocabulary under the policy, k2, k3_plus and forward_unbiased give the gradient of the divergence
    that they estimate; the others do not, and k1's is zero."""
    g = torch.Generator().manual_seed(0)
    policy = torch.randn(12, generator=g, dtype=torch.float64).requires_grad_()
    ref = torch.log_softmax(torch.randn(12, generator=g, dtype=torch.float64), -1)
    rows = torch.log_softmax(policy, -1)
    truth = {
        "reverse": torch.autograd.grad((rows.exp() * (rows - ref)).sum(), policy, retain_graph=True)[0],
        "forward": torch.autograd.grad((ref.exp() * (ref - rows)).sum(), policy, retain_graph=True)[0],
    }
    logp = rows.detach().float().requires_grad_()
    loss = grpo_loss(logp, torch.zeros(12), mask=torch.ones(12), ref_logp=ref.float(), normalizer=1.0,
                     config=GRPOLossConfig(kl=kl, beta=1.0)).loss  # fmt: skip
    (slopes,) = torch.autograd.grad(loss, logp)
    (expected,) = torch.autograd.grad((rows.exp().detach() * slopes.double() * rows).sum(), policy)
    target = truth[EXACT_ON_POLICY.get(kl, "forward" if "forward" in kl else "reverse")]
    distance = relative_error(expected, target)
    assert (distance < 1e-5) == (kl in EXACT_ON_POLICY)
    if kl == "k1":
        assert float(expected.norm()) < 1e-6
