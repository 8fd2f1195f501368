"""TRL's GRPOTrainer with longgrpo's head: `LongGRPOTrainer`, or `patch_trl()` for code that cannot change its class.

TRL 1.16 runs a model's backbone in the model's forward and hands hidden states, head and targets to one autograd
function (trl/kernels/chunked_logprob.py). `linear_logprob` takes that function's place and nothing else of TRL changes,
so that its wrappers, options, metrics and checkpoints stay its own.
"""

from __future__ import annotations

from typing import Any

import torch
import trl
import trl.trainer.utils as fused_head
from torch import Tensor

from longgrpo.integrations._patch import Patch, require_version
from longgrpo.loss import (
    GRPOLoss,
    GRPOLossConfig,
    LossTokens,
    linear_grpo_loss,
    linear_logprob,
    loss_normalizer,
    loss_type,
)
from longgrpo.loss.linear import DEFAULT_WORKSPACE
from longgrpo.offload import OffloadEngine

TESTED_VERSIONS = ("1.16.0",)


class _LinearLogProb:
    """`linear_logprob` in place of TRL's `ChunkedLogProbFunction.apply`, with that function's arguments and results."""

    def __init__(self, trl_function: Any, workspace: int) -> None:
        self.trl_function, self.workspace = trl_function, workspace

    def apply(
        self,
        hidden: Tensor,  # [N, H], the positions with a label
        weight: Tensor,  # [V, H]
        bias: Tensor | None,
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """log_probs, entropy, log_sum_sq_probs, mean_logits and is_top1, each [N] or None."""
        # DeepSpeed ZeRO-3 releases the gathered head before the backward, and only TRL's function computes the
        # statistics that other trainers log: it serves both cases.
        if hasattr(weight, "ds_id") or not {"log_probs", "entropy"}.issuperset(outputs):
            theirs: tuple[Tensor | None, ...] = self.trl_function.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
            return theirs
        logp, entropy = linear_logprob(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
            entropy="entropy" in outputs, workspace=self.workspace,
        )  # fmt: skip
        return logp, entropy, None, None, None


def patch_trl(*, workspace: int = DEFAULT_WORKSPACE) -> Patch:
    """All of TRL's trainers that score through its fused head use `linear_logprob` until the result's `undo()`.

    These are GRPO and RLOO, with their subclasses and existing instances. SFT, DPO and the others keep
    TRL's own head, because they log statistics of the whole distribution.

    Args:
        workspace: bytes that the logits may use (see linear_logprob).

    Raises:
        RuntimeError: another version of TRL than those tested.
    """
    require_version(trl, TESTED_VERSIONS)
    return _head(_LinearLogProb(fused_head._ChunkedLogProbFunction, workspace))


def _head(function: Any) -> Patch:
    """TRL's fused head with another function, which gets only the positions with a label, on every device."""
    return Patch(fused_head, _ChunkedLogProbFunction=function, _use_triton=lambda device: True)


class LongGRPOTrainer(trl.GRPOTrainer):  # type: ignore[misc]  # mypy does not look into TRL
    """TRL's GRPOTrainer, whose logprobs and entropies come from `linear_logprob`.

    Every argument, option, callback, metric and checkpoint is TRL's. In addition, by keyword:

    Args:
        offload: keeps the layers' inputs in host memory between forward and backward; implies gradient checkpointing
            without reentry.
        fused_loss: take the whole loss from `linear_grpo_loss`: 3 head GEMMs instead of 4 for a trained head, and
            none in the backward for completions of advantage 0 if `beta` is 0. The metrics cover the loss's tokens;
            clip_ratio/low_min, clip_ratio/high_max, cispo_clip_ratio and vespo/phi_seq_mean are left out.
        workspace: bytes that the logits may use (see linear_logprob).

    Raises:
        RuntimeError: another version of TRL than those tested.
        ValueError: `fused_loss` with an option that needs the logprobs of all tokens before the loss, or with a
            vision-language model.
    """

    def __init__(
        self,
        *args: Any,
        offload: OffloadEngine | None = None,
        fused_loss: bool = False,
        workspace: int = DEFAULT_WORKSPACE,
        **kwargs: Any,
    ) -> None:
        require_version(trl, TESTED_VERSIONS)
        super().__init__(*args, **kwargs)
        self.offload, self.fused_loss, self.workspace = offload, fused_loss, workspace
        if fused_loss:
            self._refuse_what_needs_logprobs_first()
            self.loss_config = loss_config(self.args)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with _head(_LinearLogProb(fused_head._ChunkedLogProbFunction, self.workspace)):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.offload is not None and self.model.training:
            # Here and not once: TRL switches checkpointing off for each scoring pass, and on again without the engine.
            self.offload.install(self.accelerator.unwrap_model(model))
        return self._fused(model, inputs) if self.fused_loss else super()._compute_loss(model, inputs)

    # ---- the whole loss in one pass ----

    def _refuse_what_needs_logprobs_first(self) -> None:
        args = self.args
        options = {
            "top_entropy_quantile": args.top_entropy_quantile < 1.0,
            "off_policy_mask_threshold": args.off_policy_mask_threshold is not None,
            "entropy_coef": args.entropy_coef != 0.0,
            "use_adaptive_entropy": args.use_adaptive_entropy,
            "vllm_importance_sampling_mode": args.loss_type == "vespo"
            and args.use_vllm
            and args.vllm_importance_sampling_correction
            and args.vllm_importance_sampling_mode == "token_mask",
        }
        refused = [name for name, used in options.items() if used]
        if refused:
            raise ValueError(f"fused_loss=True does not know {', '.join(refused)} as set here: use fused_loss=False")
        if self._is_vlm:
            raise ValueError("fused_loss=True is for text models: use fused_loss=False for a vision-language model")

    def _fused(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)  # [B, P + T]
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = inputs["completion_mask"].bool()  # [B, T]
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        labels = torch.full_like(ids, -100)
        labels[:, -mask.shape[1] :] = ids[:, -mask.shape[1] :].masked_fill(~mask, -100)
        head = _LinearGRPOLoss(self, inputs, mask)
        routers = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with _head(head), self.accelerator.autocast():
            outputs = model(input_ids=ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True, **routers)
        # The loss comes through the model's output, where the hooks of DDP and FSDP see it.
        loss: Tensor = outputs.log_probs.sum()
        mode = "train" if self.model.training else "eval"
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self._micro_batches
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(outputs.aux_loss).mean().item())
        for name, value in self._fused_metrics(head.result).items():
            self._metrics[mode][name].append(value)
        return loss

    @property
    def _micro_batches(self) -> int:
        """Those of one optimizer step."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _normalizer(self, inputs: dict[str, Any], mask: Tensor) -> float | Tensor:
        """What TRL's loss of this type divides by, for one micro-batch."""
        steps = self._micro_batches
        kind = loss_type(self.args.loss_type)
        if kind.divides_by == "tokens" and kind.name != "bnpo":  # TRL's bnpo is a mean over the micro-batch
            tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            return tokens * steps / self.args.steps_per_generation if self.model.training else tokens
        return loss_normalizer(self.loss_config, len(mask), mask.sum()) * steps

    def _fused_metrics(self, result: GRPOLoss) -> dict[str, float]:
        """Means over the tokens of all ranks, under TRL's names."""
        local = result.metrics
        names = ("kl", "entropy", "clip_low", "clip_high")
        sums = torch.stack([*(local[name] * local["tokens"] for name in names), local["tokens"]])
        *sums, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        mean = {name: total / max(tokens, 1.0) for name, total in zip(names, sums, strict=True)}
        metrics = {"entropy": mean["entropy"]}
        if self.beta != 0.0:
            metrics["kl"] = mean["kl"]
        if loss_type(self.args.loss_type).ppo_clip:
            metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"] = mean["clip_low"], mean["clip_high"]
            metrics["clip_ratio/region_mean"] = mean["clip_low"] + mean["clip_high"]
        return metrics


