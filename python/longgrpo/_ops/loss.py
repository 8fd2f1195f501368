"""Fake kernels and autograd of the loss ops. Shapes: N tokens, H hidden size, V vocabulary."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longgrpo._ops.library import ops

# The order of LossMetrics in csrc/math/token_batch.h; the last four if sampling_logp is known.
SAMPLING_METRICS = ("sampling_diff_mean", "sampling_diff_max", "sampling_ratio_mean", "sampling_cut")
METRICS = (
    "policy_loss", "kl", "entropy", "ratio_mean", "ratio_min", "ratio_max", "clip_low", "clip_high", "active", "tokens",
    *SAMPLING_METRICS,
)  # fmt: skip

# Where LossConfig's entropy_coef stands among the ops' `constants` (csrc/math/loss_config.h).
ENTROPY_COEF = 4

_LIBRARY = torch.library.Library("longgrpo", "FRAGMENT")


def _f32(like: Tensor, *size: int | torch.SymInt) -> Tensor:
    return like.new_empty(size, dtype=torch.float32)


def _weight_grad(weight: Tensor, *size: int | torch.SymInt) -> Tensor:
    """As the runtimes of csrc/ops make it; `meta` stands in for a GPU."""
    half = weight.device.type != "cpu" and weight.dtype == torch.bfloat16
    return weight.new_empty(size, dtype=torch.bfloat16 if half else torch.float32)


def weight_by_itself(operand: Tensor) -> bool:
    """Whether the device has a pass for only the weight's gradient (Device::kWeightByItself in csrc/head)."""
    return operand.device.type == "cuda"


@torch.library.register_fake("longgrpo::linear_logprob", lib=_LIBRARY)
def _(
    hidden: Tensor, weight: Tensor, target: Any, bias: Any, token_temperature: Any, temperature: Any, softcap: Any,
    logit_scale: Any, entropy: Any, direction: Any, workspace: Any, normalizer: Any = False, alone: Any = False,
) -> Any:  # fmt: skip
    n, h = hidden.shape
    return (
        _f32(hidden, n),
        _f32(hidden, n if entropy else 0),
        hidden.new_empty((n if direction else 0, h)),
        _f32(hidden, n if normalizer else 0, 2),
    )


@torch.library.register_fake("longgrpo::linear_logprob_backward", lib=_LIBRARY)
def _(
    hidden: Tensor, weight: Tensor, target: Any, bias: Any, token_temperature: Any, temperature: Any, softcap: Any,
    logit_scale: Any, logp_grad: Any, entropy_grad: Any, need_hidden: Any, need_weight: Any, need_bias: Any,
    workspace: Any, logp: Any = None, normalizer: Any = None,
) -> Any:  # fmt: skip
    (n, h), v = hidden.shape, weight.shape[0]
    return (
        hidden.new_empty((n if need_hidden else 0, h)),
        _weight_grad(weight, v if need_weight else 0, h),
        _f32(hidden, v if need_bias else 0),
    )


@torch.library.register_fake("longgrpo::token_loss", lib=_LIBRARY)
def _(
    logp: Tensor, token_weight: Any, advantages: Any, old_logp: Any, ref_logp: Any, importance: Any, sampling_logp:
    Any, cu_seqlens: Any, entropy: Any, options: Any, constants: Any,
) -> Any:  # fmt: skip
    return _f32(logp), _f32(logp, len(METRICS)), _f32(logp, logp.shape[0])


@torch.library.register_fake("longgrpo::linear_grpo_loss", lib=_LIBRARY)
def _(
    hidden: Tensor, weight: Tensor, target: Any, bias: Any, token_temperature: Any, temperature: Any, softcap: Any,
    logit_scale: Any, token_weight: Any, advantages: Any, old_logp: Any, ref_logp: Any, importance: Any,
    sampling_logp: Any, cu_seqlens: Any, ref_hidden: Any, ref_weight: Any, options: Any, constants: Any,
    need_hidden: Any, need_weight: Any, need_bias: Any, metrics: Any, workspace: Any, active: Any = -1,
) -> Any:  # fmt: skip
    (n, h), v = hidden.shape, weight.shape[0]
    return (
        _f32(hidden),
        _f32(hidden, len(METRICS)),
        _f32(hidden, n),
        _f32(hidden, n),
        hidden.new_empty((n if need_hidden else 0, h)),
        _f32(hidden, n if need_hidden else 0),
        _weight_grad(weight, v if need_weight else 0, h),
        _f32(hidden, v if need_bias else 0),
    )


@torch.library.register_fake("longgrpo::scale_rows", lib=_LIBRARY)
def _(x: Tensor, scale: Any) -> Any:
    return torch.empty_like(x)


@torch.library.register_fake("longgrpo::scale_rows_", lib=_LIBRARY)
def _(x: Tensor, scale: Any) -> Any:
    return None


# ---- autograd ----

_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _reusable(saved: Tensor) -> bool:
    """Whether no other backward can ask for a saved tensor again, so that its memory may become the gradient."""
    traced = type(saved) is not Tensor  # fake or functional: a mutation would reach the forward's outputs
    return not (traced or torch.compiler.is_compiling() or _keeps_graph())


def _scale_saved(direction: Tensor, scale: Tensor) -> Tensor:
    """direction * scale[:, None]"""
    scale = scale.contiguous()  # the gradient of a sum is an expanded scalar
    if not _reusable(direction):
        scaled: Tensor = ops.scale_rows(direction, scale)
        return scaled
    ops.scale_rows_(direction, scale)
    return direction


