"""The engine's logprobs: truncated and masked importance sampling, the threshold, their metrics and what they cost."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.autograd.profiler import profile

from longgrpo import GRPOLossConfig, LossTokens, OffPolicyCorrection, grpo_loss, linear_grpo_loss, linear_logprob
from longgrpo._ops.loss import SAMPLING_METRICS
from longgrpo.loss.types import CORRECTIONS
from testing.cases import make_batch, make_head

LENGTHS = [6, 0, 1, 9]


def by_hand(batch, correction: OffPolicyCorrection) -> dict[str, torch.Tensor]:
    """The factor of each token, its ratio and |old - sampling|, in float64 and with plain loops."""
    old = (batch.logp if batch.old_logp is None else batch.old_logp).double()
    ratio, factor = torch.ones(len(old), dtype=torch.float64), torch.ones(len(old), dtype=torch.float64)
    bounds = batch.cu_seqlens.tolist()
    for s, (a, b) in enumerate(itertools.pairwise(bounds)):
        used = [t for t in range(a, b) if bool(batch.mask[t])]
        differences = [float(old[t] - batch.tokens.sampling_logp[t].double()) for t in used]
        mean = sum(differences) / max(len(used), 1)
        for t, difference in zip(used, differences, strict=True):
            of_sequence = correction.importance.startswith("sequence")
            ratio[t] = math.exp(max(-20.0, min(20.0, mean if of_sequence else difference)))
            outside = not 1 / correction.cap <= ratio[t] <= correction.cap
            if correction.importance.endswith("truncate"):
                factor[t] = min(float(ratio[t]), correction.cap)
            elif correction.importance.endswith("mask"):
                factor[t] = 0.0 if outside else ratio[t]
        moved = sum(float(old[t] - batch.logp[t].double()) for t in used) / max(len(used), 1)
        if correction.threshold is not None and moved > correction.threshold and batch.advantages[s] < 0:
            factor[used] = 0.0
    return {"factor": factor, "ratio": ratio, "difference": (old - batch.tokens.sampling_logp.double()).abs()}


@pytest.mark.parametrize("threshold", [None, 0.05])
@pytest.mark.parametrize("off_policy", [None, 0.3])
@pytest.mark.parametrize("importance", CORRECTIONS)
def test_is_an_importance_that_is_computed(importance, off_policy, threshold):
    correction = OffPolicyCorrection(importance, cap=1.5, threshold=threshold)
    config = GRPOLossConfig(loss_type="dapo")
    batch = make_batch(11, LENGTHS, off_policy=off_policy, engine=0.6, importance=True, zero_advantages=0)
    batch.advantages.copy_(torch.tensor([-1.0, 1.0, 1.0, -0.5]))
    if off_policy:
        batch.old_logp[batch.cu_seqlens[3] :] += 1.0  # the last sequence has moved away, the first has not
        batch.old_logp[: batch.cu_seqlens[1]] -= 1.0
    expected = by_hand(batch, correction)
    logp = batch.logp.clone().requires_grad_()
    arguments = batch.arguments(config)
    result = grpo_loss(logp, batch.advantages, **arguments, correction=correction, config=config)
    product = torch.where(batch.tokens.importance == 0, 0.0, batch.tokens.importance.double() * expected["factor"])
    arguments |= {"importance": product.float(), "sampling_logp": None}
    plain = grpo_loss(logp, batch.advantages, **arguments, config=config)
    torch.testing.assert_close(result.loss, plain.loss, rtol=1e-5, atol=1e-6)
    mine, wanted = (torch.autograd.grad(x.loss, logp)[0] for x in (result, plain))
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)
    if threshold and off_policy:
        assert bool((expected["factor"][batch.cu_seqlens[3] :] == 0)[batch.mask[batch.cu_seqlens[3] :]].all())
        assert importance.endswith("mask") or bool((expected["factor"][: batch.cu_seqlens[1]] > 0).all())

    used = batch.mask
    cut = torch.zeros(len(used)) if importance == "none" else (by_hand(
        batch, replace(correction, threshold=None))["factor"] != expected["ratio"])  # fmt: skip
    numbers = {
        "sampling_diff_mean": expected["difference"][used].mean(),
        "sampling_diff_max": expected["difference"][used].max(),
        "sampling_ratio_mean": expected["ratio"][used].mean(), "sampling_cut": cut[used].double().mean(),
    }  # fmt: skip
    for name, value in numbers.items():
        assert float(result.metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-7), name
    assert not set(SAMPLING_METRICS) & set(plain.metrics)


def test_it_is_detached():
    """On policy the ratio is exp(logp - sampling_logp), and no gradient goes through it."""
    logp = torch.tensor([-1.0, -2.0]).requires_grad_()
    arguments = {"sampling_logp": torch.tensor([-1.1, -1.9]), "correction": OffPolicyCorrection("token_truncate")}
    loss = grpo_loss(logp, torch.ones(2), **arguments, config=GRPOLossConfig(loss_type="dapo")).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(gradient, -torch.tensor([math.exp(0.1), math.exp(-0.1)]) / 2)


def test_a_far_engine_stays_finite():
    logp = torch.tensor([-1.0, -2.0, -3.0]).requires_grad_()
    sampling = torch.tensor([-100.0, -0.1, -200.0])
    for importance in CORRECTIONS:
        loss = grpo_loss(logp, torch.ones(1), cu_seqlens=torch.tensor([0, 3]), sampling_logp=sampling,
                         correction=OffPolicyCorrection(importance)).loss  # fmt: skip
        assert bool(torch.autograd.grad(loss, logp)[0].isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": "token_trunc"}, "did you mean 'token_truncate'"),
        ({"cap": 1.0}, "cap bounds the ratio .* > 1, got 1.0"),
        ({"cap": float("nan")}, "cap"),
        ({"threshold": -0.1}, "threshold must be"),
        ({"threshold": float("inf")}, "threshold must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        OffPolicyCorrection(**options)


def test_a_correction_needs_the_engines_logprobs():
    with pytest.raises(ValueError, match="hand in sampling_logp"):
        grpo_loss(torch.zeros(3), torch.ones(3), correction=OffPolicyCorrection("token_mask"))
    with pytest.raises(ValueError, match=r"sampling_logp .* target's shape"):
        grpo_loss(torch.zeros(3), torch.ones(3), sampling_logp=torch.zeros(2))
    with pytest.raises(ValueError, match="need cu_seqlens"):
        grpo_loss(torch.zeros(3), torch.ones(3), sampling_logp=torch.zeros(3),
                  correction=OffPolicyCorrection("sequence_mask"))  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
def test_former_names_are_answered(fused):
    head = make_head(1, 6, 4, 9)
    call = (
        (lambda **kw: linear_grpo_loss(head.hidden, head.weight, head.target, torch.ones(6), **kw))
        if fused
        else (lambda **kw: grpo_loss(torch.zeros(6), torch.ones(6), **kw))
    )
    with pytest.raises(TypeError, match="normaliser is now normalizer"):
        call(normaliser=3.0)


# ---- logp and entropy come back ----


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gmpo"])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_loss_returns_its_scores(loss_type, train_head, padded):
    head, batch = make_head(3, 16, 8, 50, ignored=0.2), make_batch(3, [8, 8], zero_advantages=0)
    h = head.cast(torch.float32, train_head=train_head)
    shape = (2, 8) if padded else (16,)
    tokens = LossTokens(batch.advantages, batch.mask.view(shape), None if padded else batch.cu_seqlens)
    out = linear_grpo_loss(h.hidden.view(*shape, 8), h.weight, h.target.view(shape), **vars(tokens),
                           config=GRPOLossConfig(loss_type=loss_type))  # fmt: skip
    used = batch.mask & (head.target >= 0)
    scores = linear_logprob(head.hidden, head.weight, head.target, entropy=True)
    for mine, wanted in ((out.logp, scores.logp), (out.entropy, scores.entropy)):
        assert not mine.requires_grad
        assert mine.shape == shape
        torch.testing.assert_close(mine.reshape(-1), torch.where(used, wanted, 0.0), rtol=1e-5, atol=1e-6)


def test_grpo_loss_returns_its_scores():
    batch = make_batch(4, [5, 7])
    out = grpo_loss(batch.logp, batch.advantages, mask=batch.mask, cu_seqlens=batch.cu_seqlens)
    assert torch.equal(out.logp, torch.where(batch.mask, batch.logp, 0.0))
    assert out.entropy is None


# ---- what a loss costs ----


def counted(call) -> int:
    """Multiply-adds of the head's GEMMs that a call makes; of the simulator's runtime if the ops run there."""
    try:
        from simulated import kernels, replaced
    except ImportError:
        replaced = False
    if replaced:
        before = kernels().multiply_adds()
        call()
        return kernels().multiply_adds() - before
    with profile(record_shapes=True) as profiled:  # a dispatch mode does not see what an op calls inside
        call()
    shapes = [event.input_shapes for event in profiled.function_events if event.name == "aten::mm"]
    return sum(a[0] * a[1] * b[1] for a, b, *_ in shapes)  # fp32 operands: bf16's GEMM is not torch's


OLD, SEQUENCE = {"old": True}, {"loss_type": "dapo", "importance_level": "sequence"}
COSTS = {  # options of the loss, what is known beside, GEMMs of a frozen and of a trained head
    "dapo": ({}, {}, 2, 3),
    "dapo off policy": ({}, OLD, 2, 3),
    "entropy bonus": ({"entropy_coef": 0.01}, OLD, 2, 3),
    "token_truncate": ({}, {"importance": "token_truncate"}, 2, 3),
    "token_mask off policy": ({}, {"importance": "token_mask", **OLD}, 2, 3),
    "sequence_truncate off policy": ({}, {"importance": "sequence_truncate", **OLD}, 2, 3),
    "sequence_mask": ({}, {"importance": "sequence_mask"}, 2, 4),
    "sequence_mask with an entropy bonus": ({"entropy_coef": 0.01}, {"importance": "sequence_mask"}, 3, 4),
    "threshold on policy: nothing has moved": ({}, {"threshold": 1.0}, 2, 3),
    "threshold": ({}, {"threshold": 1.0, **OLD}, 2, 4),
    "gspo": (SEQUENCE, OLD, 2, 4),
    "gspo with an entropy bonus": ({**SEQUENCE, "entropy_coef": 0.01}, OLD, 3, 4),
    "vespo": ({"loss_type": "vespo"}, OLD, 2, 4),
    "gmpo": ({"loss_type": "gmpo"}, OLD, 2, 4),
    "exact KL": ({"kl": "exact_reverse", "beta": 0.1}, OLD, 3, 4),
    "exact KL and gspo": ({**SEQUENCE, "kl": "exact_forward", "beta": 0.1}, OLD, 4, 5),
}


@pytest.mark.parametrize("case", COSTS)
@pytest.mark.parametrize("train_head", [False, True])
def test_gemms_of_the_head(case, train_head):
    options, known, *gemms = COSTS[case]
    config, known = GRPOLossConfig(**{"loss_type": "dapo", "epsilon": 9.0, **options}), dict(known)
    off_policy = 0.1 if known.pop("old", False) else None
    tokens, hidden, vocabulary = 32, 16, 64  # no token is clipped: the CPU leaves out the rows whose gradient is 0
    h = make_head(5, tokens, hidden, vocabulary).cast(torch.float32, train_head=train_head)
    logp = linear_logprob(h.hidden, h.weight, h.target).logp.detach()
    batch = make_batch(5, [16, 16], masked=0, off_policy=off_policy, engine=0.1, zero_advantages=0, logp=logp)
    reference = make_head(6, tokens, hidden, vocabulary)
    extra = {"ref_hidden": reference.hidden, "ref_weight": reference.weight} if config.exact_kl else {}

    def step():
        out = linear_grpo_loss(h.hidden, h.weight, h.target, batch.advantages, **batch.arguments(config), **extra,
                               correction=OffPolicyCorrection(cap=9.0, **known), config=config)  # fmt: skip
        torch.autograd.grad(out.loss, h.leaves)

    assert counted(step) == gemms[train_head] * tokens * hidden * vocabulary
