"""The losses: from log-probabilities, and fused with the head from hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from longgrpo._ops.library import ops
from longgrpo._ops.loss import METRICS, SAMPLING_METRICS, refuse_forward_mode
from longgrpo.errors import renamed
from longgrpo.loss.config import GRPOLossConfig, OffPolicyCorrection, packed
from longgrpo.loss.devices import bring, bring_tokens, on_device, require
from longgrpo.loss.flatten import flatten, rows_known_on_host
from longgrpo.loss.linear import DEFAULT_WORKSPACE, cast_by_autocast, head_arguments, linear_logprob
from longgrpo.loss.parallel import whole
from longgrpo.loss.tokens import LossTokens

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GRPOLoss(NamedTuple):
    """loss: a float32 scalar. metrics: detached float32 scalars by name. logp, entropy: detached float32 of target's
    shape, nats, 0 for tokens that were not visited; entropy None if it was neither handed in nor computed.

    Metrics: policy_loss (weighted as the loss), kl and entropy (means over the tokens of the loss), ratio_mean,
    ratio_min, ratio_max, clip_low and clip_high (shares of tokens at a clip that acts on them), active (share of tokens
    with a gradient), tokens. With sampling_logp also sampling_diff_mean and sampling_diff_max
    (|old_logp - sampling_logp|), sampling_ratio_mean (the ratio that the correction is about) and sampling_cut (share
    of tokens whose factor is not the ratio; 0 for importance="none").
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logp: Tensor
    entropy: Tensor | None


@renamed(normaliser="normalizer")
def grpo_loss(
    logp: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampling_logp: Tensor | None = None,
    importance: Tensor | None = None,
    entropy: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    correction: OffPolicyCorrection = OffPolicyCorrection(),  # noqa: B008 - frozen
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - frozen
) -> GRPOLoss:
    """The loss of `config` from log-probabilities, differentiable in logp and entropy.

    Args:
        logp: [N] with `cu_seqlens`, or [B, T]: log-probabilities of the sampled tokens under the policy, in nats.
        advantages: one a sequence, or of logp's shape (read as the former if both fit).
        mask: of logp's shape; tokens outside it change nothing, whatever they hold. None: every token counts.
        cu_seqlens: [sequences + 1], rising from 0 to N.
        old_logp: of logp's shape: under the policy that the ratio is taken to. None: on policy, the ratio is 1.
        ref_logp: log-probabilities under the reference policy; needed if config.beta is not 0.
        sampling_logp: of logp's shape: as the engine that sampled said them, for `correction` and the metrics.
        importance: multiplies the policy term, one a token or a sequence: any mask or weight of that term.
        entropy: of logp's shape, in nats, for config.entropy_coef and the metric.
        normalizer: what the whole optimizer step divides by, over all micro-batches and ranks (see loss_normalizer).
            None: this call's own count.
        correction: what is done about the difference between old_logp (logp itself if None) and sampling_logp.
        config: which loss.

    Tensors with one entry a token or a sequence may lie on the CPU whatever logp's device is: they are moved.

    Raises:
        ValueError: shapes that do not fit, a tensor on another device, or options without the tensor that they need.
    """
    if config.exact_kl:
        raise ValueError(f"kl={config.kl!r} is a sum over the vocabulary: use linear_grpo_loss with ref_hidden")
    if config.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef={config.entropy_coef} needs entropy")
    if entropy is not None and entropy.shape != logp.shape:
        raise ValueError(f"entropy {list(entropy.shape)} must be of logp's shape {list(logp.shape)}")
    refuse_forward_mode(logp, entropy)
    given = LossTokens(advantages, mask, cu_seqlens, old_logp, ref_logp, sampling_logp, importance)
    tokens = bring_tokens("logp", logp.device, given)
    entropy = bring("logp", logp.device, "entropy", entropy)
    normalizer = _brought_normalizer("logp", logp.device, normalizer)
    flat = flatten(tokens, logp.shape, normalizer, correction, config)
    flat_entropy = None if entropy is None else entropy.reshape(-1).float().contiguous()
    loss, metrics, _ = ops.token_loss(
        logp.reshape(-1).float().contiguous(), *flat, flat_entropy, *packed(config, correction)
    )  # fmt: skip
    return GRPOLoss(
        loss,
        _named(metrics, sampling_logp),
        _visited(logp, tokens.mask),
        None if entropy is None else _visited(entropy, tokens.mask),
    )


