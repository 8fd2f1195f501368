"""Log-probabilities straight from hidden states, without a [tokens, vocabulary] matrix."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from longgrpo._ops import loss as loss_ops  # registers fake kernels and autograd
from longgrpo._ops.library import ops
from longgrpo._ops.loss import refuse_forward_mode
from longgrpo.loss.devices import bring, on_device, require
from longgrpo.loss.parallel import VocabularyShard, whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT_WORKSPACE = 256 << 20  # bytes


class LogProb(NamedTuple):
    """logp, and entropy where it was asked for: float32, of target's shape."""

    logp: Tensor
    entropy: Tensor | None


class Head(NamedTuple):
    """The head's arguments as the ops take them, checked and flat: N tokens."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [N] int64
    bias: Tensor | None  # [V] f32
    token_temperature: Tensor | None  # [N] f32
    temperature: float
    softcap: float
    logit_scale: float

    def at(self, index: Tensor) -> Head:
        """The tokens of index [M]."""
        temperature = None if self.token_temperature is None else self.token_temperature.index_select(0, index)
        return self._replace(
            hidden=self.hidden.index_select(0, index),
            target=self.target.index_select(0, index),
            token_temperature=temperature,
        )

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Which of hidden, weight and bias get a gradient."""
        tensors = (self.hidden, self.weight, self.bias)
        hidden, weight, bias = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
        return hidden, weight, bias


