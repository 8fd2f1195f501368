"""Operators with a fixed order of sums, on the CPU: a row's bits depend on nothing that is computed beside it.

A linear in float32 is oneDNN's, which has that property from two rows on; the others are csrc/cpu's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from longgrpo._ops.library import ops

ACTIVATIONS = ("silu", "gelu_tanh")  # the order of Activation in csrc/cpu/gate.h
Activation = Literal["silu", "gelu_tanh"]


def has_bf16() -> bool:
    """Whether this processor computes them in bfloat16 (AVX512-BF16)."""
    return bool(ops.fixed_bf16())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, [..., M] from x [..., K], W [M, K] and bias [M], float32 or bfloat16. Differentiable in all three;
    its backward is that of torch's linear."""
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]  # torch's own
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same without a gradient, of x [N, K]."""
    if x.dtype != torch.float32:
        y: Tensor = ops.fixed_linear(x, weight, bias)
        return y
    if len(x) == 0:
        return x.new_empty(0, len(weight))
    padded = x.expand(2, -1) if len(x) == 1 else x  # a single row would be summed in another order
    y = torch.ops.mkldnn._linear_pointwise(padded.contiguous(), weight, bias, "none", [], "")
    return y[: len(x)]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_rows(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            dy @ weight if need_x else None,
            dy.t() @ x if need_weight else None,
            dy.sum(0) if need_bias else None,
        )


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """act(gate) up, of gate and up [..., I]; rounded once. Differentiable in both, by formula."""
    y: Tensor = _Gated.apply(gate.flatten(0, -2), up.flatten(0, -2), ACTIVATIONS.index(activation))  # type: ignore[no-untyped-call]
    return y.view(gate.shape)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: int) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ops.fixed_gate(gate, up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*ops.fixed_gate_backward(*ctx.saved_tensors, dy.contiguous(), ctx.activation), None)


def attention(
    query: Tensor, key: Tensor, value: Tensor, query_start: Tensor, length: Tensor, *, scale: float,
    pages: Tensor | None = None, window: int = 0,
) -> Tensor:  # fmt: skip
    """Causal attention [N, heads, D] of N queries [N, heads, D], without a gradient. The S sequences' queries are the
    last of their positions.

    Args:
        key, value: [K, key_heads, D], the sequences end to end; with `pages` [P, 32, key_heads, D], in any strides but
            that of the last dimension, and alike.
        query_start: [S + 1] int32, where the sequences' queries begin.
        length: [S] int32, the sequences' keys.
        scale: of the scores.
        pages: [S, n] int32, the page of each 32 positions.
        window: how many positions a query sees, its own among them; 0: all before it.
    """
    out: Tensor = ops.fixed_attention(query, key, value, pages, query_start, length, scale, window)
    return out