def _brought_normalizer(
    like: str, device: torch.device, normalizer: float | Tensor | None
) -> float | Tensor | None:  # fmt: skip
    return bring(like, device, "normalizer", normalizer) if isinstance(normalizer, Tensor) else normalizer


def _visited(values: Tensor, mask: Tensor | None) -> Tensor:
    """values, detached float32, 0 outside the mask."""
    values = values.detach().float()
    return values if mask is None else torch.where(mask.bool(), values, 0.0)


@renamed(normaliser="normalizer")
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampling_logp: Tensor | None = None,
    importance: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    correction: OffPolicyCorrection = OffPolicyCorrection(),  # noqa: B008 - frozen
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - frozen
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    metrics: bool = True,
    workspace: int = DEFAULT_WORKSPACE,
    group: ProcessGroup | None = None,
) -> GRPOLoss:
    """grpo_loss(linear_logprob(...)) in as few passes of the head as the loss allows, differentiable in hidden, weight
    and bias.

    The loss needs one scalar a token. If that is known as soon as the token's row of logits is there, a frozen head
    costs 2 GEMMs and a trained one 3 (on a GPU 4, if its workspace holds few whole rows of logits). If it needs the
    whole sequence's logp (importance_level="sequence", vespo, gmpo, a correction of sequences without old_logp, a
    threshold with it), 2 and 4, and a frozen head 3 with an entropy bonus or an exact KL. The exact KL itself adds one.
    Tokens outside the mask cost nothing; tokens whose gradient is known to be 0 cost the first GEMM, or nothing with
    `metrics=False`.

    On a GPU this takes a mask and advantages (and cu_seqlens) that are CPU tensors: the pass is planned on the host,
    which never waits for the device. Handed in on the GPU, such tokens cost what the others do.

    Args:
        hidden, weight, target, bias, temperature, softcap, logit_scale, workspace: as linear_logprob's.
        advantages, mask, cu_seqlens, old_logp, ref_logp, sampling_logp, importance, normalizer, correction, config: as
            grpo_loss's; LossTokens holds those that have an entry a token.
        ref_hidden: of hidden's shape and dtype, the reference's hidden states, for kl="exact_reverse" and
            "exact_forward".
        ref_weight: the reference's head; None: `weight`, which must then be frozen.
        metrics: whether tokens without a gradient are to be counted in the metrics, and the entropy among them.
        group: as linear_logprob's; the head's passes are then those of linear_logprob, 2 GEMMs or 4.

    Raises:
        ValueError, TypeError: as linear_logprob's and grpo_loss's.
        RuntimeError: double backward, forward mode.
    """
    options: dict[str, Any] = {
        "bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale
    }  # fmt: skip
    device, shape, rows = hidden.device, target.shape, None
    if _plans_on_host(device):
        needs_sequences = config.needs_sequences or correction.needs_sequences
        rows = rows_known_on_host(shape, advantages, mask, cu_seqlens, config, needs_sequences, metrics)
    require("hidden", device, weight=weight, bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight)
    target = bring("hidden", device, "target", target)
    mask = bring("hidden", device, "mask", mask)
    used = target >= 0 if mask is None else mask.bool() & (target >= 0)
    given = LossTokens(advantages, used, cu_seqlens, old_logp, ref_logp, sampling_logp, importance)
    tokens = bring_tokens("hidden", device, given)
    normalizer = _brought_normalizer("hidden", device, normalizer)
    if group is not None and group.size() > 1:
        asked = target.masked_fill(~used, -100)
        logp, entropy = linear_logprob(
            hidden, weight, asked, **options, entropy=True, workspace=workspace, group=group
        )  # fmt: skip
        return grpo_loss(
            logp, **vars(tokens), entropy=entropy, normalizer=normalizer, correction=correction, config=config
        )  # fmt: skip
    head = head_arguments(hidden, weight, target, **options)
    flat_ref_hidden, flat_ref_weight = _reference_head(hidden, weight, ref_hidden, ref_weight, config)
    flat = flatten(tokens, shape, normalizer, correction, config)
    active = target.numel()
    if rows is not None:
        index, active = on_device(device, rows.order), rows.active
        assert index is not None
        head, flat = head.at(index), flat.at(rows, index)
        flat_ref_hidden = None if flat_ref_hidden is None else flat_ref_hidden.index_select(0, index)
    loss, values, *scores = ops.linear_grpo_loss(
        *head, *flat, flat_ref_hidden, flat_ref_weight, *packed(config, correction), *head.needs, metrics, workspace,
        active,
    )[:4]  # fmt: skip
    scores = [score.detach() for score in scores]
    if rows is not None:
        scores = [score.new_zeros(shape.numel()).index_copy_(0, index, score) for score in scores]
    logp, entropy = (score.view(shape) for score in scores)
    has_entropy = metrics or config.entropy_coef != 0
    return GRPOLoss(loss, _named(values, sampling_logp), logp, entropy if has_entropy else None)


