"""The losses: from log-probabilities, and fused with the head from hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from longgrpo._ops.library import ops
from longgrpo._ops.loss import METRICS
from longgrpo.loss.config import GRPOLossConfig
from longgrpo.loss.linear import DEFAULT_WORKSPACE, cast_by_autocast, head_arguments, linear_logprob
from longgrpo.loss.parallel import whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PER_SEQUENCE_MEAN = ("grpo", "sapo", "gmpo")
_PER_SEQUENCE_COUNT = (*_PER_SEQUENCE_MEAN, "luspo", "dr_grpo")


class GRPOLoss(NamedTuple):
    """loss: a float32 scalar. metrics: detached float32 scalars by name.

    policy_loss (weighted as the loss), kl and entropy (means over the tokens of the loss), ratio_mean, ratio_min,
    ratio_max, clip_low and clip_high (shares of tokens at a clip that acts on them), active (share of tokens with a
    gradient), tokens.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class _Rows(NamedTuple):
    """The tokens that a pass has to visit, where the host knows them."""

    order: Tensor  # [M] int64 into the N flat tokens, on the host: first those that may have a gradient
    active: int  # how many those are
    cu_seqlens: Tensor | None  # [S + 1] int32 bounds among the M, where the loss asks for sequences


def _rows_known_on_host(
    shape: torch.Size, advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, config: GRPOLossConfig,
    metrics: bool,
) -> _Rows | None:  # fmt: skip
    """What a GPU cannot be asked for without waiting for it. None where the host does not know, or nothing is saved."""
    if any(t is not None and t.device.type != "cpu" for t in (advantages, mask, cu_seqlens)):
        return None
    tokens = shape.numel()
    visited = torch.ones(tokens, dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
    if len(shape) == 2:
        cu_seqlens = torch.arange(shape[0] + 1) * shape[1]
    if config.needs_sequences:  # a sequence stays whole and in its place
        assert cu_seqlens is not None
        before = torch.nn.functional.pad(visited.cumsum(0), (1, 0))
        index, bounds = visited.nonzero()[:, 0], before[cu_seqlens.long()].int()
        return _Rows(index, len(index), bounds) if len(index) < tokens else None
    moves = visited
    if not (config.beta or config.entropy_coef):
        of_token = _spread("advantages", advantages, shape, cu_seqlens)
        assert of_token is not None
        moves = visited & (of_token != 0)
    active, quiet = moves.nonzero()[:, 0], (visited & ~moves).nonzero()[:, 0]
    index = torch.cat((active, quiet)) if metrics else active
    return _Rows(index, len(active), None) if len(active) < tokens else None


class _Tokens(NamedTuple):
    """What the loss knows of each token, flat and float32, as the ops take it."""

    weight: Tensor  # [N], 0 outside the mask
    advantage: Tensor  # [N]
    old_logp: Tensor | None  # [N]
    ref_logp: Tensor | None  # [N]
    importance: Tensor | None  # [N]
    cu_seqlens: Tensor | None  # [S + 1] int32

    def at(self, rows: _Rows, index: Tensor) -> _Tokens:
        """The tokens of `rows`; index: their order, on the tokens' device."""
        per_token = (None if t is None else t.index_select(0, index) for t in self[:-1])
        return _Tokens._make((*per_token, _on(index.device, rows.cu_seqlens)))


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    """`tensor` on `device`, without waiting for what the device is at."""
    if tensor is None or tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def token_weights(
    mask: Tensor, cu_seqlens: Tensor | None, config: GRPOLossConfig, normalizer: float | Tensor | None
) -> Tensor:
    """w_t of every token: the loss is sum_t w_t (policy_t + beta kl_t - entropy_coef entropy_t).

    Args:
        mask: [N] bool, the tokens of the loss.
        cu_seqlens: [S + 1], the bounds of the sequences; may be None where the loss type knows no sequences.
        normalizer: what the loss divides by instead of this call's own count.

    Returns: [N] float32, 0 outside the mask.
    """
    ones = mask.float()
    sequences = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
    if normalizer is None:
        if config.loss_type == "dr_grpo":
            if config.max_completion_length is None:
                raise ValueError("loss_type='dr_grpo' divides by max_completion_length: set it in the config")
            normalizer = sequences * config.max_completion_length
        elif config.loss_type in _PER_SEQUENCE_COUNT:
            normalizer = max(sequences, 1)
        else:
            normalizer = ones.sum().clamp(min=1)
    weight = ones / normalizer
    if config.loss_type in _PER_SEQUENCE_MEAN:
        assert cu_seqlens is not None
        bounds = cu_seqlens.long()
        before = torch.nn.functional.pad(ones.cumsum(0, dtype=torch.float64), (1, 0))[bounds]
        weight = weight / per_token(before.diff().clamp(min=1).float(), bounds, mask.numel())
    return weight


def per_token(per_sequence: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[S] -> [N] without asking the device how long the sequences are."""
    return per_sequence.repeat_interleave(cu_seqlens.diff(), output_size=tokens)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().reshape(-1).contiguous()


def _spread(name: str, tensor: Tensor | None, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor | None:
    """[N] from one entry a sequence, or from the tokens' own shape; the former where both fit."""
    if tensor is None:
        return None
    sequences = None if cu_seqlens is None else cu_seqlens.numel() - 1
    if cu_seqlens is not None and tensor.shape == (sequences,):
        return per_token(tensor.detach().float(), cu_seqlens, shape.numel())
    if tensor.shape == shape:
        return _flat(tensor)
    raise ValueError(f"{name} {list(tensor.shape)} needs one entry for each of the {sequences} sequences, or to be "
                     f"of target's shape {list(shape)}")  # fmt: skip


def _prepare(
    shape: torch.Size,
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance: Tensor | None,
    normalizer: float | Tensor | None,
    config: GRPOLossConfig,
) -> _Tokens:
    """Checks and flattens everything that has one entry a token or a sequence. shape: target's, [N] or [B, T]."""
    device, tokens = advantages.device, shape.numel()
    cu_seqlens = _sequence_bounds(shape, advantages, cu_seqlens, normalizer, config)
    _check_combination(old_logp, ref_logp, config)

    for name, tensor in (("mask", mask), ("old_logp", old_logp), ("ref_logp", ref_logp)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} {list(tensor.shape)} must be of target's shape {list(shape)}")
    if isinstance(normalizer, int | float) and not normalizer > 0:
        raise ValueError(f"normalizer must be > 0, got {normalizer}")
    in_loss = torch.ones(tokens, dtype=torch.bool, device=device) if mask is None else mask.reshape(-1).bool()
    advantage = _spread("advantages", advantages, shape, cu_seqlens)
    assert advantage is not None
    return _Tokens(
        token_weights(in_loss, cu_seqlens, config, normalizer),
        advantage,
        _flat(old_logp),
        _flat(ref_logp) if config.beta else None,
        _spread("importance", importance, shape, cu_seqlens),
        cu_seqlens,
    )


def _sequence_bounds(
    shape: torch.Size,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    normalizer: float | Tensor | None,
    config: GRPOLossConfig,
) -> Tensor | None:
    """[S + 1] int32 bounds of the sequences in the flat tokens, or None where nothing asks for them."""
    if len(shape) == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens belongs to flat tokens [N]; padded tokens [B, T] have their rows")
        rows, length = shape
        return torch.arange(rows + 1, dtype=torch.int32, device=advantages.device) * length
    if cu_seqlens is None:
        counts = config.loss_type in _PER_SEQUENCE_MEAN or (config.loss_type in _PER_SEQUENCE_COUNT and not normalizer)
        if config.needs_sequences or counts or advantages.shape != shape:
            raise ValueError(f"flat tokens need cu_seqlens [sequences + 1] for loss_type={config.loss_type!r}, "
                             f"importance_level={config.importance_level!r} and advantages "
                             f"{list(advantages.shape)}")  # fmt: skip
        return None
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must be [sequences + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.long()
        if int(bounds[0]) != 0 or int(bounds[-1]) != shape[0] or bool((bounds.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must rise from 0 to the {shape[0]} tokens, got {bounds.tolist()[:8]}...")
    return cu_seqlens.to(torch.int32).contiguous()


def _check_combination(old_logp: Tensor | None, ref_logp: Tensor | None, config: GRPOLossConfig) -> None:
    if config.beta and not config.exact_kl and ref_logp is None:
        raise ValueError(f"beta={config.beta} with kl={config.kl!r} needs ref_logp")
    if old_logp is not None and not config.detach:
        raise ValueError("detach=False is about the on-policy ratio exp(logp - logp): leave old_logp out")


def grpo_loss(
    logp: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    importance: Tensor | None = None,
    entropy: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - frozen
) -> GRPOLoss:
    """The loss of `config` from log-probabilities, differentiable in logp and entropy.

    Args:
        logp: [N] with `cu_seqlens`, or [B, T]: log-probabilities of the sampled tokens under the policy, in nats.
        advantages: one a sequence, or of logp's shape (read as the former where both fit).
        mask: of logp's shape; tokens outside it change nothing, whatever they hold. None: every token counts.
        cu_seqlens: [sequences + 1], rising from 0 to N.
        old_logp: log-probabilities under the policy that sampled, of logp's shape. None: on policy, the ratio is 1.
        ref_logp: log-probabilities under the reference policy; needed where config.beta is not 0.
        importance: multiplies the policy term, one a token or a sequence: the trainer's probability over the
            engine's, and any mask of the policy term (off-policy sequences, low-entropy tokens) as 0.
        entropy: of logp's shape, in nats, for config.entropy_coef and the metric.
        normalizer: what the whole optimizer step divides by, over all micro-batches and ranks: its number of
            sequences (grpo, sapo, luspo, gmpo), of active tokens (bnpo, dapo, cispo, vespo), of sequences times
            max_completion_length (dr_grpo). None: this call's own count.
        config: which loss.

    Raises:
        ValueError: shapes that do not fit, or options without the tensor that they need.
    """
    if config.exact_kl:
        raise ValueError(f"kl={config.kl!r} is a sum over the vocabulary: use linear_grpo_loss with ref_hidden")
    if config.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef={config.entropy_coef} needs entropy")
    if entropy is not None and entropy.shape != logp.shape:
        raise ValueError(f"entropy {list(entropy.shape)} must be of logp's shape {list(logp.shape)}")
    tokens = _prepare(
        logp.shape, advantages, mask, cu_seqlens, old_logp, ref_logp, importance, normalizer, config
    )  # fmt: skip
    flat_entropy = None if entropy is None else entropy.reshape(-1).float().contiguous()
    loss, metrics, _ = ops.token_loss(
        logp.reshape(-1).float().contiguous(), *tokens, flat_entropy, *config.packed()
    )  # fmt: skip
    return GRPOLoss(loss, _named(metrics))


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
    importance: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 - frozen
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    metrics: bool = True,
    workspace: int = DEFAULT_WORKSPACE,
    group: ProcessGroup | None = None,
) -> GRPOLoss:
    """grpo_loss(linear_logprob(...)) in one pass of the head, differentiable in hidden, weight and bias.

    The loss needs one scalar a token, which is known as soon as the token's row of logits is there, so a frozen head
    costs 2 GEMMs and a trainable one 3 (4 where the loss needs the whole sequence first). Tokens outside the mask
    cost nothing; tokens whose gradient is known to be 0 cost the first GEMM, or nothing with `metrics=False`.

    On a GPU this takes a mask and advantages (and cu_seqlens) that are CPU tensors: the pass is planned on the host,
    which never waits for the device. Handed in on the GPU, such tokens cost what the others do.

    Args:
        hidden, weight, target, bias, temperature, softcap, logit_scale, workspace: as linear_logprob's.
        advantages, mask, cu_seqlens, old_logp, ref_logp, importance, normalizer, config: as grpo_loss's.
        ref_hidden: of hidden's shape and dtype, the reference's hidden states, for kl="exact_reverse" and
            "exact_forward" (one more GEMM).
        ref_weight: the reference's head; None: `weight`, which must then be frozen.
        metrics: whether tokens without a gradient are to be counted in the metrics.
        group: as linear_logprob's; the head's passes are then those of linear_logprob, 2 GEMMs or 4.

    Raises:
        ValueError, TypeError: as linear_logprob's and grpo_loss's.
        RuntimeError: double backward.
    """
    options: dict[str, Any] = {
        "bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale
    }  # fmt: skip
    device, rows = hidden.device, None
    if _plans_on_host(device):
        rows = _rows_known_on_host(target.shape, advantages, mask, cu_seqlens, config, metrics)
        moved = (_on(device, t) for t in (advantages, mask, cu_seqlens, importance))
        advantages, mask, cu_seqlens, importance = moved  # type: ignore[assignment]
    used = target >= 0 if mask is None else mask.bool() & (target >= 0)
    if group is not None and group.size() > 1:
        asked = target.masked_fill(~used, -100)
        logp, entropy = linear_logprob(
            hidden, weight, asked, **options, entropy=True, workspace=workspace, group=group
        )  # fmt: skip
        return grpo_loss(
            logp, advantages, mask=used, cu_seqlens=cu_seqlens, old_logp=old_logp, ref_logp=ref_logp,
            importance=importance, entropy=entropy, normalizer=normalizer, config=config,
        )  # fmt: skip
    head = head_arguments(hidden, weight, target, **options)
    flat_ref_hidden, flat_ref_weight = _reference_head(hidden, weight, ref_hidden, ref_weight, config)
    tokens = _prepare(
        target.shape, advantages, used, cu_seqlens, old_logp, ref_logp, importance, normalizer, config
    )  # fmt: skip
    active = target.numel()
    if rows is not None:
        index, active = _on(device, rows.order), rows.active
        assert index is not None
        head, tokens = head.at(index), tokens.at(rows, index)
        flat_ref_hidden = None if flat_ref_hidden is None else flat_ref_hidden.index_select(0, index)
    loss, values, *_ = ops.linear_grpo_loss(
        *head, *tokens, flat_ref_hidden, flat_ref_weight, *config.packed(), *head.needs, metrics, workspace, active
    )
    return GRPOLoss(loss, _named(values))


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


def _named(metrics: Tensor) -> dict[str, Tensor]:
    return dict(zip(METRICS, metrics.detach().unbind(), strict=True))


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

    def forward(self, hidden: Tensor, weight: Tensor, target: Tensor, advantages: Tensor, **tokens) -> GRPOLoss:
        """Keyword arguments as linear_grpo_loss's; those given to the module are its defaults."""
        return linear_grpo_loss(hidden, weight, target, advantages, config=self.config, **{**self.head, **tokens})
