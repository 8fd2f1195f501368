"""The same losses in plain torch, as the papers write them: the oracle of the tests.

Slow and memory-hungry on purpose: whole logits, a Python loop over sequences, autograd for every gradient. Runs in
any dtype, float64 included, and has second derivatives. It has its own lists of loss types, for an oracle must not read
the table that it is to judge.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longgrpo.loss.config import GRPOLossConfig, OffPolicyCorrection
from longgrpo.loss.tokens import LossTokens


def log_softmax_rows(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """hidden [N, H], weight [V, H] -> log-probabilities [N, V]."""
    logits = transformed(hidden @ weight.T, bias, softcap, logit_scale)
    divisor = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    return torch.log_softmax(logits / divisor, dim=-1)


def transformed(
    logits: Tensor, bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """What models do to the product with their head: cap(logit_scale (logits + bias)), cap(x) = C tanh(x / C)."""
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logprob_and_entropy(rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, V] of log-probabilities, target [N] -> logp [N], entropy [N]; both 0 where the target is negative."""
    used = target >= 0
    logp = rows.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(rows.exp() * rows).sum(-1)
    zero = torch.zeros_like(logp)
    return torch.where(used, logp, zero), torch.where(used, entropy, zero)


def exact_kl(rows: Tensor, reference_rows: Tensor, kl: str) -> Tensor:
    """KL over the vocabulary between log-probabilities [N, V]: [N]."""
    if kl == "exact_reverse":
        return (rows.exp() * (rows - reference_rows)).sum(-1)
    return (reference_rows.exp() * (reference_rows - rows)).sum(-1)


LIMIT = 20.0  # nats: exp of more leaves fp32's useful range, and inf times 0 is NaN


def saturating_exp(x: Tensor, lowest: float = -torch.inf) -> Tensor:
    """exp that saturates in value and slope: e = exp(clamp(x, lowest, LIMIT)) is the value, and de/dx = e everywhere,
    so that a gradient keeps its sign where the value has stopped growing."""
    return (x.clamp(lowest, LIMIT).detach() + (x - x.detach())).exp()


def saturating_expm1(x: Tensor) -> Tensor:
    """saturating_exp(x) - 1, with its digits where x is near 0."""
    return torch.expm1(x.clamp(max=LIMIT).detach() + (x - x.detach()))


def ratio_of(log_ratio: Tensor) -> Tensor:
    """An importance ratio, saturated at both ends."""
    return saturating_exp(log_ratio, -LIMIT)


def kl_estimate(kl: str, logp: Tensor, ref: Tensor) -> Tensor:
    """One token's estimate of the divergence from the reference, with the gradient that the estimator defines. The
    exponential of D = ref - logp saturates at D = LIMIT."""
    d = ref - logp
    e, k3 = saturating_exp(d), saturating_expm1(d) - d
    if kl == "k3_plus":  # the value of k3, the gradient of k2
        k2 = d.square() / 2
        return k2 + (k3 - k2).detach()
    if kl == "forward_unbiased":  # d/dtheta KL(ref || policy) = -E_policy[e^D dlogp/dtheta]
        return (e * d).detach() - e.detach() * (logp - logp.detach())
    return {
        "k1": -d,
        "abs": d.abs(),
        "k2": d.square() / 2,
        "k3": k3,
        "forward": e * d,
        "article_reverse": logp.exp() * k3,
        "article_forward": ref.exp() * d,
    }[kl]


def grpo_loss(
    logp: Tensor,
    tokens: LossTokens,
    *,
    entropy: Tensor | None = None,
    exact: Tensor | None = None,
    normalizer: float | None = None,
    correction: OffPolicyCorrection = OffPolicyCorrection(),  # noqa: B008 - frozen
    config: GRPOLossConfig,
) -> Tensor:
    """The loss of flat tokens: logp, entropy, exact (the exact KL) and the tokens' own are [N], with cu_seqlens [S + 1]
    and a mask [N] bool."""
    assert tokens.mask is not None
    assert tokens.cu_seqlens is not None
    bounds = tokens.cu_seqlens.tolist()
    total = logp.new_zeros(())
    for s in range(len(bounds) - 1):
        span = slice(bounds[s], bounds[s + 1])
        keep = tokens.mask[span]
        if not bool(keep.any()):
            continue

        def pick(x: Any, span: slice = span, keep: Tensor = keep) -> Any:
            return None if x is None else x[span][keep]

        per_sequence = tokens.advantages.numel() == len(bounds) - 1
        advantage = tokens.advantages[s].expand(int(keep.sum())) if per_sequence else pick(tokens.advantages)
        logp_s, old = pick(logp), pick(tokens.old_logp)
        factor = correction_factor(logp_s, old, pick(tokens.sampling_logp), advantage, correction)
        importance = pick(tokens.importance)
        if factor is not None:
            importance = factor if importance is None else torch.where(importance == 0, 0, importance * factor)
        policy, kl_weight = _policy(logp_s, old, advantage, importance, config)
        per_token = policy
        if config.beta:
            estimate = pick(exact) if config.exact_kl else kl_estimate(config.kl, logp_s, pick(tokens.ref_logp))
            per_token = per_token + config.beta * (kl_weight * estimate if config.kl_correction else estimate)
        if config.entropy_coef:
            per_token = per_token - config.entropy_coef * pick(entropy)
        share = int(keep.sum()) if config.loss_type in ("grpo", "sapo", "gmpo") else 1
        total = total + per_token.sum() / share
    return total / _denominator(tokens.mask, len(bounds) - 1, normalizer, config)