def head_arguments(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Head:
    """Checks the arguments that every head op shares and flattens the tokens."""
    refuse_forward_mode(hidden, weight, bias)
    weight, bias = whole(weight), None if bias is None else whole(bias)
    device = hidden.device
    require("hidden", device, weight=weight, bias=bias)
    hidden, weight = cast_by_autocast(hidden), cast_by_autocast(weight)
    _check_shapes(hidden, weight, target, bias)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, or None for no cap, got {softcap}")
    if not logit_scale > 0:
        raise ValueError(f"logit_scale must be > 0, got {logit_scale}")
    token_temperature = None
    if isinstance(temperature, Tensor):
        if temperature.shape != target.shape:
            raise ValueError(f"temperature {list(temperature.shape)} must be a float or of target's shape "
                             f"{list(target.shape)}")  # fmt: skip
        token_temperature = temperature.detach().reshape(-1).float().contiguous()
        if _can_look(token_temperature) and bool((token_temperature <= 0).any()):
            raise ValueError("temperature must be > 0 everywhere; for greedy decoding score at temperature 1")
        temperature = 1.0
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; for greedy decoding score at temperature 1")
    flat_target = bring("hidden", device, "target", target.reshape(-1).contiguous())
    flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    if os.environ.get("LONGGRPO_CHECK_FINITE") == "1":
        check_finite("hidden", flat, flat_target >= 0)
    return Head(
        flat,
        weight.contiguous(),
        flat_target,
        None if bias is None else bias.float().contiguous(),
        bring("hidden", device, "temperature", token_temperature),
        float(temperature),
        float(softcap or 0.0),
        float(logit_scale),
    )


def _check_shapes(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() not in (2, 3) or hidden.shape[:-1] != target.shape:
        raise ValueError(f"hidden must be [N, H] with target [N], or [B, T, H] with target [B, T]; got hidden "
                         f"{list(hidden.shape)} and target {list(target.shape)}")  # fmt: skip
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [vocabulary, {hidden.shape[-1]}] (the lm_head's own layout), got "
                         f"{list(weight.shape)}")  # fmt: skip
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def cast_by_autocast(operand: Tensor) -> Tensor:
    """`operand` as autocast gives it to F.linear."""
    device = operand.device.type
    active = device != "meta" and torch.is_autocast_enabled(device)  # meta has no autocast to ask
    return operand.to(torch.get_autocast_dtype(device)) if active else operand


def _can_look(tensor: Tensor) -> bool:
    """Whether a value may be read here: looking at a CUDA tensor would wait for the device, a traced one has none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_finite(name: str, rows: Tensor, used: Tensor) -> None:
    """Raises FloatingPointError naming the first row of `rows` [N, H] that is used [N] and not finite."""
    bad = (~rows.isfinite()).any(-1) & used
    if bool(bad.any()):
        raise FloatingPointError(f"{name} of token {int(bad.nonzero()[0])} holds inf or NaN ({int(bad.sum())} tokens)")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    workspace: int = DEFAULT_WORKSPACE,
    alone: bool = False,
    group: ProcessGroup | None = None,
) -> LogProb:
    """log p(target) under the head `weight`, differentiable in hidden, weight and bias.

    z = cap(logit_scale (hidden weight^T + bias)) / temperature with cap(x) = softcap tanh(x / softcap), and
    logp = z[target] - logsumexp(z). Logits are fp32 and exact for confident tokens; they are never all in memory.

    Costs, in GEMMs of N H V multiply-adds: 1 without gradient, 2 with a frozen head, 4 with a trainable one; an
    entropy gradient through a frozen head adds 2.

    Args:
        hidden: [N, H] or [B, T, H], float32, bfloat16 or float16: hidden[i] predicts target[i].
        weight: [V, H], the lm_head. A DTensor (FSDP2) is gathered, and its gradient is the mean over the ranks.
        target: [N] or [B, T] int64; a negative target is ignored: logp 0, entropy 0, no gradient, no cost.
        bias: [V].
        temperature: a float, or a tensor of target's shape.
        softcap: C of C tanh(x / C) (Gemma), None for none.
        logit_scale: factor of the logits (Cohere, Granite).
        entropy: whether to return the entropy of each row too, in nats.
        workspace: bytes that the logits may use.
        alone: whether these log-probabilities meet no others in a ratio, as a reference's or an evaluation's. Without a
            gradient, a GPU may then compute them with another kernel, if `longgrpo.autotune` has measured it to be
            faster; its last bits differ.
        group: the ranks that hold the vocabulary between them (tensor parallelism): `weight` and `bias` are this
            rank's rows, a plain tensor, in the group's order; hidden and target are the same on every rank, and so are
            the results and hidden's gradient.

    Under autocast, hidden and weight are cast as F.linear's operands are. target and a tensor of temperatures may lie
    on the CPU whatever hidden's device is; weight and bias may not.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or constants that do not fit, a target outside the vocabulary, a
            workspace too small for a tile.
        RuntimeError: double backward, forward mode.
    """
    if group is not None and group.size() > 1:
        require("hidden", hidden.device, weight=weight, bias=bias)
        target = on_device(hidden.device, target)
        if isinstance(temperature, Tensor):
            temperature = on_device(hidden.device, temperature)
        shard = VocabularyShard(len(weight), target, group)
        hidden = shard.replicated(hidden)
        options: dict[str, Any] = {
            "bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale
        }  # fmt: skip
        logp, entropies = linear_logprob(hidden, weight, shard.target, entropy=entropy, workspace=workspace, **options)
        return LogProb(*shard.combine(target_logit(hidden, weight, shard.target, **options), logp, entropies))
    head = head_arguments(
        hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    need_hidden, need_weight, need_bias = head.needs
    # The forward keeps dlogp/dhidden if the head is frozen, or if the device can have the weight's gradient by itself;
    # otherwise a trainable head meets the logits again for both.
    trained = need_weight or need_bias
    normalizer = trained and loss_ops.weight_by_itself(head.hidden)
    direction = need_hidden and (normalizer or not trained)
    logp, entropies, *_ = ops.linear_logprob(*head, entropy, direction, workspace, normalizer, alone)
    return LogProb(logp.view(target.shape), entropies.view(target.shape) if entropy else None)


def target_logit(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """z[target] of linear_logprob, f32, of target's shape, without the other logits."""
    rows = target.clamp(min=0)
    logit = (cast_by_autocast(hidden).float() * cast_by_autocast(weight)[rows].float()).sum(-1)
    if bias is not None:
        logit = logit + bias[rows].float()
    logit = logit * logit_scale
    if softcap is not None:
        logit = softcap * torch.tanh(logit / softcap)
    return logit / temperature
