"""Operators with a fixed order of sums, on the CPU: a row's bits depend on nothing that is computed beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from longgrpo._ops.library import ops

ACTIVATIONS = ("silu", "gelu_tanh")  # the order of Activation in csrc/cpu/gate.h
Activation = Literal["silu", "gelu_tanh"]


_LIBRARY = torch.library.Library("longgrpo", "FRAGMENT")


@torch.library.register_fake("longgrpo::fixed_linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Any) -> Any:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("longgrpo::fixed_attention", lib=_LIBRARY)
def _(
    query: Tensor, key: Any, value: Any, pages: Any, query_start: Any, length: Any, scale: Any, window: Any
) -> Any:  # fmt: skip
    return query.new_empty(query.shape)


@torch.library.register_fake("longgrpo::fixed_gate", lib=_LIBRARY)
def _(gate: Tensor, up: Any, activation: Any) -> Any:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("longgrpo::fixed_gate_backward", lib=_LIBRARY)
def _(gate: Tensor, up: Any, grad: Any, activation: Any) -> Any:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def has_bf16() -> bool:
    """Whether this processor computes them in bfloat16 (AVX512-BF16)."""
    return bool(ops.fixed_bf16())


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, [N, M] from x [N, K], W [M, K] and bias [M], float32 or bfloat16, K even; without a gradient."""
    y: Tensor = ops.fixed_linear(x, weight, bias)
    return y


Rows = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: Rows = linear_rows) -> Tensor:
    """The same of x [..., K], differentiable in all three; its backward is that of torch's linear. `rows`: what
    computes it."""
    y: Tensor = _Linear.apply(x, weight, bias, rows)  # type: ignore[no-untyped-call]  # torch's own
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> Any:
        ctx.save_for_backward(x, weight)
        y = rows(x.reshape(-1, x.shape[-1]), weight, bias)
        # No view: LoRA adds into it.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        return (
            dy @ weight if need_x else None,
            rows.t() @ x.flatten(0, -2) if need_weight else None,
            rows.sum(0) if need_bias else None,
            None,
        )


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """act(gate) up, of gate and up [..., I]; rounded once. Differentiable in both, by formula."""
    y: Tensor = _Gated.apply(gate, up, ACTIVATIONS.index(activation))  # type: ignore[no-untyped-call]
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: int) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ops.fixed_gate(gate.flatten(0, -2), up.flatten(0, -2), activation).view(gate.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows = (x.flatten(0, -2) for x in (*ctx.saved_tensors, dy.contiguous()))
        d_gate, d_up = ops.fixed_gate_backward(*rows, ctx.activation)
        return d_gate.view(dy.shape), d_up.view(dy.shape), None


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
