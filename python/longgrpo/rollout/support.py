"""The distribution that completions are sampled from, from logits: the trainer repeats what the engine does.

If tokens are cut off (top_p, top_k, min_p), the engine's probabilities are those of the remaining tokens. The ratio of
two policies is meaningful only if both are scored on the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longgrpo import LogProb
from longgrpo.config.sampling import Sampling
from longgrpo.loss.reference import transformed
from longgrpo.model.head import Head

CHUNK = 64 << 20  # bytes of float32 logits at a time


def processed_logits(logits: Tensor, sampling: Sampling, inside: Tensor | None = None) -> Tensor:
    """The logits [..., V] float32 of the distribution that `sampling` samples from, -inf for what it leaves out; in
    vLLM's order. Differentiable: what is left out is decided without a gradient.

    `inside` [..., V] bool: the support, if it is known; else top_p, top_k and min_p are applied to these logits.
    """
    if sampling.allowed_token_ids is not None:
        banned = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        banned[list(sampling.allowed_token_ids)] = False
        logits = logits.masked_fill(banned, -math.inf)
    if sampling.logit_bias:
        bias = torch.zeros(logits.shape[-1], device=logits.device)
        bias[list(sampling.logit_bias)] = torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
        logits = logits + bias
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    with torch.no_grad():
        outside = _outside(logits, sampling) if inside is None else ~inside
    return logits.masked_fill(outside, -math.inf)


def _outside(logits: Tensor, sampling: Sampling) -> Tensor:
    """Which tokens are cut off, [..., V] bool: by min_p, of the rest by top_k, of that rest by top_p."""
    outside = torch.zeros_like(logits, dtype=torch.bool)
    if sampling.min_p > 0:
        outside |= logits < logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
    if 0 < sampling.top_k < logits.shape[-1]:
        left = logits.masked_fill(outside, -math.inf)
        outside |= left < left.topk(sampling.top_k, dim=-1).values[..., -1:]
    if sampling.top_p < 1:
        rising, token = logits.masked_fill(outside, -math.inf).sort(-1)
        below = rising.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        below[..., -1] = False
        outside |= torch.empty_like(below).scatter_(-1, token, below)
    return outside


def sampled_logprob(
    hidden: Tensor, head: Head, target: Tensor, sampling: Sampling, support: Sequence[Sequence[int]] | None = None
) -> LogProb:
    """logp and entropy [N] float32 of `target` [N] under processed_logits of the head's logits, differentiable in
    hidden [N, H] and in the head.

    `support`: the tokens that each of the N was sampled from, as the engine reports them; None: they are computed
    again, and include the sampled one whatever rounding says. This is the general path, in plain torch: a chunk of
    logits at a time, computed again in the backward.
    """
    rows = max(1, CHUNK // (4 * len(head.weight)))
    parts = [
        checkpoint(
            _chunk, hidden[i : i + rows], head, target[i : i + rows], sampling,
            support and support[i : i + rows], use_reentrant=False,
        )
        for i in range(0, len(target), rows)
    ]  # fmt: skip
    logp, entropy = zip(*parts, strict=True)
    return LogProb(torch.cat(logp), torch.cat(entropy))


def _chunk(
    hidden: Tensor, head: Head, target: Tensor, sampling: Sampling, support: Sequence[Sequence[int]] | None
) -> tuple[Tensor, Tensor]:
    logits = transformed((hidden @ head.weight.T).float(), **head.options)  # [N, V]
    with torch.no_grad():
        if support is None:
            inside = processed_logits(logits, sampling).isfinite().scatter_(1, target[:, None], True)
        else:
            inside = torch.zeros_like(logits, dtype=torch.bool)
            for row, tokens in enumerate(support):
                inside[row, list(tokens)] = True
    logits = processed_logits(logits, sampling, inside)
    logp = logits - logits.logsumexp(-1, keepdim=True)  # log_softmax is 1e-5 too high at 49,152 tokens
    # A product of 0 and -inf is NaN, also in the gradient.
    entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(-1)  # [N]
    return logp.gather(-1, target[:, None])[:, 0], entropy