def _plans_on_host(device: torch.device) -> bool:
    """Whether the op cannot look at its inputs' values; the CPU's can."""
    return device.type != "cpu" and not torch.compiler.is_compiling()


def _reference_head(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None, config: GRPOLossConfig
) -> tuple[Tensor | None, Tensor | None]:
    if not config.exact_kl:
        return None, None
    if ref_hidden is None or ref_hidden.shape != hidden.shape or ref_hidden.dtype != hidden.dtype:
        raise ValueError(f"kl={config.kl!r} needs ref_hidden of hidden's shape {list(hidden.shape)} and dtype "
                         f"{hidden.dtype}")  # fmt: skip
    if ref_weight is None and weight.requires_grad:
        raise ValueError(f"kl={config.kl!r} with a trainable head needs ref_weight: the head itself moves")
    if ref_weight is not None and (ref_weight.shape != weight.shape or ref_weight.dtype != weight.dtype):
        raise ValueError("ref_weight must have weight's shape and dtype")
    flat = cast_by_autocast(ref_hidden.detach()).reshape(-1, ref_hidden.shape[-1]).contiguous()
    return flat, None if ref_weight is None else cast_by_autocast(whole(ref_weight.detach())).contiguous()


def _named(metrics: Tensor, sampling_logp: Tensor | None) -> dict[str, Tensor]:
    named = dict(zip(METRICS, metrics.detach().unbind(), strict=True))
    left_out = SAMPLING_METRICS if sampling_logp is None else ()
    return {name: value for name, value in named.items() if name not in left_out}


class LinearGRPOLoss(nn.Module):
    """linear_grpo_loss as a module: what stays the same over a run is given once."""

    def __init__(
        self,
        config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - frozen
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        workspace: int = DEFAULT_WORKSPACE,
    ) -> None:
        super().__init__()
        self.config = config
        self.head = {
            "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "workspace": workspace
        }  # fmt: skip

    def forward(self, hidden: Tensor, weight: Tensor, target: Tensor, advantages: Tensor, **tokens: Any) -> GRPOLoss:
        """Keyword arguments as linear_grpo_loss's; those given to the module are its defaults."""
        return linear_grpo_loss(hidden, weight, target, advantages, config=self.config, **{**self.head, **tokens})