def _scale_weight(saved: Tensor, loss_grad: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * loss_grad in the parameter's dtype"""
    return (saved.mul_(loss_grad) if _reusable(saved) else saved * loss_grad).to(dtype)


class _FirstOrder(torch.autograd.Function):
    """A gradient whose own gradient is refused: what it was made of looks constant to autograd, and is not."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> NoReturn:
        raise RuntimeError(
            "longgrpo's losses have no second derivative: their saved direction would look constant to autograd and "
            "the result would be wrong. Use longgrpo.loss.reference for double backward."
        )


def _first_order(*gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if not torch.is_grad_enabled():  # grad mode is on only in a backward with create_graph
        return gradients
    anchor = torch.empty((), requires_grad=True)
    return tuple(
        None if g is None else _FirstOrder.apply(g.detach(), anchor)  # type: ignore[no-untyped-call]  # torch's own
        for g in gradients
    )


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """Raises RuntimeError if one of the inputs has a tangent: the ops would drop it, and the derivative would be 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            "longgrpo's losses have no forward-mode derivative (torch.func.jvp, jacfwd, hessian): use backward, or "
            "longgrpo.loss.reference"
        )


def _setup_linear_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, target, bias, token_temperature, *scalars, entropy, direction, workspace, normalizer, _ = inputs
    logp, _, u, normalizers = output
    ctx.mark_non_differentiable(u, normalizers)
    ctx.set_materialize_grads(False)
    ctx.scalars, ctx.workspace = scalars, workspace
    ctx.has_direction, ctx.has_normalizer = direction, normalizer
    # The inputs are needed only where c or e must meet the logits again: a trainable head, or an entropy gradient.
    ctx.keeps_inputs = entropy or normalizer or not direction
    kept = (hidden, weight, target, bias, token_temperature) if ctx.keeps_inputs else ()
    ctx.save_for_backward(u, *((logp, normalizers) if normalizer else (None, None)), *kept)


def _linear_logprob_backward(ctx: Any, logp_grad: Any, entropy_grad: Any, *_: Any) -> tuple[Any, ...]:
    u, logp, normalizers, *kept = ctx.saved_tensors
    none = (None,) * 9  # token_temperature ... alone are not differentiable
    if logp_grad is None and entropy_grad is None:
        return (None,) * 12
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    scaled = entropy_grad is None and ctx.has_direction
    if scaled and not ctx.has_normalizer:
        return (*_first_order(_scale_saved(u, logp_grad)), None, None, None, *none)
    hidden, weight, target, bias, token_temperature = kept
    if logp_grad is None:
        logp_grad = torch.zeros_like(entropy_grad)
    by_itself = entropy_grad is None and ctx.has_normalizer
    d_hidden, d_weight, d_bias = ops.linear_logprob_backward(
        hidden, weight, target, bias, token_temperature, *ctx.scalars, logp_grad.contiguous(),
        None if entropy_grad is None else entropy_grad.contiguous(), need_hidden and not scaled, need_weight, need_bias,
        ctx.workspace, logp if by_itself else None, normalizers if by_itself else None,
    )  # fmt: skip
    if scaled:
        d_hidden = _scale_saved(u, logp_grad)
    d_hidden, d_weight, d_bias = _first_order(
        d_hidden if need_hidden else None,
        d_weight.to(weight.dtype) if need_weight else None,
        d_bias.to(bias.dtype) if need_bias else None,
    )
    return (d_hidden, d_weight, None, d_bias, *none)


torch.library.register_autograd(
    "longgrpo::linear_logprob", _linear_logprob_backward, setup_context=_setup_linear_logprob, lib=_LIBRARY
)


def _setup_token_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    token_weight, entropy, constants = inputs[1], inputs[8], inputs[10]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.entropy_coef = constants[ENTROPY_COEF] if entropy is not None else 0.0
    ctx.save_for_backward(output[2], token_weight)


def _token_loss_backward(ctx: Any, loss_grad: Any, _metrics: Any, _logp_grad: Any) -> tuple[Any, ...]:
    if loss_grad is None:
        return (None,) * 11
    logp_grad, token_weight = ctx.saved_tensors
    # None and not zeros: for them the head's backward would make its logits again.
    wanted = ctx.needs_input_grad[8] and ctx.entropy_coef != 0
    entropy_grad = -ctx.entropy_coef * loss_grad * token_weight if wanted else None
    return (logp_grad * loss_grad, *(None,) * 7, entropy_grad, None, None)


torch.library.register_autograd(
    "longgrpo::token_loss", _token_loss_backward, setup_context=_setup_token_loss, lib=_LIBRARY
)


def _setup_linear_grpo_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, _, _, direction, scale, d_weight, d_bias = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[1].dtype, None if inputs[3] is None else inputs[3].dtype
    ctx.save_for_backward(direction, scale, d_weight, d_bias)


def _linear_grpo_loss_backward(ctx: Any, loss_grad: Any, *_: Any) -> tuple[Any, ...]:
    if loss_grad is None:
        return (None,) * 25
    direction, scale, d_weight, d_bias = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    weight_dtype, bias_dtype = ctx.dtypes
    d_hidden, d_weight, d_bias = _first_order(
        _scale_saved(direction, scale * loss_grad) if need_hidden else None,
        _scale_weight(d_weight, loss_grad, weight_dtype) if need_weight else None,
        _scale_weight(d_bias, loss_grad, bias_dtype) if need_bias else None,
    )
    return (d_hidden, d_weight, None, d_bias, *(None,) * 21)


torch.library.register_autograd(
    "longgrpo::linear_grpo_loss", _linear_grpo_loss_backward, setup_context=_setup_linear_grpo_loss, lib=_LIBRARY
)
