"""LoRA without its large intermediates: y = W x + s B (A x), added into y.

PEFT's own forward casts x to the adapter's dtype (kept for the backward, once for each linear that reads x) and makes
three more tensors of y's size. Here x is kept as it is, shared by the linears that read it, and A x beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
AddInPlace = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def add_in_place(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y [T, out] += scale B (A x), for x [T, in], A [r, in] and B [out, r]. Returns A x [T, r]."""
    down = x @ a.to(x.dtype).t()
    y.addmm_(down, b.to(y.dtype).t(), alpha=scale)
    return down


def use_lean_lora(model: Model, add: AddInPlace = add_in_place) -> Model:
    """Switches PEFT's LoRA linears to this forward, in place. The adapter's matmuls run in x's dtype. `add`: another
    order of the sums.

    A layer whose adapter is off or merged, or that has dropout, a bias or another variant, runs PEFT's own forward, and
    so does every layer under autocast.
    """
    from peft.tuners.lora import Linear

    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = _Lean(module, add)  # type: ignore[method-assign]
    return model


class _Lean:
    """The forward of a LoRA linear."""

    def __init__(self, layer: Any, add: AddInPlace) -> None:
        self.layer = layer
        self.add = add
        self.peft: Callable[..., Tensor] = type(layer).forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        names = layer.active_adapters
        off = layer.disable_adapters or layer.merged or layer.lora_variant or len(names) != 1
        kind = x.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if off or args or kwargs or casts:
            return self.peft(layer, x, *args, **kwargs)
        (name,) = names
        if not isinstance(layer.lora_dropout[name], nn.Identity) or layer.lora_bias[name]:
            return self.peft(layer, x)
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight  # [r, in], [out, r]
        y: Tensor = AddLora.apply(layer.base_layer(x), x, a, b, layer.scaling[name], self.add)  # type: ignore[no-untyped-call]
        return y


class AddLora(torch.autograd.Function):
    """(y, x, A, B, scale, add) -> y + scale B (A x), in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, add: AddInPlace) -> Tensor:
        down = add(y.view(-1, y.shape[-1]), x.flatten(0, -2), a, b, scale)  # [T, r]
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, down, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, down, a, b = ctx.saved_tensors
        dy = grad.flatten(0, -2)  # [T, out]
        d_down = (dy @ b.to(dy.dtype)).mul_(ctx.scale)  # [T, r]
        dx = (d_down @ a.to(dy.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        da = (d_down.t() @ x.flatten(0, -2)).to(a.dtype)
        db = (dy.t() @ down).mul_(ctx.scale).to(b.dtype)
        return grad, dx, da, db, None, None
