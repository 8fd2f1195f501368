"""verl with longgrpo's head: `patch_verl()`, and the PPO family's loss as a registered policy loss.

verl calls its fused head (`actor_rollout_ref.model.use_fused_kernels=True`) as FusedLinearForPPO's forward, in the
forward of the model, and looks a policy loss up by name (`actor_rollout_ref.actor.policy_loss.loss_mode`).
"""

from __future__ import annotations

from typing import Any

import torch
import verl
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from longgrpo.integrations._patch import Patch, require_version
from longgrpo.loss import GRPOLossConfig, grpo_loss, linear_logprob
from longgrpo.loss.linear import DEFAULT_WORKSPACE

TESTED_VERSIONS = ("0.9.1",)


def patch_verl(*, workspace: int = DEFAULT_WORKSPACE) -> Patch:
    """FusedLinearForPPO uses `linear_logprob`, whatever its backend, until the result's `undo()`.

    To be called in every worker process, before the first step: verl imports the modules that
    `actor_rollout_ref.model.external_lib` names there.

    Args:
        workspace: bytes that the logits may use (see linear_logprob).

    Raises:
        RuntimeError: another version of verl than those tested.
    """
    require_version(verl, TESTED_VERSIONS)

    def forward(
        self: FusedLinearForPPO,
        hidden_states: Tensor,  # [N, H] or [B, T, H]
        vocab_weights: Tensor,  # [V, H]
        input_ids: Tensor,  # [N] or [B, T]
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """log_probs in float32 and entropy in hidden_states' dtype, of input_ids' shape."""
        logp, entropy = linear_logprob(
            hidden_states, vocab_weights, input_ids.long(), temperature=temperature, entropy=True, workspace=workspace
        )
        assert entropy is not None
        return logp, entropy.to(hidden_states.dtype)

    return Patch(FusedLinearForPPO, forward=forward)


def register_policy_loss(name: str = "longgrpo", **changes: Any) -> None:
    """Registers PPO's clip, dual clip included, under `name`: verl's "vanilla" from `grpo_loss`.

    Args:
        name: for actor.policy_loss.loss_mode.
        changes: fields of GRPOLossConfig that override the actor's config, for example importance_level="sequence"
            for GSPO's ratio.

    Raises:
        RuntimeError: another version of verl than those tested.
    """
    require_version(verl, TESTED_VERSIONS)

    def policy_loss(
        old_log_prob: Tensor,  # this and what follows: [B, T]
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = response_mask.bool()
        loss_type, normalizer = _aggregation(loss_agg_mode, mask, **config.global_batch_info)
        ours = GRPOLossConfig(loss_type=loss_type, **{**_clip(config), **changes})
        loss = grpo_loss(
            log_prob, advantages, mask=mask, old_logp=old_log_prob, importance=rollout_is_weights,
            normalizer=normalizer, config=ours,
        ).loss  # fmt: skip
        return loss, _metrics(old_log_prob, log_prob.detach(), advantages, mask, ours)

    core_algos.register_policy_loss(name)(policy_loss)


def _clip(config: Any) -> dict[str, float]:
    """epsilon, epsilon_high and delta of a verl actor's config."""
    low, high = (config.clip_ratio if c is None else c for c in (config.clip_ratio_low, config.clip_ratio_high))
    dual = config.get("clip_ratio_c", 3.0)
    if dual <= 1 + high:
        raise ValueError(
            f"clip_ratio_c={dual} must be above 1 + clip_ratio_high={1 + high}: below it the two clips meet"
        )
    return {"epsilon": low, "epsilon_high": high, "delta": dual}


def _aggregation(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[str, float | Tensor]:
    """(loss_type, normalizer) of grpo_loss that weigh tokens as verl's agg_loss does in this mode."""
    if (
        dp_size > 1
        and (batch_num_tokens if mode == "token-mean" else global_batch_size) is None
        and mode != "token-sum"
    ):
        raise ValueError(f"loss_agg_mode={mode!r} over {dp_size} ranks needs the counts of the global batch")
    if mode == "token-sum":
        return "dapo", 1 / dp_size
    if mode == "token-mean":
        return "dapo", (mask.sum() if batch_num_tokens is None else batch_num_tokens) / dp_size
    sequences = (mask.any(-1).sum() if global_batch_size is None else global_batch_size) / dp_size
    if mode == "seq-mean-token-mean":
        return "grpo", sequences
    if mode == "seq-mean-token-sum":
        return "luspo", sequences
    if mode == "seq-mean-token-sum-norm":
        return "luspo", sequences * (loss_scale_factor or mask.shape[-1])
    raise ValueError(f"unknown loss_agg_mode {mode!r}")


def _metrics(old: Tensor, logp: Tensor, advantages: Tensor, mask: Tensor, config: GRPOLossConfig) -> dict[str, float]:
    """verl's names: shares of the tokens at the clip and at the dual clip, and the mean of old - new."""
    log_ratio = logp - old
    if config.importance_level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = log_ratio.clamp(-20, 20).exp().expand_as(logp)
    assert config.epsilon_high is not None
    too_low = (advantages < 0) & (ratio < 1 - config.epsilon)
    too_high = (advantages > 0) & (ratio > 1 + config.epsilon_high)
    dual = (advantages < 0) & (ratio > (config.delta or torch.inf))
    tokens = mask.sum().clamp(min=1)

    def mean(values: Tensor) -> float:
        return float((values * mask).sum() / tokens)

    return {
        "actor/pg_clipfrac": mean(too_low | too_high),
        "actor/ppo_kl": mean(-(logp - old).clamp(-20, 20)),
        "actor/pg_clipfrac_lower": mean(dual),
    }
