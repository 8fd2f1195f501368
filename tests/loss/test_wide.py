"""Far from the tame middle: each token's gradient against float64, wherever a run can get to.

Ratios and references up to e^30 away, huge and tiny advantages and weights, confident tokens, empty sequences and
sequences of one token. The bound holds for each token: 1e-5 of its gradient, or of its weight if that is larger. The
tokens of a sequence that share a ratio share a sum as well, in which advantages of both signs cancel: there the largest
term counts beside the weight.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_grpo import near_a_clip

from longgrpo import GRPOLossConfig, LossTokens, grpo_loss, linear_grpo_loss, linear_logprob
from longgrpo.loss import reference
from longgrpo.loss.flatten import token_weights
from longgrpo.loss.types import EXACT_KL, KL_ESTIMATORS, LOSS_TYPES, loss_type
from testing.cases import Batch, corrections, make_head

FAR = 30.0


def spread_out(g: torch.Generator, n: int, far: float) -> torch.Tensor:
    """Half of the numbers anywhere within +-far, half near 0."""
    wide = (2 * torch.rand(n, generator=g) - 1) * far
    return torch.where(torch.rand(n, generator=g) < 0.5, wide, wide / far)


def wide_batch(seed: int, lengths: list[int], *, on_policy: bool, scale: float, token_advantages: bool) -> Batch:
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    depth = torch.tensor([1e-6, 0.1, 3.0, FAR])[torch.randint(0, 4, (n,), generator=g)]
    logp = -torch.rand(n, generator=g) * depth
    old = None if on_policy else logp + spread_out(g, n, FAR)
    advantages = torch.randn(n if token_advantages else len(lengths), generator=g) * scale
    advantages[torch.rand(len(advantages), generator=g) < 0.2] = 0
    importance = (spread_out(g, n, 5.0)).exp()
    importance[torch.rand(n, generator=g) < 0.2] = 0
    return Batch(
        logp,
        torch.rand(n, generator=g) * 10,
        LossTokens(
            advantages,
            torch.rand(n, generator=g) < 0.8,
            torch.tensor([0, *lengths]).cumsum(0).int(),
            old,
            logp + spread_out(g, n, FAR),
            (logp if old is None else old) + spread_out(g, n, FAR),
            importance,
        ),
    )


@st.composite
def wide_batches(draw) -> Batch:
    lengths = st.lists(st.sampled_from([0, 1, 1, 2, 5, 12]), min_size=1, max_size=5)
    return wide_batch(
        draw(st.integers(0, 2**31)),
        draw(lengths.filter(lambda x: sum(x) != len(x))),  # else an advantage a token would be read as a sequence's
        on_policy=draw(st.booleans()),
        scale=draw(st.sampled_from([1e-3, 1.0, 1e3])),
        token_advantages=draw(st.booleans()),
    )


@st.composite
def wide_configs(draw, kl: str, loss: str) -> GRPOLossConfig:
    row, correctable = loss_type(loss), kl == "k3"
    kl_correction = correctable and draw(st.booleans())
    sequence = draw(st.booleans()) and (kl_correction or not row.whole_sequence)
    return GRPOLossConfig(
        loss_type=loss,
        importance_level="sequence" if sequence else "token",
        kl=kl,
        kl_correction=kl_correction,
        beta=draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0])),
        epsilon=draw(st.sampled_from([0.0, 0.2])),
        epsilon_high=5.0 if loss == "cispo" else draw(st.sampled_from([None, 0.28, 3.0])),
        delta=draw(st.sampled_from([None, 1.1, 1e4])) if row.ppo_clip else None,
        entropy_coef=draw(st.sampled_from([0.0, 0.01])),
        max_completion_length=64,
    )


def every_config(kinds: tuple[str, ...]):
    return st.tuples(st.sampled_from(LOSS_TYPES), st.sampled_from(kinds)).flatmap(
        lambda pair: wide_configs(kl=pair[1], loss=pair[0])
    )


def shares_a_sum(config: GRPOLossConfig) -> bool:
    return config.importance_level == "sequence" or config.loss_type == "gmpo"


def largest_term(batch: Batch) -> float:
    """The largest |advantage| of a token of its own times its weight in the policy term, at least 1."""
    if len(batch.advantages) != len(batch.logp):
        return 1.0  # one advantage a sequence: its terms have one sign
    return max(1.0, float(batch.advantages.abs().max() * batch.tokens.importance.max()))


SAMPLED_KL = tuple(kl for kl in KL_ESTIMATORS if kl not in EXACT_KL)


@settings(max_examples=800, deadline=None)
@given(batch=wide_batches(), config=every_config(SAMPLED_KL), correction=corrections(),
       normalizer=st.sampled_from([None, 2e5]))  # fmt: skip
def test_each_tokens_gradient(batch, config, correction, normalizer):
    assume(not near_a_clip(batch, config, correction))
    logp, entropy = batch.logp.clone().requires_grad_(), batch.entropy.clone().requires_grad_()
    loss = grpo_loss(logp, **{**vars(batch.tokens), "ref_logp": batch.tokens.ref_logp},
                     entropy=entropy, normalizer=normalizer, correction=correction, config=config).loss  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logp)
    logp64, entropy64 = (x.detach().double().requires_grad_() for x in (logp, entropy))
    expected = batch.oracle(config, normalizer, correction, logp=logp64, entropy=entropy64)
    assume(expected.requires_grad)
    (wanted,) = torch.autograd.grad(expected, logp64, allow_unused=True, materialize_grads=True)
    weight = token_weights(batch.mask, batch.cu_seqlens, config, normalizer).double()
    least = weight * largest_term(batch) if shares_a_sum(config) else weight
    error, bound = (gradient.double() - wanted).abs(), 1e-5 * torch.maximum(wanted.abs(), least)
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"token {worst}: {float(gradient[worst])} where float64 says {float(wanted[worst])}, its weight "
        f"{float(weight[worst])}"
    )


@pytest.mark.parametrize("loss", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("distance", [0.1, 5.0, 11.4, 15.0, 19.5, 25.0, -25.0])
def test_a_corrected_kl_of_one_token_keeps_its_digits(loss, level, distance):
    """d(ratio k3)/dlogp is ratio (logp - ref): what cancels is up to 1e8 times larger."""
    config = GRPOLossConfig(loss_type=loss, importance_level=level, kl_correction=True, beta=1.0,
                            max_completion_length=1, epsilon_high=5.0 if loss == "cispo" else None)  # fmt: skip
    logp = torch.tensor([-1.5]).requires_grad_()
    out = grpo_loss(logp, torch.zeros(1), cu_seqlens=torch.tensor([0, 1]), ref_logp=logp.detach() + distance,
                    old_logp=logp.detach() - 0.5, config=config)  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, logp)
    bounded = float(logp.detach() + distance) - float(logp.detach())
    assert float(gradient) == pytest.approx(-bounded * 2.718281828459045**0.5, rel=1e-5)


def short(x: torch.Tensor) -> torch.Tensor:
    """x in multiples of 1/32: a sum of eight products of such numbers, below 2^14, is exact in fp32."""
    return (x * 32).round() / 32


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31), config=every_config(EXACT_KL), correction=corrections(), train_head=st.booleans(),
       on_policy=st.booleans(), distance=st.sampled_from([0.3, 3.0, 10.0]),
       spread=st.sampled_from([1.0, 6.0]))  # fmt: skip
def test_each_tokens_gradient_with_an_exact_kl(seed, config, correction, train_head, on_policy, distance, spread):
    """dL/dhidden of each row, measured by dL/dlogits carried through |W|, or by its weights.

    Hidden states and weights have so few bits that every logit is exact. log p - log r then has four roundings of
    2^-24 of the largest logit: both logsumexps, and both differences from them."""
    config = replace(config, beta=config.beta or 1.0)
    head, other = (make_head(s, 20, 8, 60, spread=spread) for s in (seed, seed + 1))
    head = replace(head, hidden=short(head.hidden), weight=short(head.weight))
    ref_hidden, ref_weight = short(head.hidden + distance * other.hidden), head.weight
    logp = linear_logprob(head.hidden, head.weight, head.target).logp
    batch = wide_batch(seed, [7, 0, 1, 12], on_policy=on_policy, scale=1.0, token_advantages=False)
    shift = logp - batch.logp  # the batch's distances, at the head's own logp
    moved = {
        name: x + shift for name in ("old_logp", "sampling_logp") if (x := getattr(batch.tokens, name)) is not None
    }
    batch = replace(batch, logp=logp, tokens=replace(batch.tokens, **moved))
    assume(not near_a_clip(batch, config, correction))
    h = head.cast(torch.float32, train_head=train_head)
    loss = linear_grpo_loss(h.hidden, h.weight, h.target, **vars(batch.tokens), ref_hidden=ref_hidden,
                            ref_weight=ref_weight, correction=correction, config=config).loss  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, h.hidden)

    logits = (head.hidden.double() @ head.weight.double().T).requires_grad_()
    rows = torch.log_softmax(logits, -1)
    logp64, entropy64 = reference.logprob_and_entropy(rows, head.target)
    exact = reference.exact_kl(rows, reference.log_softmax_rows(ref_hidden.double(), ref_weight.double()), config.kl)
    expected = batch.oracle(config, None, correction, logp=logp64, entropy=entropy64, exact=exact)
    (d_logits,) = torch.autograd.grad(expected, logits)
    wanted = d_logits @ head.weight.double()
    weight = token_weights(batch.mask, batch.cu_seqlens, config, None).double()
    carried = (d_logits.abs() @ head.weight.double().abs()).norm(dim=-1)
    magnitude = torch.maximum(carried, weight * (1 + config.beta) * head.weight.double().norm(dim=1).max())
    largest = torch.maximum(head.hidden.double().norm(dim=-1), ref_hidden.double().norm(dim=-1)) * (
        head.weight.double().norm(dim=1).max()
    )
    bound = (1e-5 + 4 * 2**-24 * largest) * magnitude
    error = (gradient.double() - wanted).norm(dim=-1)
    assert bool((error <= bound).all()), (error / bound).nan_to_num().max()


@pytest.mark.parametrize("ratio", [0.1, 5.0, 17.0, 19.0, 30.0])
def test_sapos_open_gate_keeps_its_slope(ratio):
    """gate (1 - gate) of a sigmoid that is 1 in fp32."""
    logp = torch.tensor([-1.0]).requires_grad_()
    old, config = logp.detach() - torch.tensor([ratio]).log(), GRPOLossConfig(loss_type="sapo")
    arguments = {"cu_seqlens": torch.tensor([0, 1]), "old_logp": old, "config": config}
    (gradient,) = torch.autograd.grad(grpo_loss(logp, torch.ones(1), **arguments).loss, logp)
    x = torch.tensor(ratio - 1, dtype=torch.float64)
    wanted = -4 * ratio * torch.sigmoid(x) * torch.sigmoid(-x)
    assert float(gradient) == pytest.approx(float(wanted), rel=1e-4)