def correction_factor(
    logp: Tensor, old: Tensor | None, sampling: Tensor | None, advantage: Tensor, correction: OffPolicyCorrection
) -> Tensor | None:
    """What a correction multiplies the policy terms of one sequence by, [n]; None if by nothing."""
    logp = logp.detach()
    old = logp if old is None else old
    factor = None
    if correction.importance != "none":
        assert sampling is not None
        log_ratio = old - sampling
        if correction.importance.startswith("sequence"):
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        factor = ratio_of(log_ratio)
        if correction.importance.endswith("truncate"):
            factor = factor.clamp(max=correction.cap)
        else:
            factor = factor.masked_fill((factor > correction.cap) | (factor < 1 / correction.cap), 0)
    if correction.threshold is not None and bool((old - logp).mean() > correction.threshold):
        factor = torch.where(advantage < 0, 0, torch.ones_like(logp) if factor is None else factor)
    return factor


def _denominator(mask: Tensor, sequences: int, normalizer: float | None, config: GRPOLossConfig) -> float:
    if normalizer is not None:
        return normalizer
    if config.loss_type == "dr_grpo":
        assert config.max_completion_length is not None
        return sequences * config.max_completion_length
    if config.loss_type in ("grpo", "sapo", "gmpo", "luspo"):
        return sequences
    return max(int(mask.sum()), 1)


def _clip(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """x within [low, high], with slope 1 at both bounds. torch's clamp has slope 1 there up to 2.13, 0 from 2.14 on."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def _policy(
    logp: Tensor, old: Tensor | None, advantage: Tensor, importance: Tensor | None, config: GRPOLossConfig
) -> tuple[Tensor, Tensor]:
    """One sequence's policy terms [n], not yet weighted, and the ratio that kl_correction uses."""
    if old is None:
        old = logp.detach() if config.detach else logp
    log_ratio = logp - old
    token_ratio = ratio_of(log_ratio)
    sequence_ratio = ratio_of(log_ratio.mean()).expand_as(logp)
    ratio = sequence_ratio if config.importance_level == "sequence" else token_ratio
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    mask = torch.ones_like(logp) if importance is None else importance
    if config.loss_type == "cispo":
        value = -ratio.detach().clamp(max=high) * advantage * logp
    elif config.loss_type == "sapo":
        positive = advantage > 0
        t = torch.where(positive, config.sapo_temperature_pos, config.sapo_temperature_neg).to(logp)
        value = -(4 / t) * torch.sigmoid(t * (ratio - 1)) * advantage
    elif config.loss_type == "vespo":
        value = -_vespo_weight(log_ratio, importance, advantage, config) * advantage * logp
        mask = (mask != 0).to(logp)
    elif config.loss_type == "gmpo":
        bounded = torch.where(advantage > 0, _clip(log_ratio, high=high), _clip(log_ratio, low=-config.epsilon))
        value = -ratio_of(bounded.mean()) * advantage
    else:
        bounded = ratio if config.delta is None else _clip(ratio, high=config.delta)
        value = -torch.minimum(bounded * advantage, _clip(ratio, 1 - config.epsilon, 1 + high) * advantage)
    return torch.where(mask == 0, torch.zeros_like(value), mask * value), ratio


def _vespo_weight(log_ratio: Tensor, importance: Tensor | None, advantage: Tensor, config: GRPOLossConfig) -> Tensor:
    lowest = math.log(1e-8)
    log_weight = log_ratio.clamp(-LIMIT, LIMIT).sum()
    if importance is not None:
        log_weight = log_weight + importance[importance > 0].log().clamp(lowest, LIMIT).sum()
    log_weight = log_weight.clamp(lowest, LIMIT).detach()
    positive = advantage >= 0
    k = torch.where(positive, config.vespo_k_pos, config.vespo_k_neg)
    lam = torch.where(positive, config.vespo_lambda_pos, config.vespo_lambda_neg)
    return (lam + k * log_weight - lam * log_weight.exp()).exp()