class _LinearGRPOLoss:
    """`linear_grpo_loss` in place of TRL's fused head: the loss is returned as the first position's log-probability."""

    def __init__(self, trainer: LongGRPOTrainer, inputs: dict[str, Any], mask: Tensor) -> None:
        def packed(name: str) -> Tensor | None:
            """[B, T] or [B, 1] -> [N], the tokens of the mask."""
            tensor = inputs.get(name)
            return None if tensor is None else tensor.expand(mask.shape)[mask]

        advantages = inputs["advantages"]
        corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        self.tokens = LossTokens(
            advantages if advantages.dim() == 1 else advantages.expand(mask.shape)[mask],
            cu_seqlens=torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int(),  # [B + 1]
            old_logp=packed("old_per_token_logps"),
            ref_logp=packed("ref_per_token_logps"),
            importance=packed("importance_sampling_ratio") if corrects else None,
        )
        self.normalizer = trainer._normalizer(inputs, mask)
        self.config, self.workspace = trainer.loss_config, trainer.workspace
        self.result: GRPOLoss

    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        if hasattr(weight, "ds_id"):
            raise RuntimeError("DeepSpeed ZeRO-3 takes the head away before the backward: use fused_loss=False")
        self.result = linear_grpo_loss(
            hidden, weight, targets, **vars(self.tokens), normalizer=self.normalizer, config=self.config, bias=bias,
            temperature=temperature, softcap=softcap, logit_scale=logit_scale, workspace=self.workspace,
        )  # fmt: skip
        first = torch.arange(len(targets), device=targets.device) == 0
        return torch.where(first, self.result.loss, 0.0), None, None, None, None


def loss_config(args: trl.GRPOConfig) -> GRPOLossConfig:
    """The loss that `args` describe, without the options that LongGRPOTrainer refuses under `fused_loss`."""
    return GRPOLossConfig(
        loss_type=args.loss_type,
        importance_level=args.importance_sampling_level,
        kl_correction=args.use_bias_correction_kl,
        beta=args.beta,
        epsilon=args.epsilon,
        epsilon_high=args.epsilon_high,
        delta=args.delta,
        max_completion_length=args.max_completion_length,
        sapo_temperature_pos=args.sapo_temperature_pos,
        sapo_temperature_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=args.vespo_lambda_pos,
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=args.vespo_lambda_neg,
    )
